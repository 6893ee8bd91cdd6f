"""What each package must not load, seen in a fresh process; and that `operator/` does not shadow the standard library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        ("finetune_operator.__main__, finetune_operator.handlers", ["torch", "transformers", "finetune_trainer"]),
        (
            "finetune_trainer.__main__, finetune_trainer.stages.train, finetune_trainer.stages.worker, finetune_trainer.stages.prepare",
            ["kopf", "kubernetes", "finetune_operator"],
        ),
        ("finetune_trainer.stages.train, finetune_trainer.stages.publish, finetune_trainer.stages.check", ["torch", "transformers"]),
        ("finetune_api.crd, finetune_api.contract", ["kopf", "kubernetes", "torch", "finetune_operator", "finetune_trainer"]),
        ("finetune_operator.reconcile.job, finetune_operator.resources.gang", ["kopf", "kubernetes", "aiohttp"]),
    ],
)
def test_walls(modules: str, forbidden: list[str]) -> None:
    code = f"import {modules}; import sys; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_operator_folder_is_no_package() -> None:
    assert not (REPO / "operator" / "__init__.py").exists()
