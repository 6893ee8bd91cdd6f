"""Runs are kept apart by what they were made from, here and on a volume that several jobs share: nothing is deleted, nothing taken."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune_api.contract import Identity, JobFile, MadeFrom, StageResult, read_identity, result_digest
from finetune_api.validation import parse_spec
from finetune_cli.local import LocalRun, job_file
from finetune_cli.output import Output
from finetune_cli.runs import Lock, NoSuchRun, Run, list_runs, runs_in
from finetune_trainer.checkpointing import checkpoints
from finetune_trainer.checkpointing.adoption import settle_checkpoints
from finetune_trainer.checkpointing.checkpoints import Fence, find_latest
from finetune_trainer.job.context import Context
from tests.factory import MINIMAL, merged
from tests.unit.test_results import checkpoint

MADE = MadeFrom(tuning="t", rows="sha256:rows", tokens="k", model="sha256:weights", strategy="ddp")
PREPARED = {
    "dataset": {"train": 6, "eval": 0, "tokens": 60, "format": "messages", "digest": "sha256:rows"},
    "plan": {"totalSteps": 20, "strategy": "ddp", "worldSize": 1, "perDeviceBatchSize": 1, "gradientAccumulation": 1},
}


def other(**changes: str) -> MadeFrom:
    return MADE.model_copy(update=changes)


# on a volume: what the trainer does


def context(volume: Path, uid: str = "11111111-a", name: str = "j", **blocks: Any) -> Context:
    return Context(JobFile(name=name, namespace="n", uid=uid, spec=parse_spec(merged(MINIMAL, **blocks))), str(volume))


def saved(context: Context) -> list[int]:
    return sorted(step for step, _ in checkpoints.list_checkpoints(context.layout.checkpoints))


@pytest.fixture
def old(tmp_path: Path) -> Context:
    """A job that saved two checkpoints, and was at work on a third."""
    made = context(tmp_path)
    assert settle_checkpoints(made, MADE) is None
    for step in (10, 20):
        checkpoint(Path(made.layout.checkpoints), step)
    checkpoint(Path(made.layout.checkpoints), 30, seal=False)
    Fence(made.layout.checkpoints, 3).claim()
    assert settle_checkpoints(made, MADE) is None and saved(made) == [10, 20, 30], "its own, at a second try"
    return made


@pytest.mark.parametrize(
    ("made", "spec"),
    [
        (MADE, {"name": "k"}),
        (other(tuning="t2"), {}),
        (other(rows="sha256:others"), {}),
        (other(tokens="another template"), {}),
        (other(model="sha256:other weights"), {}),
        (other(adapter="sha256:a"), {}),
        (other(teacher="sha256:a"), {}),
        (other(strategy="deepspeed-zero2"), {}),
    ],
)
def test_another_job_on_the_same_volume_takes_nothing(tmp_path: Path, old: Context, made: MadeFrom, spec: dict[str, Any]) -> None:
    new = context(tmp_path, uid="22222222-b", **spec)
    assert settle_checkpoints(new, made) is None and saved(new) == []
    assert saved(old) == [10, 20, 30] and find_latest(old.layout.checkpoints).step == 20


def test_a_job_that_was_restored_goes_on_from_a_copy(tmp_path: Path, old: Context) -> None:
    new = context(tmp_path, uid="33333333-c", resources={"requests": {"cpu": "4"}})
    assert settle_checkpoints(new, MADE) == 20
    assert saved(new) == [10, 20] and find_latest(new.layout.checkpoints).step == 20, "what was not complete is left out"
    Fence(new.layout.checkpoints, 0).claim()
    assert saved(old) == [10, 20, 30], "who still runs of the old one loses nothing"
    checkpoints.remove(Path(new.layout.checkpoints, "checkpoint-10"))
    assert find_latest(old.layout.checkpoints).step == 20 and checkpoints.find_damage(Path(old.layout.checkpoints, "checkpoint-10")) is None
    assert settle_checkpoints(new, MADE) is None, "once"


def test_how_a_result_is_compared_and_published_is_no_part_of_how_it_is_trained(tmp_path: Path, old: Context) -> None:
    held_out = {"dataset": {**MINIMAL["dataset"], "eval": {"splitFraction": 0.1}}}
    new = context(tmp_path, uid="33333333-c", evaluation={"baseline": {"systemPrompt": "s"}}, output={"merged": True}, **held_out)
    assert settle_checkpoints(new, MADE) == 20 and saved(new) == [10, 20]


def test_a_volume_without_links_is_copied(tmp_path: Path, old: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr("os.link", refuse)
    new = context(tmp_path, uid="33333333-c")
    assert settle_checkpoints(new, MADE) == 20 and find_latest(new.layout.checkpoints).step == 20


def test_what_a_job_made_from_something_else_is_kept_aside_and_found_again(old: Context) -> None:
    Path(old.layout.output, "adapter_model.safetensors").write_bytes(b"old")
    Path(old.layout.history).write_text("{}\n")
    other_rows = other(rows="sha256:others")
    assert settle_checkpoints(old, other_rows) is None
    assert saved(old) == [] and not list(Path(old.layout.output).iterdir()) and not Path(old.layout.history).exists()
    assert read_identity(old.layout.identity).made_from == other_rows  # type: ignore[union-attr]
    aside = Path(old.layout.earlier, MADE.key)
    assert find_latest(str(aside / "checkpoints")).step == 20 and (aside / "output" / "adapter_model.safetensors").read_bytes() == b"old"
    checkpoint(Path(old.layout.checkpoints), 5)
    settle_checkpoints(old, MADE)
    assert saved(old) == [10, 20] and Path(old.layout.output, "adapter_model.safetensors").exists(), "the rows are as they were"
    settle_checkpoints(old, other_rows)
    assert saved(old) == [5]


def test_checkpoints_of_unknown_make_are_not_taken(tmp_path: Path) -> None:
    """Of an older version: its identity says nothing of weights."""
    made = context(tmp_path)
    checkpoint(Path(made.layout.checkpoints), 10)
    Path(made.layout.identity).write_text(
        json.dumps({"namespace": "n", "name": "j", "uid": "11111111-a", "spec": "s", "rows": "sha256:rows"})
    )
    for _ in range(2):
        assert settle_checkpoints(made, MADE) is None and saved(made) == []
        Path(made.layout.identity).unlink()
        checkpoint(Path(made.layout.checkpoints), 10)
    settle_checkpoints(made, MADE)
    assert len(list(Path(made.layout.earlier).rglob("checkpoint-10"))) == 3, "each of them is kept"


# on this machine: what `finetune run --local` does


def test_a_manifest_without_a_name_of_its_own() -> None:
    spec = parse_spec({**MINIMAL, "model": {"uri": "hf://org/base"}, "dataset": {"train": {"uri": "hf://org/rows"}}, "publish": []})
    assert [job_file(metadata, spec, {}).name for metadata in ({"generateName": "sweep-"}, {"name": "j"})] == ["sweep", "j"]


class Played(LocalRun):
    """Stages that only leave what the trainer's leave."""

    makes: MadeFrom = MADE
    trains_to: int = 20
    started: list[str]

    def _try(self, stage: Any) -> tuple[list[int], list[StageResult | None]]:
        self.started = [*getattr(self, "started", []), stage]
        layout, result = self.layout, {}
        for folder in (layout.data, layout.checkpoints, layout.output, layout.reports):
            Path(folder).mkdir(parents=True, exist_ok=True)
        if stage == "prepare":
            result = PREPARED
            job = self.job
            own = Identity(namespace=job.namespace, name=job.name, uid=job.uid, spec=result_digest(job.spec), made_from=self.makes)
            Path(layout.identity).write_text(own.model_dump_json(by_alias=True))
            Path(layout.train_rows).write_text(self.makes.rows)
            Path(layout.plan).write_text("{}")
        if stage == "train":
            self.begun_from = checkpoints.latest_step(layout.checkpoints)
            if self.trains_to not in [step for step, _ in checkpoints.list_checkpoints(layout.checkpoints)]:
                checkpoint(Path(layout.checkpoints), self.trains_to)
        return [0], [StageResult(reason="Done", result=result)]


def played(workspace: Path, made: MadeFrom = MADE, steps: int = 20, blocks: dict[str, Any] | None = None, **how: Any) -> tuple[Played, str]:
    spec = parse_spec(merged(MINIMAL, **{"distribution": {"gpusPerNode": 0}, **(blocks or {})}))
    run = Played(JobFile(name="j", namespace="local", uid="ab" * 16, spec=spec), workspace, **how)
    run.makes, run.trains_to = made, steps
    run.run()
    return run, run.notes.get_nowait() if run.notes.qsize() else ""


def test_a_run_that_was_made_from_the_same_is_gone_on_with(tmp_path: Path) -> None:
    first, told = played(tmp_path, steps=10)
    assert told == "run 1, a new one: there is no earlier one" and first.status.phase == "Succeeded"
    again, told = played(
        tmp_path, blocks={"evaluation": {"metrics": ["loss"]}, "dataset": {**MINIMAL["dataset"], "eval": {"splitFraction": 0.1}}}
    )
    assert told.startswith("goes on with run 1 from step 10: it was made from the same settings, rows and model")
    assert again.begun_from == 10 and again.folder == first.folder and [run.id for run in runs_in(tmp_path)] == ["1"]
    assert json.loads(again.job_json.read_text())["spec"]["evaluation"], "as the manifest is now"
    asked = {"evaluation": {"metrics": ["loss"], "baseline": {"systemPrompt": "s"}}, "dataset": again.job.spec.to_wire()["dataset"]}
    for how in ({}, {"resume": "1"}):
        other_baseline, told = played(tmp_path, blocks=asked, **how)
        assert "goes on with run 1 from step 20" in told and other_baseline.begun_from == 20, "how the base is asked trains nothing"
        assert other_baseline.started[-1] == "evaluate"


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (other(rows="sha256:new", tokens="new"), "the rows changed"),
        (other(tokens="new"), "what the tokenizer and chat template make of the rows changed"),
        (other(model="sha256:new"), "the model's weights changed"),
        (other(tuning="new", strategy="fsdp"), "the settings (spec.tuning) and the strategy (distribution) changed"),
        (other(adapter="sha256:new"), "the adapter of tuning.continueFrom changed"),
        (other(teacher="sha256:new"), "the teacher's weights changed"),
    ],
)
def test_any_other_begins_anew_and_the_earlier_one_is_kept(tmp_path: Path, made: MadeFrom, what: str) -> None:
    first, _ = played(tmp_path)
    second, told = played(tmp_path, made)
    assert told == f"run 2, a new one: {what} since run 1; run 1 is kept, and --resume 1 goes on with it as it was made"
    assert second.begun_from is None and second.folder != first.folder
    assert checkpoints.latest_step(first.layout.checkpoints) == 20 and Path(first.layout.train_rows).read_text() == MADE.rows
    third, told = played(tmp_path)
    assert told.startswith("goes on with run 1 from step 20") and third.begun_from == 20
    assert sorted(run.id for run in runs_in(tmp_path)) == ["1", "2"]


def test_fresh_begins_a_run_and_resume_names_one(tmp_path: Path) -> None:
    played(tmp_path, steps=10)
    fresh, told = played(tmp_path, fresh=True, steps=5)
    assert told == "run 2, a new one, as --fresh asks for; kept: 1" and fresh.begun_from is None
    latest, told = played(tmp_path, steps=7)
    assert told.startswith("goes on with run 2 from step 5") and latest.begun_from == 5, "of several the latest"
    named, told = played(tmp_path, resume="1")
    assert told == "goes on with run 1 from step 10, as --resume asks for" and named.begun_from == 10
    assert named._held.descriptors == (), "let go at the end"
    by_folder, _ = played(tmp_path, resume="local-j-2")
    assert by_folder.begun_from == 7


def test_what_resume_cannot_go_on_with(tmp_path: Path) -> None:
    played(tmp_path)
    with pytest.raises(NoSuchRun, match=r"--resume 7: j has no such run in .*; there are: 1 \(Succeeded, step 20\)"):
        played(tmp_path, resume="7")
    hyper = {"tuning": {"hyperparameters": {"learningRate": 0.5}}}
    with pytest.raises(
        NoSuchRun, match=r"spec.tuning.hyperparameters.learningRate was 0.0002 and is 0.5. Put that back, or leave --resume out"
    ):
        played(tmp_path, resume="1", blocks=hyper)
    held = Lock(tmp_path / "jobs" / "local-j-1")
    with pytest.raises(NoSuchRun, match="another process runs it"):
        played(tmp_path, resume="1")
    busy, _ = played(tmp_path)
    assert busy.status.conditions[-1].reason == "RunInProgress" and "train" not in busy.started
    assert [(run.id, run.phase) for run in runs_in(tmp_path)] == [("1", "Running")]
    held.close()
    with pytest.raises(NoSuchRun, match="there are: none"):
        played(tmp_path / "empty", resume="1")


def test_a_look_that_came_to_nothing_leaves_no_run_behind(tmp_path: Path) -> None:
    class Refused(Played):
        def _try(self, stage: Any) -> tuple[list[int], list[StageResult | None]]:
            Path(self.layout.data).mkdir(parents=True)
            Path(self.layout.data, "model.json").write_text("{}")
            Path(self.layout.teacher_answers).write_text("paid for\n")
            return [10], [StageResult(reason="InvalidRows", message="row 3")]

    spec = parse_spec(MINIMAL)
    job = JobFile(name="j", namespace="local", uid="ab" * 16, spec=spec)
    Refused(job, tmp_path).run()
    assert [run.phase for run in runs_in(tmp_path)] == ["Failed"]
    mended, told = played(tmp_path)
    assert told == "run 1, a new one: there is no earlier one"
    assert not Path(mended.layout.data, "model.json").exists() and Path(mended.layout.teacher_answers).read_text() == "paid for\n"
    asked_once, _ = played(tmp_path, other(model="sha256:new"))
    assert Path(asked_once.layout.teacher_answers).read_text() == "paid for\n", "what a teacher wrote is not asked again"


def test_a_run_that_was_killed_is_gone_on_with(tmp_path: Path) -> None:
    first, _ = played(tmp_path, steps=10)
    (first.folder / "status.json").unlink()
    assert [run.phase for run in runs_in(tmp_path)] == ["Interrupted"]
    again, told = played(tmp_path)
    assert told.startswith("goes on with run 1 from step 10") and again.begun_from == 10


def test_runs_of_an_older_version_are_kept(tmp_path: Path) -> None:
    first, _ = played(tmp_path)
    document = json.loads(first.job_json.read_text())
    before = first.folder.with_name("local-j-abababab")
    first.folder.rename(before)
    (before / "identity.json").unlink()
    (before / "job.json").write_text(json.dumps({key: value for key, value in document.items() if key != "run"}))
    new, told = played(tmp_path)
    assert told.startswith("run 1, a new one: what run abababab was made from is not known; run abababab is kept")
    assert checkpoints.latest_step(str(before / "checkpoints")) == 20 and new.begun_from is None


def test_the_lock_outlives_the_one_who_took_it(tmp_path: Path) -> None:
    """Killed, with a stage that still runs."""
    lock = Lock(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=lock.descriptors)
    lock.close()
    assert not Lock(tmp_path).taken
    child.communicate(b"\n")
    assert Lock(tmp_path).taken


def test_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), width=120)
    list_runs(tmp_path, None, Output.TABLE, console)
    assert "no runs in" in console.file.getvalue()  # type: ignore[attr-defined]
    played(tmp_path)
    played(tmp_path, other(rows="sha256:0123456789"))
    (tmp_path / "jobs" / "junk").mkdir()
    (tmp_path / "jobs" / "junk" / "job.json").write_text("{")
    list_runs(tmp_path, None, Output.TABLE, console)
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "local/j" in drawn and "01234567" in drawn and "Succeeded" in drawn
    list_runs(tmp_path, "failed", Output.NAME, console)
    assert capsys.readouterr().out == ""
    list_runs(tmp_path, "succeeded", Output.NAME, console)
    assert sorted(capsys.readouterr().out.split()) == ["1", "2"]
    list_runs(tmp_path, None, Output.JSON, console)
    assert {fact["step"] for fact in json.loads(capsys.readouterr().out)} == {20}
    shutil.rmtree(tmp_path / "jobs" / "local-j-1")  # what people delete is gone, and no more
    assert [run.id for run in runs_in(tmp_path)] == ["2"]
    assert Run(tmp_path / "jobs" / "local-j-2", {"uid": "x"}).step == 20
