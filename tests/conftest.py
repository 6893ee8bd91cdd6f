"""Fixtures that several kinds of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.quickstart import model


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """Folder of a model of 0.2 million parameters, made by the example's own script."""
    return model("tiny.py", "tiny")
