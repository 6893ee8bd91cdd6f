"""Which packages a job's processes go without."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_api.contract import JobFile
from finetune_api.validation import parse_spec
from finetune_trainer.job.context import Context
from finetune_trainer.job.unused import leave_out, unused_packages
from tests.factory import MINIMAL, merged


def context(folder: Path, config: dict[str, Any] | None = None, **blocks: Any) -> Context:
    made = Context(JobFile(name="j", namespace="n", uid="12345678", spec=parse_spec(merged(MINIMAL, **blocks))), str(folder / "workspace"))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
        made.write_json(made.layout.reference("model"), {"path": str(folder)})
    return made


@pytest.fixture(autouse=True)
def no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("blocks", "config", "unused"),
    [
        ({}, {}, ["bitsandbytes", "wandb"]),
        ({}, None, ["bitsandbytes", "wandb"]),
        ({"tuning": {"method": "qlora"}}, {}, ["wandb"]),
        ({"tuning": {"hyperparameters": {"optimizer": "paged-adamw-8bit"}}}, {}, ["wandb"]),
        ({}, {"quantization_config": {"quant_method": "bitsandbytes"}}, ["wandb"]),
        ({"tuning": {"tracking": {"wandb": {"project": "p", "secretRef": {"name": "wandb"}}}}}, {}, ["bitsandbytes"]),
    ],
)
def test_what_a_job_does_not_use(tmp_path: Path, blocks: dict[str, Any], config: dict[str, Any] | None, unused: list[str]) -> None:
    assert unused_packages(context(tmp_path, config, **blocks)) == unused


def test_a_tracker_by_its_environment_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert unused_packages(context(tmp_path, {})) == ["bitsandbytes"]


def test_what_is_left_out_is_found_and_imported_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    leave_out(["this", "json"])
    assert importlib.util.find_spec("this") is None  # as libraries ask
    with pytest.raises(ImportError):
        importlib.import_module("this")
    assert importlib.import_module("json") is json, "what is there stays"
    monkeypatch.delitem(sys.modules, "this")
