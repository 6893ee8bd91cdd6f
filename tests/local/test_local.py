"""`finetune run --local`: every method, strategy and format of this release trains, and the loss falls."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from finetune_api.status import FineTuneJobStatus
from finetune_api.validation import parse_job
from finetune_cli.local import LocalRun, MissingVolume, job_file
from finetune_cli.view import JobView, sparkline
from tests.cluster.control_plane import free_port
from tests.cluster.shell import REPO

TINY: dict[str, Any] = yaml.safe_load((REPO / "examples" / "tiny.yaml").read_text())
HYPER = {"maxSteps": 24, "learningRate": 1e-2, "globalBatchSize": 8, "maxLength": 64}
GANG = {"nodes": 2, "gpusPerNode": 0}


def build(folder: Path, model: Path, name: str, data: Path | None = None, **spec: Any) -> LocalRun:
    """A variant of examples/tiny.yaml, not started."""
    document = copy.deepcopy(TINY)
    document["metadata"]["name"] = name
    document["spec"].update(spec)
    metadata, parsed = parse_job(document)
    volumes = {"models": str(model.parent), "colours": str(data or REPO / "examples" / "data"), "published": str(folder / "published")}
    return LocalRun(job_file(metadata, parsed, volumes), folder / "workspace")


def run(folder: Path, model: Path, name: str, data: Path | None = None, **spec: Any) -> tuple[FineTuneJobStatus, LocalRun]:
    """Run it here."""
    local = build(folder, model, name, data, **spec)
    local.run()
    return local.read(), local


def tuning(**changes: Any) -> dict[str, Any]:
    return {"lora": {"rank": 8, "alpha": 16, "dropout": 0}, "hyperparameters": HYPER, **changes}


FULL = {"method": "full", "hyperparameters": {**HYPER, "learningRate": 3e-3}}
#: what one process does differently by method and setting is tested in tests/trainer, without a process per stage
CASES: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"tuning": tuning(), "checkpoint": {"everySteps": 7}}),
    ("qlora", {"tuning": tuning(method="qlora")}),
    ("lora-zero2-alone", {"tuning": tuning(), "distribution": {"gpusPerNode": 0, "strategy": "deepspeed-zero2"}}),
    ("lora-ddp", {"tuning": tuning(), "distribution": {**GANG, "strategy": "ddp"}}),
    ("full-zero1", {"tuning": FULL, "distribution": {**GANG, "strategy": "deepspeed-zero1"}}),
    ("lora-zero2", {"tuning": tuning(), "distribution": {**GANG, "strategy": "deepspeed-zero2"}}),
    (
        "partial-zero3",
        {
            "tuning": {"method": "partial", "hyperparameters": {**HYPER, "learningRate": 5e-3}},
            "distribution": {**GANG, "strategy": "deepspeed-zero3"},
        },
    ),
    ("lora-zero3", {"tuning": tuning(), "distribution": {**GANG, "strategy": "deepspeed-zero3"}}),
    ("full-zero3", {"tuning": FULL, "distribution": {**GANG, "strategy": "deepspeed-zero3"}}),
    ("lora-fsdp", {"tuning": tuning(), "distribution": {**GANG, "strategy": "fsdp"}}),
]


#: with FINETUNE_COMBINATIONS=all: each of their methods and each of their strategies is met in another case, or in tests/trainer
RARE = (
    () if os.environ.get("FINETUNE_COMBINATIONS") == "all" else ("qlora", "lora-zero2-alone", "partial-zero3", "full-zero1", "lora-zero3")
)
USUAL = [case for case in CASES if case[0] not in RARE]

Case = Callable[[str], tuple[FineTuneJobStatus, LocalRun]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Case:
    """The run of a case by its name; run once, and only looked at by those who ask again."""

    @functools.cache
    def ran(name: str) -> tuple[FineTuneJobStatus, LocalRun]:
        return run(tmp_path_factory.mktemp(name), tiny_model, name, **dict(CASES)[name])

    return ran


@pytest.mark.parametrize(("name", "spec"), USUAL, ids=[name for name, _ in USUAL])
def test_every_method_and_strategy_learns(case: Case, name: str, spec: dict[str, Any]) -> None:
    status, local = case(name)
    log = local.logs / "train-0.log"
    assert status.phase == "Succeeded", f"{status.conditions[-1].message}\n{log.read_text()[-4000:] if log.exists() else ''}"
    assert status.evaluation is not None and status.plan is not None
    base, tuned = status.evaluation.arm("Base"), status.evaluation.arm("Tuned")
    assert base is not None and tuned is not None and tuned.metrics["loss"] < 0.9 * base.metrics["loss"], status.evaluation
    nodes = spec.get("distribution", {}).get("nodes", 1)
    assert status.plan.world_size == nodes
    files = {p.name for p in (local.workspace.parent / "published" / "tiny").iterdir()}
    assert ("model.safetensors" if spec["tuning"].get("method") in ("full", "partial") else "adapter_model.safetensors") in files


def test_one_and_two_processes_see_the_same_data_in_the_same_order(case: Case) -> None:
    """And ZeRO-2 as well: the losses of every step agree."""

    def losses(name: str) -> list[float]:
        entries = [json.loads(line) for line in Path(case(name)[1].layout.history).read_text().splitlines()]
        return [e["loss"] for e in entries if e.get("loss") is not None][:8]  # later ones drift apart by rounding

    alone = losses("lora")
    assert len(alone) == 8
    assert losses("lora-ddp") == pytest.approx(alone, rel=5e-3)
    assert losses("lora-zero2") == pytest.approx(alone, rel=5e-3)


def test_an_interrupted_run_goes_on_and_ends_like_an_uninterrupted_one(case: Case) -> None:
    """The loss of every step after the resume is that of the undisturbed run. Whoever asks for the case afterwards finds more history."""

    def losses(lines: list[str]) -> dict[int, float]:
        return {entry["step"]: round(entry["loss"], 4) for entry in map(json.loads, lines) if entry.get("loss") is not None}

    _, calm = case("lora")
    history, checkpoints = Path(calm.layout.history), Path(calm.layout.checkpoints)
    before = history.read_text().splitlines()
    expected = losses(before)
    assert set(expected) == set(range(1, 25))
    assert sorted(p.name for p in checkpoints.glob("checkpoint-*")) == ["checkpoint-21", "checkpoint-24"]
    shutil.rmtree(checkpoints / "checkpoint-24")  # as if the run had died at step 23
    calm._stage("train", "Trained", "Training")
    resumed = losses(history.read_text().splitlines()[len(before) :])
    assert set(resumed) == set(range(22, 25)), "it went on from step 21, in the middle of an epoch"
    assert resumed == {step: expected[step] for step in resumed}


def test_f30_a_loss_that_is_no_number_stops_the_run_with_advice(tmp_path: Path, tiny_model: Path) -> None:
    """Weights that overflow when they are used: the first logged loss is NaN."""
    import torch
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken" / "tiny"
    shutil.copytree(tiny_model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], 3e38)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    status, _ = run(tmp_path, broken, "broken", tuning=tuning())
    assert status.phase == "Failed"
    assert status.conditions[-1].reason == "NonFiniteLoss", status.conditions[-1]
    assert "at step 1; the base itself makes it so" in status.conditions[-1].message


def test_f29_the_gate_holds_back_what_is_not_better(tmp_path: Path, tiny_model: Path) -> None:
    lazy = tuning(hyperparameters={**HYPER, "maxSteps": 1, "learningRate": 1e-9})
    status, _ = run(tmp_path, tiny_model, "lazy", tuning=lazy, evaluation={"metrics": ["loss"], "gate": {"minImprovement": 0.5}})
    assert status.phase == "Failed" and status.conditions[-1].reason == "GateNotPassed"
    assert not (tmp_path / "published" / "tiny").exists()


def test_the_trainer_refuses_a_world_that_is_not_the_one_asked_for(tmp_path: Path, case: Case) -> None:
    """A worker that is started alone, of a gang of two, does not train alone in silence."""
    _, local = case("lora")
    plan = json.loads(Path(local.layout.plan).read_text())
    env = {
        **os.environ,
        "FINETUNE_PLAN": json.dumps({**plan, "worldSize": 2}),
        "FINETUNE_IPC_DIR": str(tmp_path),
        "ACCELERATE_USE_CPU": "true",
        **{
            "LOCAL_RANK": "0",
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        },
    }
    command = [sys.executable, "-m", "finetune_trainer", "worker", "--job", str(local.job_json), "--workspace", str(local.workspace)]
    done = subprocess.run(command, env=env, capture_output=True, check=False)
    assert done.returncode == 1
    assert json.loads((tmp_path / "error.json").read_text())["reason"] == "WorldMismatch"
    assert not (tmp_path / "result.json").exists()


def test_only_the_data_is_looked_at(tmp_path: Path, tiny_model: Path) -> None:
    local = build(tmp_path, tiny_model, "looked-at", tuning=tuning())
    local.run(prepare_only=True)
    status = local.read()
    assert status.phase == "Succeeded" and status.conditions[-1].reason == "Prepared"
    assert status.dataset is not None and status.dataset.train > 0 and status.plan is not None
    assert Path(local.layout.reports, "data.html").exists() and not Path(local.layout.history).exists()


def test_a_bad_dataset_names_the_rows(tmp_path: Path, tiny_model: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "colours.jsonl").write_text('{"messages": []}\n' * 30)
    status, local = run(tmp_path, tiny_model, "bad", data)
    assert status.conditions[-1].reason == "InvalidRows"
    assert "train row 1" in status.conditions[-1].message
    assert not (local.logs / "train-0.log").exists()


def test_the_command_line(tmp_path: Path, tiny_model: Path) -> None:
    command = [sys.executable, "-m", "finetune_cli"]
    valid = subprocess.run(
        [*command, "validate", "examples/tiny.yaml", "examples/quickstart.yaml"], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert valid.returncode == 0 and "is valid" in valid.stdout
    bad = tmp_path / "bad.yaml"
    bad.write_text((REPO / "examples" / "tiny.yaml").read_text().replace("learningRate", "learning_rate"))
    refused = subprocess.run([*command, "validate", str(bad)], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "did you mean 'learningRate'?" in refused.stderr
    lost = subprocess.run([*command, "run", "--local", "examples/tiny.yaml"], cwd=REPO, capture_output=True, text=True, check=False)
    assert lost.returncode == 2 and "--volume models=FOLDER" in lost.stderr
    with pytest.raises(MissingVolume, match="no such folder"):
        metadata, spec = parse_job(TINY)
        job_file(metadata, spec, {"models": "/nowhere", "colours": "/nowhere", "published": str(tmp_path)})


def test_the_view_draws_a_terminal_and_prints_to_a_pipe() -> None:
    status = FineTuneJobStatus.model_validate(
        {
            "phase": "Training",
            "progress": {"step": 5, "totalSteps": 10, "percent": 50, "loss": 1.25, "eta": "3s", "tokensPerSecond": 10.0},
            "attempt": 1,
        }
    )
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    view = JobView(console, "team-a/job")
    view.update(status)
    console.print(view.render(status))
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "50%" in drawn and "1.2500" in drawn and "restarts 1" in drawn
    assert view.plain(status) == "team-a/job: Training 50% (step 5/10, loss 1.2500, ETA 3s)"
    assert view.plain(status) is None
    ended = FineTuneJobStatus.model_validate(
        {
            "phase": "Succeeded",
            "evaluation": {
                "arms": [
                    {"name": "Base", "metrics": {"perplexity": 9.0}, "promptTokens": 7.5, "answerTokens": 2, "latencySeconds": 0.01},
                    {"name": "FewShot", "metrics": {"perplexity": 4.0}, "shots": 8, "promptTokens": 91.5, "answerTokens": 2, "latencySeconds": 0.02},
                    {"name": "Tuned", "metrics": {"perplexity": 3.0}, "promptTokens": 7.5, "answerTokens": 2, "latencySeconds": 0.01},
                ],
                "examples": 24, "prompts": 24, "comparedWith": "FewShot", "improvement": 0.25, "interval": [0.1, 0.4], "gate": "Passed",
            },
            "conditions": [{"type": "Evaluated", "status": "True", "reason": "PromptingMayDo", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
        }
    )  # fmt: skip
    console.print(view.summary(ended))
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "improvement over FewShot 0.25, between 0.1 and 0.4, gate Passed" in drawn and "PromptingMayDo" in drawn
    assert all(word in drawn for word in ("8 examples", "tokens sent", "91.5", "0.02 s", "24 held-out rows of 24 prompts"))
    assert sparkline([3, 2, 1]) == "█▅▁" and sparkline([]) == "" and len(sparkline(list(range(500)))) == 40
