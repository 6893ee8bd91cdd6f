"""Checkpoints, evaluation and publishing: nothing half-written counts, nothing of others is overwritten."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
from huggingface_hub import HfApi

from finetune_api.contract import JobFile
from finetune_api.status import ExportedForm
from finetune_api.validation import parse_spec
from finetune_trainer.checkpointing import checkpoints
from finetune_trainer.checkpointing.checkpoint_schedule import CheckpointCallback, best_interval
from finetune_trainer.export.bundle import make_bundle
from finetune_trainer.job.context import Context
from finetune_trainer.process.errors import InfrastructureError, Stopped, UserError
from finetune_trainer.stages.check import check
from finetune_trainer.stages.publish import publish
from finetune_trainer.training.memory import ModelShape
from finetune_trainer.training.plan import make_plan
from tests.factory import MINIMAL, merged


def checkpoint(root: Path, step: int, *, seal: bool = True, world: int = 1) -> Path:
    folder = root / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * step)
    (folder / "global_step" / "optim.pt").write_bytes(b"state")
    if seal:
        checkpoints.write_manifest(folder, world)
    return folder


def newest(root: Path) -> str | None:
    found = checkpoints.find_latest(str(root)).folder
    return Path(found).name if found else None


def test_f18_f19_only_complete_and_undamaged_checkpoints_count(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    checkpoint(tmp_path, 5)
    good = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 15, seal=False)
    (tmp_path / "checkpoint-junk").mkdir()
    found = checkpoints.find_latest(str(tmp_path))
    assert (found.step, found.world_size, found.skipped) == (10, 1, (15,)), "15 was killed while it was written"
    assert not (tmp_path / "checkpoint-15").exists(), "step 15 is written anew, into an empty folder"
    (good / "global_step" / "optim.pt").write_bytes(b"STATE")
    assert newest(tmp_path) == "checkpoint-5", "10 is damaged"
    (tmp_path / "checkpoint-5" / "adapter_model.safetensors").unlink()
    assert newest(tmp_path) is None
    (checkpoint(tmp_path, 4) / checkpoints.MANIFEST).write_text("{")
    assert newest(tmp_path) is None


def test_f10_an_attempt_that_was_replaced_writes_nothing_more(tmp_path: Path) -> None:
    old, new = checkpoints.Fence(str(tmp_path), 1), checkpoints.Fence(str(tmp_path), 2)
    old.claim()
    old.check()
    new.claim()
    new.check()
    with pytest.raises(Stopped, match="attempt 2 has begun"):
        old.check()
    with pytest.raises(Stopped):
        checkpoints.Fence(str(tmp_path), 0).claim()


def test_the_interval_follows_what_a_checkpoint_costs() -> None:
    """Young and Daly: sqrt(2 * cost * MTBF), a day for one node."""
    assert best_interval(1.0, 1) == pytest.approx((2 * 86400) ** 0.5)
    assert best_interval(16.0, 4) == pytest.approx(2 * best_interval(1.0, 1))
    assert best_interval(0.001, 1) == 60 and best_interval(10_000, 1) == 3600


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    class State:
        is_world_process_zero = True
        global_step, max_steps = 0, 100
        best_model_checkpoint = None

    class Arguments:
        world_size = 1

    settings = parse_spec(merged(MINIMAL, checkpoint={"keep": 2})).checkpoint
    callback = CheckpointCallback(settings, str(tmp_path), nodes=1, fence=checkpoints.Fence(str(tmp_path), 0), channel=None)
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path, step, seal=False)
        State.global_step = step
        callback.on_save(Arguments(), State(), None)
        callback.on_train_end(Arguments(), State(), None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    assert checkpoints.latest_step(str(tmp_path)) == 4
    State.best_model_checkpoint = str(tmp_path / "checkpoint-3")
    for step in (5, 6, 7):
        checkpoint(tmp_path, step, seal=False)
        State.global_step = step
        callback.on_save(Arguments(), State(), None)
        callback.on_train_end(Arguments(), State(), None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6", "checkpoint-7"], "and the best one"


@pytest.mark.parametrize(
    ("changes", "parameters", "expected"),
    [
        ({}, 10**8, ("ddp", 8, 2)),
        ({"distribution": {"nodes": 2, "gpusPerNode": 8}, "tuning": {"hyperparameters": {"globalBatchSize": 64}}}, 10**8, ("ddp", 4, 1)),
        ({"distribution": {"nodes": 2, "gpusPerNode": 1}, "tuning": {"method": "full"}}, 10**8, ("deepspeed-zero2", 8, 1)),
        ({"distribution": {"nodes": 2, "gpusPerNode": 1}, "tuning": {"method": "full"}}, 10**10, ("deepspeed-zero3", 8, 1)),
        ({"distribution": {"gpusPerNode": 0, "strategy": "deepspeed-zero1", "perDeviceBatchSize": 2}}, 10**8, ("deepspeed-zero1", 2, 8)),
        ({"distribution": {"gpusPerNode": 1, "strategy": "fsdp"}}, 10**8, ("ddp", 8, 2)),
        ({"tuning": {"hyperparameters": {"globalBatchSize": 22}}, "distribution": {"nodes": 2, "gpusPerNode": 1}}, 1, ("ddp", 1, 11)),
    ],
)
def test_the_plan_keeps_the_global_batch(changes: dict[str, Any], parameters: int, expected: tuple[str, int, int]) -> None:
    spec = parse_spec(merged(MINIMAL, **changes))
    plan = make_plan(spec, 1000, ModelShape(parameters, parameters // 100, parameters, 64, 2, 64, 128, 400))
    assert (plan.strategy, plan.per_device_batch_size, plan.gradient_accumulation) == expected
    assert plan.world_size * plan.per_device_batch_size * plan.gradient_accumulation == spec.tuning.hyperparameters.global_batch_size


class Shelf:
    """A finished job that wants to publish."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "published").mkdir()

    def context(self, uid: str = "11111111-a", path: str = "team/model", name: str = "j", **blocks: Any) -> Context:
        spec = parse_spec(merged(MINIMAL, **{"publish": [{"uri": f"pvc://published/{path}"}], **blocks}))
        job = JobFile(name=name, namespace="n", uid=uid, spec=spec, targets={"pvc://published": str(self.folder / "published")})
        context = Context(job, str(self.folder / "workspace"))
        output = Path(context.layout.output)
        (output / "adapter_model.safetensors").write_bytes(b"weights")
        (output / "adapter_config.json").write_text('{"base_model_name_or_path": "/sources/pvc/models/tiny"}')
        (output / "training_args.bin").write_bytes(b"pickle")
        context.write_json(
            context.layout.data_report, {"dataset": {"train": 9, "eval": 1, "tokens": 99, "format": "text", "digest": "sha256:0"}}
        )
        context.write_json(context.layout.reference("model"), {"uri": "pvc://models/tiny", "fingerprint": "sha256:1", "path": "/x"})
        return context


def forms_are_restored(monkeypatch: pytest.MonkeyPatch, context: Callable[..., Context]) -> None:
    """What a job has exported is told of the job that it is made again as, too. The export is played: it would load the model."""
    form = ExportedForm(name="onnx", bytes=7, state="Verified", probes=8, nearer=8, equal_answers=7, difference=0.01, distance=0.5)
    played = ModuleType("forms")
    monkeypatch.setattr(played, "export", lambda context, bundle: [form], raising=False)
    monkeypatch.setitem(sys.modules, "finetune_trainer.export.forms", played)
    result = publish(context(output={"onnx": ["q4"]}))
    assert result.result["forms"] == [form.to_wire()]
    found = check(context(output={"onnx": ["q4"]}, uid="22222222-b"))
    assert (found.reason, found.result) == ("Restored", result.result)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def test_what_is_published(shelf: Shelf) -> None:
    result = publish(shelf.context())
    target = shelf.folder / "published" / "team" / "model"
    assert sorted(p.name for p in target.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "adapter_config.json",
        "adapter_model.safetensors",
        "finetune.json",
    ]
    assert json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"] == "pvc://models/tiny"
    assert "Not evaluated" in (target / "README.md").read_text()
    assert json.loads((target / "finetune.json").read_text())["job"]["uid"] == "11111111-a"
    assert result.result["artifacts"][0]["uri"] == "pvc://published/team/model"
    assert [p.name for p in target.parent.iterdir()] == ["model"], "nothing half-written is left beside it"


def test_publishing_twice_is_publishing_once(shelf: Shelf) -> None:
    assert publish(shelf.context()) == publish(shelf.context())
    target = shelf.folder / "published" / "team" / "model"
    (target / "adapter_model.safetensors").write_bytes(b"damaged")
    publish(shelf.context())
    assert (target / "adapter_model.safetensors").read_bytes() == b"weights", "its own damaged result is mended"


def test_a21_the_result_of_others_is_never_overwritten(shelf: Shelf) -> None:
    publish(shelf.context())
    for another in ({"name": "k"}, {"tuning": {"method": "dora"}}):
        with pytest.raises(UserError, match=r"holds the result of job n/j \(11111111-a\)"):
            publish(shelf.context(uid="22222222-b", **another))
    foreign = shelf.folder / "published" / "data"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="something that no FineTuneJob published"):
        publish(shelf.context(path="data"))
    assert (foreign / "thesis.tex").exists()


def test_a_target_is_asked_before_gpus_are_taken_and_not_touched(shelf: Shelf) -> None:
    published = shelf.folder / "published"
    assert check(shelf.context()).reason == "TargetsReady"
    assert not list(published.iterdir()), "asking leaves nothing behind"
    publish(shelf.context())
    with pytest.raises(UserError, match=r"team/model: the target holds the result of job n/j .* no GPU was taken") as taken:
        check(shelf.context(uid="22222222-b", tuning={"method": "dora"}))
    assert taken.value.reason == "TargetTaken"
    (published / "file").write_text("x")
    with pytest.raises(InfrastructureError, match=r"file in claim published cannot be written by uid") as refused:
        check(shelf.context(path="file/model"))
    assert refused.value.reason == "TargetNotWritable"


@pytest.mark.parametrize("uid", ["11111111-a", "22222222-b"], ids=["its status was wiped", "made again from a backup"])
def test_a_result_that_is_there_already_is_found(shelf: Shelf, uid: str) -> None:
    """Where every target has it, for the same to make; where and how long it runs does not count."""
    first = publish(shelf.context())
    again = shelf.context(uid=uid, runPolicy={"maxRestarts": 9}, resources={"requests": {"cpu": "4"}})
    found = check(again)
    assert (found.reason, found.result) == ("Restored", first.result)
    both = [{"uri": "pvc://published/team/model"}, {"uri": "pvc://published/team/copy"}]
    half = shelf.context(uid=uid, publish=both)
    assert check(half).reason == "TargetsReady", "it is made again, and may replace what is there"
    assert {a["uri"] for a in publish(half).result["artifacts"]} == {target["uri"] for target in both}
    assert check(half).reason == "Restored"
    (shelf.folder / "published" / "team" / "model" / "SHA256SUMS").unlink()
    assert check(again).reason == "TargetsReady", "what is not whole does not count"


def test_forms_of_a_result_that_is_there_already_are_told(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    forms_are_restored(monkeypatch, shelf.context)
    lineage = shelf.folder / "published" / "team" / "model" / "finetune.json"
    lineage.write_text(json.dumps({**json.loads(lineage.read_text()), "forms": [{"name": 3}]}))
    found = check(shelf.context(output={"onnx": ["q4"]}))
    assert found.reason == "Restored" and "forms" not in found.result, "a record that says nothing of use"


def test_a_result_that_is_on_the_hub_already_is_found(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = create_autospec(HfApi, instance=True)
    monkeypatch.setattr("finetune_trainer.export.hub.HfApi", lambda token: hub)
    context = shelf.context(publish=[{"uri": "hf://org/m", "secretRef": {"name": "w"}}])
    bundle = make_bundle(context)
    form = ExportedForm(name="onnx", bytes=7).to_wire()
    (bundle / "finetune.json").write_text(json.dumps({**json.loads((bundle / "finetune.json").read_text()), "forms": [form]}))
    hub.file_exists.return_value = True
    hub.hf_hub_download.side_effect = lambda name, file, cache_dir: str(bundle / file)
    hub.model_info.return_value.siblings = [SimpleNamespace(size=7), SimpleNamespace(size=None)]
    found = check(context)
    digest = f"sha256:{hashlib.sha256((bundle / 'SHA256SUMS').read_bytes()).hexdigest()}"
    assert found.reason == "Restored" and found.result["artifacts"] == [{"uri": "hf://org/m", "digest": digest, "bytes": 7}]
    assert found.result["forms"] == [form]


def test_a_result_on_the_hub_is_one_commit_that_is_read_back(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = create_autospec(HfApi, instance=True)  # knows what the library's client has, and nothing else
    hub.file_exists.return_value = False
    monkeypatch.setattr("finetune_trainer.export.hub.HfApi", lambda token: hub)
    local = shelf.context()
    spec = parse_spec(merged(MINIMAL, publish=[{"uri": "hf://org/m", "secretRef": {"name": "w"}}]))
    context = Context(local.job.model_copy(update={"spec": spec}), local.workspace)
    hub.list_repo_files.return_value = ["README.md", "adapter_config.json", "adapter_model.safetensors", "finetune.json", "SHA256SUMS"]
    assert publish(context).result["artifacts"][0]["uri"] == "hf://org/m"
    assert hub.create_repo.call_args.kwargs["private"] and hub.upload_folder.call_count == 1
    hub.list_repo_files.return_value = ["README.md"]
    with pytest.raises(InfrastructureError, match=r"not uploaded: .*adapter_model\.safetensors") as found:
        publish(context)
    assert found.value.reason == "VerificationFailed"


def test_the_hub_is_asked_with_the_token_that_publishes(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    answers: dict[str, Any] = {"exists": False, "role": "write"}

    class Hub:
        def __init__(self, token: str | None) -> None:
            asked.append(token)

        def file_exists(self, name: str, file: str) -> bool:
            return bool(answers["exists"])

        def hf_hub_download(self, name: str, file: str, cache_dir: str) -> str:
            (shelf.folder / "lineage.json").write_text(json.dumps({"job": {"uid": "other", "namespace": "b", "name": "x"}}))
            return str(shelf.folder / "lineage.json")

        def whoami(self) -> dict[str, Any]:
            if isinstance(answers["role"], Exception):
                raise answers["role"]
            return {"auth": {"accessToken": {"role": answers["role"]}}}

    monkeypatch.setattr("finetune_trainer.export.hub.HfApi", Hub)
    spec = parse_spec(merged(MINIMAL, publish=[{"uri": "hf://org/m", "secretRef": {"name": "w"}}]))
    (shelf.folder / "token").write_text("hf_write\n")
    job = JobFile(name="j", namespace="n", uid="1", spec=spec, secrets={"publish-0": str(shelf.folder)})
    context = Context(job, str(shelf.folder / "workspace"))
    assert check(context).message == "hf://org/m" and asked == ["hf_write"]
    answers["role"] = OSError("no such endpoint on this mirror")
    assert check(context).reason == "TargetsReady"
    answers["role"] = "read"
    with pytest.raises(UserError, match="hf://org/m: the token may only read"):
        check(context)
    answers["exists"] = True
    with pytest.raises(UserError, match="the target holds the result of job b/x"):
        check(context)


def test_a21_a_link_out_of_the_volume_is_refused(shelf: Shelf) -> None:
    outside = shelf.folder / "outside"
    outside.mkdir()
    (shelf.folder / "published" / "team").symlink_to(outside)
    with pytest.raises(UserError, match="leads out of the volume"):
        publish(shelf.context())
    assert not list(outside.iterdir())


def test_f28_an_interrupted_publish_is_taken_up_again(shelf: Shelf) -> None:
    aside = shelf.folder / "published" / "team" / ".model.11111111.partial"
    aside.mkdir(parents=True)
    (aside / "half").write_text("x")
    publish(shelf.context())
    assert not aside.exists()


def test_nothing_to_publish(shelf: Shelf) -> None:
    context = shelf.context()
    shutil.rmtree(context.layout.output)
    Path(context.layout.output).mkdir()
    with pytest.raises(InfrastructureError, match="no .safetensors file"):
        publish(context)
