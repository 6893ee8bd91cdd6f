"""What several kinds of tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.quickstart import model

# before anybody imports torch: its threads wait for each other in busy loops, which costs eight times as much
# processor time as one thread where other processes want the cores, and a tiny model gains nothing by a second one
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """What a test, or a library that it calls, puts into the environment does not reach the next one."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """Folder of a model of 0.2 million parameters, made by the example's own script."""
    return model("tiny.py", "tiny")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Coverage is what unit tests measure; of what trains it would cost a third more processor time."""
    for item in items:
        if "unit" not in item.path.parts:
            item.add_marker("no_cover")
