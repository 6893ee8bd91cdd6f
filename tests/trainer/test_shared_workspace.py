"""One claim, several jobs of one name one after the other: whose checkpoints are gone on from, and that nobody's are lost."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from finetune_api.spec.evaluation import Baseline, Evaluation
from finetune_trainer.checkpointing.checkpoints import find_damage, find_latest, list_checkpoints
from finetune_trainer.job.context import Context
from finetune_trainer.process.errors import UserError
from finetune_trainer.stages.prepare import prepare
from tests.trainer.conftest import COLOURS, Bench, chat

HYPER = {"maxSteps": 6, "learningRate": 1e-2, "globalBatchSize": 8, "maxLength": 64}
SPEC: dict[str, Any] = {
    "tuning": {"lora": {"rank": 4, "alpha": 8, "dropout": 0}, "hyperparameters": HYPER},
    "checkpoint": {"everySteps": 3},
}
ROWS = [chat(q, a) for q, a in COLOURS]
OTHERS = [chat(q, "blue") for q, _ in COLOURS]


def job(bench: Bench, uid: str, rows: list[dict[str, Any]], **spec: Any) -> Context:
    made = bench.context(rows, name="shared", **{**SPEC, **spec})
    return Context(made.job.model_copy(update={"uid": uid}), made.workspace)


def contents(context: Context) -> dict[str, str]:
    """Every file of its checkpoints and its result."""
    folders = [Path(context.layout.checkpoints), Path(context.layout.output)]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def test_jobs_of_one_name_on_one_volume(bench: Bench) -> None:
    first = job(bench, "11111111-a", ROWS)
    assert bench.train(first).result["resumedFrom"] == 0
    before = contents(first)
    assert [step for step, _ in list_checkpoints(first.layout.checkpoints)] == [6, 3]

    changed = job(bench, "22222222-b", OTHERS)
    assert bench.train(changed).result["resumedFrom"] == 0, "other rows: not a step of the first one's counts"
    assert contents(first) == before

    again = job(bench, "33333333-c", ROWS)  # deleted and made again, or restored from a backup: it is to make the same from the same
    resumed = bench.train(again).result
    assert (resumed["resumedFrom"], resumed["steps"]) == (6, 6), "it had ended in the middle of an epoch: not a step more"
    adapter = [Path(job.layout.output, "adapter_model.safetensors").read_bytes() for job in (first, again)]
    assert adapter[0] == adapter[1]
    assert contents(first) == before and find_latest(first.layout.checkpoints).step == 6, "it went on from a copy"

    asked = job(bench, "44444444-d", ROWS, evaluation={"baseline": {"systemPrompt": "Answer shortly."}})
    assert bench.train(asked).result["resumedFrom"] == 6 and contents(first) == before, "how the base is asked trains nothing"
    assert "Answer shortly." in Path(asked.layout.baseline).read_text()


def test_the_same_job_prepared_anew_over_other_rows(bench: Bench) -> None:
    """Its status was lost, and the rows changed meanwhile."""
    first = job(bench, "11111111-a", ROWS)
    bench.train(first)
    before = {name.rpartition("checkpoints/")[2]: digest for name, digest in contents(first).items() if "/checkpoints/" in name}
    changed = job(bench, "11111111-a", OTHERS)
    assert bench.train(changed).result["resumedFrom"] == 0
    kept = {
        str(p).rpartition("checkpoints/")[2]: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in Path(first.layout.earlier).rglob("*")
        if p.is_file() and "/checkpoints/" in str(p)
    }
    assert kept == before
    back = job(bench, "11111111-a", ROWS)
    assert bench.train(back).result["resumedFrom"] == 6


def test_a_run_that_is_named_goes_on_as_it_was_prepared(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are in the workspace: where they came from may have changed, or be gone."""
    made = job(bench, "11111111-a", ROWS)
    run = Context(made.job.model_copy(update={"run": "1"}), made.workspace)
    prepared = prepare(run)
    rows = Path(run.layout.train_rows).read_bytes()
    (bench.data / "train.jsonl").unlink()
    monkeypatch.setenv("FINETUNE_RESUME", "1")
    again = prepare(run)
    assert again.result == prepared.result and again.message.endswith("as prepared for this run")
    assert Path(run.layout.train_rows).read_bytes() == rows
    evaluated = run.job.spec.model_copy(update={"evaluation": Evaluation(baseline=Baseline(system_prompt="Answer shortly."))})
    prepare(Context(run.job.model_copy(update={"spec": evaluated}), run.workspace))
    assert "Answer shortly." in Path(run.layout.baseline).read_text(), "how the base is asked may change"
    Path(run.layout.train_rows).write_bytes(rows + b"\0")
    with pytest.raises(
        UserError, match=r"what the tokenizer and chat template make of the rows changed since run 1 was prepared.*leave --resume out"
    ):
        prepare(run)


@pytest.mark.parametrize("uid", ["11111111-a", "22222222-b"], ids=["the same job", "another of its name"])
def test_other_weights_under_the_same_name(bench: Bench, uid: str) -> None:
    """Of the same size, in the same place."""
    moved = bench.folder / "models" / bench.model.name
    shutil.copytree(bench.model, moved)
    bench.model = moved
    first = job(bench, "11111111-a", ROWS)
    bench.train(first)
    before = find_latest(first.layout.checkpoints)
    weights = load_file(moved / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, moved / "model.safetensors", {"format": "pt"})
    assert bench.train(job(bench, uid, ROWS)).result["resumedFrom"] == 0
    kept = [p for p in Path(first.layout.job).rglob("checkpoint-6") if find_damage(p) is None]
    assert kept and before.step == 6


def test_a_run_that_is_named_is_not_gone_on_with_over_other_weights(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = bench.folder / "models" / bench.model.name
    shutil.copytree(bench.model, moved)
    bench.model = moved
    made = job(bench, "11111111-a", ROWS)
    run = Context(made.job.model_copy(update={"run": "1"}), made.workspace)
    prepare(run)
    weights = load_file(moved / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    monkeypatch.setenv("FINETUNE_RESUME", "1")
    with pytest.raises(UserError, match=r"the model's weights changed since run 1 was prepared.*leave --resume out") as found:
        prepare(run)
    assert found.value.reason == "RunChanged"
