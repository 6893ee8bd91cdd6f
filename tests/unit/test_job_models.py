"""Jobs that publish to a FineTunedModel, or go on from one: what they wait for, what they mount, and when they have succeeded."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from finetune_api.contract import JobFile, StageResult
from finetune_api.status import ModelInUse
from finetune_api.validation import parse_spec
from finetune_operator.model.tuned_model import TunedModel, tuned_model
from finetune_operator.reconcile.job.immutability import may_have_changed
from finetune_operator.resources.common import job_file
from finetune_operator.resources.gang import worker
from finetune_operator.resources.stage import stage_job
from tests.factory import COMPARED, MINIMAL, NOW, PUBLISHED, TRAINED, merged, ref, stamp
from tests.unit.test_reconcile import World
from tests.unit.test_resources import PARSED, SETTINGS

EVALUATED = merged(
    MINIMAL,
    dataset={"train": {"uri": "configmap://rows/train.jsonl"}, "eval": {"splitFraction": 0.1}},
    evaluation={},
    publish=[{"model": "bot"}],
)
S3 = {"storage": "s3://models/bot", "secretRef": {"name": "keys"}, "s3Endpoint": "http://minio:9000"}


def model(champion: int | None = None, *numbers: int, name: str = "bot", spec: dict[str, Any] | None = None, **meta: Any) -> TunedModel:
    versions = [{"number": n, "job": f"job-{n}", "digest": f"sha256:{n}"} for n in numbers]
    status = {"champion": champion, "versions": versions}
    return tuned_model({"metadata": {"name": name, **meta}, "spec": spec or {"storage": "pvc://models/bot"}, "status": status})


def published(version: int = 4, storage: str = "pvc://models/bot") -> StageResult:
    artifact = {"uri": f"{storage}/versions/{version}", "digest": "sha256:44", "bytes": 9, "model": "bot", "version": version, "rank": 8}
    return StageResult(reason="Published", message="published", result={"artifacts": [artifact]})


def world(spec: dict[str, Any], *models: TunedModel) -> World:
    found = World(spec)
    found.handed["models"] = {m.name: m for m in models}
    return found


def condition(found: World, type_: str) -> tuple[str, str, str]:
    known = found.status.condition(type_)
    assert known is not None, found.status
    return known.status, known.reason, known.message


def test_a_job_waits_for_its_model_before_any_gpu() -> None:
    found = world(EVALUATED)
    found.settle()
    status, reason, message = condition(found, "TargetsReady")
    assert (status, reason) == ("False", "ModelNotFound") and message.startswith("publish[].model: there is no FineTunedModel bot")
    assert not found.jobs and not found.applied and found.status.phase == "Pending" and found.events.count("ModelNotFound") == 1
    found.handed["models"] = {"bot": model()}
    found.step()
    assert not found.jobs, "what was found is put on record first"
    assert [(m.name, m.storage) for m in found.status.models] == [("bot", "pvc://models/bot")]
    found.settle()
    assert set(found.jobs) == {"support-check-0", "support-prepare-0"} and found.status.condition("TargetsReady").reason != "ModelNotFound"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("uri", "found", "says"),
    [
        ("model://old", None, "there is no FineTunedModel old"),
        ("model://old", model(None, 1, name="old"), "has no champion yet; name a version (model://old@VERSION)"),
        ("model://old@7", model(1, 1, 2, name="old"), "keeps no version 7 (kept: 1, 2)"),
        ("model://old@1", model(1, 1, name="old", deletionTimestamp=stamp(NOW)), "is being deleted"),
        ("model://old@1", model(1, 1, name="old", spec={"storage": "ftp://x"}), "is not valid; its condition Ready says why"),
    ],
)
def test_what_training_goes_on_from_is_waited_for(uri: str, found: TunedModel | None, says: str) -> None:
    waits = world(merged(MINIMAL, tuning={"continueFrom": uri}), *([found] if found is not None else []))
    waits.settle()
    status, reason, message = condition(waits, "DataReady")
    assert (status, reason) == ("False", "ModelNotFound") and message.startswith("tuning.continueFrom: ") and says in message
    assert not waits.jobs


def test_the_version_to_go_on_from_is_decided_once() -> None:
    """The champion of the beginning: whatever becomes of the model, the running job and its job.json stay the same."""
    spec = merged(EVALUATED, tuning={"continueFrom": "model://bot"})
    found = world(spec, model(2, 1, 2))
    found.settle()
    assert found.status.models[0].version == 2
    first = dict(found.applied)
    found.handed["models"] = {"bot": model(1, 1, 2, spec=S3)}
    found.settle()
    assert found.applied == first and found.status.models[0].storage == "pvc://models/bot"
    lost = world(spec, model(1, 1, 2))
    lost.handed["continues_from"] = 2
    lost.settle()
    assert lost.status.models[0].version == 2, "of a job whose status was lost job.json says it"


def test_a_version_that_was_left_open_is_no_change_of_the_spec() -> None:
    spec = merged(MINIMAL, tuning={"continueFrom": "model://old"})
    found = world(spec, model(2, 2, 5, name="old"))
    found.settle()
    kept = parse_spec(merged(MINIMAL, tuning={"continueFrom": "model://old@2"}))
    for uri, reason in (("model://old", "Valid"), ("model://old@2", "Valid"), ("model://old@5", "ChangeIgnored")):
        found.job["spec"] = merged(MINIMAL, tuning={"continueFrom": uri})
        found.job["metadata"]["generation"] += 1
        assert may_have_changed(found.job)
        found.handed["accepted"] = kept
        found.step()
        assert condition(found, "Accepted")[:2] == ("True", reason), uri
        assert found.status.models[0].version == 2


def test_a_job_has_succeeded_when_its_version_is_on_record() -> None:
    found = world(EVALUATED, model(3, 3))
    found.to_training()
    found.succeed("worker", TRAINED)
    found.settle()
    env = {e["name"]: e.get("value") for e in found.made["support-evaluate-0"]["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert json.loads(env["FINETUNE_CHAMPION"]) == {"model": "bot", "number": 3, "digest": "sha256:3", "ancestors": []}
    found.succeed("evaluate", COMPARED)
    found.settle()
    found.succeed("publish", published())
    found.settle()
    status, reason, message = condition(found, "Succeeded")
    assert (status, reason) == ("Unknown", "RecordingVersion") and "version 4 of FineTunedModel bot" in message
    assert found.status.artifacts[0].version == 4 and found.status.finished_at is None
    for other, says in ((None, "is gone"), (model(3, 3, spec=S3), "keeps its versions at s3://models/bot now")):
        found.handed["models"] = {"bot": other} if other is not None else {}
        found.settle()
        assert says in condition(found, "Succeeded")[2] and found.status.finished_at is None
    found.handed["models"] = {"bot": model(3, 3, 4)}
    found.settle()
    assert found.status.phase == "Succeeded" and condition(found, "Succeeded")[1] == "Completed"


@pytest.mark.parametrize("removed", [False, True])
def test_a_restored_job_waits_for_its_model_too(removed: bool) -> None:
    found = world(EVALUATED, model())
    found.settle()
    found.succeed("check", StageResult(reason="Restored", message="there already", result=published().result))
    found.settle()
    assert condition(found, "Succeeded")[:2] == ("Unknown", "RecordingVersion") and found.status.finished_at is None
    assert set(found.jobs) == {"support-check-0"}, "prepare is stopped, and nothing begins meanwhile"
    known = model(None, *(() if removed else (4,)))
    if removed:
        known.status.storage.removed = [4]
    found.handed["models"] = {"bot": known}
    found.settle()
    assert (found.status.phase, condition(found, "Succeeded")[1]) == ("Succeeded", "Restored")


def test_a_job_without_models_asks_for_none() -> None:
    found = world(merged(EVALUATED, publish=[{"uri": "pvc://published/support"}]), model(3, 3))
    found.to_training()
    found.succeed("worker", TRAINED)
    found.settle()
    assert "FINETUNE_CHAMPION" not in json.dumps(found.made["support-evaluate-0"])
    found.succeed("evaluate", COMPARED)
    found.settle()
    found.succeed("publish", PUBLISHED)
    found.settle()
    assert found.status.phase == "Succeeded" and not found.status.models


# what is mounted


def mounted(spec: dict[str, Any], *storages: dict[str, Any]) -> tuple[JobFile, dict[str, dict[str, Any]]]:
    """job.json, and by stage what of the models is mounted where: read-only or not."""
    job = dataclasses.replace(ref(spec), models=tuple(_used(s) for s in storages))
    pods = {stage: stage_job(job, SETTINGS, stage, 0)["spec"]["template"]["spec"] for stage in ("prepare", "check", "evaluate", "publish")}  # type: ignore[arg-type]
    pods["train"] = worker(job, SETTINGS, PARSED, 0, 0)["spec"]
    found = {}
    for stage, pod in pods.items():
        names = {v["name"] for v in pod["volumes"] if _is_models(v)}
        found[stage] = {m["mountPath"]: m.get("readOnly", False) for m in pod["containers"][0]["volumeMounts"] if m["name"] in names}
        assert all(len(name) <= 63 for name in names)
    return job_file(job), found


def _used(storage: dict[str, Any]) -> ModelInUse:
    return ModelInUse.model_validate(storage)


def _is_models(volume: dict[str, Any]) -> bool:
    return volume.get("persistentVolumeClaim", {}).get("claimName") == "store" or volume.get("secret", {}).get("secretName") == "keys"


NAME = "b" * 250 + ".x"


@pytest.mark.parametrize(
    ("spec", "storage", "wanted"),
    [
        (
            {"publish": [{"model": "bot"}]},
            {"name": "bot", "storage": "pvc://store/bot"},
            {
                "prepare": {},
                "train": {},
                "check": {"/targets/pvc/store": False},
                "evaluate": {"/sources/pvc/store": True},
                "publish": {"/targets/pvc/store": False},
            },
        ),
        (
            {"tuning": {"continueFrom": "model://bot@2"}},
            {"name": "bot", "storage": "pvc://store/bot", "version": 2},
            {"check": {}, **{stage: {"/sources/pvc/store": True} for stage in ("prepare", "train", "evaluate", "publish")}},
        ),
        (
            {"publish": [{"model": NAME}]},
            {"name": NAME, "storage": "s3://bucket/bot", "secret": "keys"},
            {
                "prepare": {},
                "train": {},
                **{s: {f"/var/run/finetune/secrets/model-{NAME}": True} for s in ("check", "evaluate", "publish")},
            },
        ),
        (
            {"tuning": {"continueFrom": "model://bot@2"}},
            {"name": "bot", "storage": "s3://bucket/bot", "secret": "keys", "version": 2},
            {"prepare": {"/var/run/finetune/secrets/model-bot": True}, **{s: {} for s in ("check", "train", "evaluate", "publish")}},
        ),
    ],
)
def test_a_models_storage_reaches_the_stages_that_need_it_alone(
    spec: dict[str, Any], storage: dict[str, Any], wanted: dict[str, dict[str, bool]]
) -> None:
    """Writable where versions are added, with the keys of a bucket; and job.json says where."""
    file, found = mounted(merged(EVALUATED, **{"publish": [], **spec}), storage)
    assert found == wanted
    name = storage["name"]
    assert file.models[name].storage == storage["storage"]
    folders = {*file.sources.values(), *file.targets.values(), *file.secrets.values()}
    assert {folder for mounts in wanted.values() for folder in mounts} <= folders
    assert file.secrets.get(f"model-{name}") == (f"/var/run/finetune/secrets/model-{name}" if "secret" in storage else None)
