"""FineTunedModels: which versions there are, who becomes the champion, what is kept, and what the storage is told. Pure."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import kubernetes_validate
import pytest

from finetune_api.contract import CatalogFile, CatalogReport
from finetune_api.evaluation_status import ChampionComparison, EvaluationStatus
from finetune_api.lenient import read
from finetune_api.tuned_model import FineTunedModelSpec, FineTunedModelStatus, ModelVersion, Retention
from finetune_api.versions import BaseModelReference, VersionJob, VersionRecord
from finetune_operator.model.children import job_view
from finetune_operator.model.job import ChildJobView, PodView
from finetune_operator.model.tuned_model import ObservedModel, Serving, tuned_model
from finetune_operator.reconcile.plan import Apply, Create, Delete, Plan
from finetune_operator.reconcile.tuned_model import reconcile
from finetune_operator.reconcile.tuned_model.champion import decide
from finetune_operator.reconcile.tuned_model.retention import outdated
from finetune_operator.reconcile.tuned_model.versions import flat, version_of_job
from finetune_operator.settings import Settings
from tests.factory import COMPARED, MINIMAL, NOW, after, job, merged, stamp

STORAGE = "pvc://models/bot"
SETTINGS = Settings(progress_url="https://operator:8443", network_policies=True)


def compared(result: str, version: int, **more: Any) -> EvaluationStatus:
    found = ChampionComparison.model_validate({"version": version, "prompts": 40, "metric": "loss", "result": result, **more})
    return EvaluationStatus(gate="Passed", champion=found)


def version(number: int, state: str = "Candidate", evaluation: EvaluationStatus | None = None, **more: Any) -> ModelVersion:
    return ModelVersion.model_validate(
        {"number": number, "state": state, "job": f"job-{number}", "evaluation": evaluation.to_wire() if evaluation else None, **more}
    )


# who is the champion

FIRST, SECOND = version(1, "Champion"), version(2)
TABLE: list[tuple[str, str, int | None, list[ModelVersion], int | None, dict[int, str], str]] = [
    # name, promotion, pin, versions, champion then, states then, said of the newest
    ("the first", "OnImprovement", None, [version(1)], 1, {1: "Champion"}, "first version"),
    ("no gate passed", "OnImprovement", None, [version(1, evaluation=EvaluationStatus(gate="NotPassed"))], None, {1: "Candidate"}, "gate"),
    ("better", "OnImprovement", None, [FIRST, version(2, evaluation=compared("Passed", 1, improvement=0.25, interval=[0.1, 0.4]))],
     2, {1: "Retired", 2: "Champion"}, "measurably better: loss differs by 0.25 (0.1 to 0.4) from version 1 on 40"),
    ("not better", "OnImprovement", None, [FIRST, version(2, evaluation=compared("NotPassed", 1))], 1, {2: "Rejected"}, "not better"),
    ("too few prompts", "OnImprovement", None, [FIRST, version(2, evaluation=compared("Inconclusive", 1, message="12 of 30 prompts"))],
     1, {2: "Candidate"}, "12 of 30 prompts; to promote it set spec.champion: 2"),
    ("compared with another", "OnImprovement", None,
     [version(1, "Retired"), version(2, "Champion"), version(3, evaluation=compared("Passed", 1))], 2, {3: "Candidate"}, "compared with version 1, and"),
    ("two at once", "OnImprovement", None,
     [FIRST, version(2, evaluation=compared("Passed", 1)), version(3, evaluation=compared("Passed", 1))],
     2, {1: "Retired", 2: "Champion", 3: "Candidate"}, "version 2 is the champion now"),
    ("not compared", "OnImprovement", None, [FIRST, SECOND], 1, {2: "Candidate"}, "no evaluation"),
    ("by hand", "Manual", None, [FIRST, version(2, evaluation=compared("Passed", 1))], 1, {2: "Candidate"}, "Manual; to promote it set spec.champion: 2"),
    ("always", "Always", None, [FIRST, version(2), version(3)], 3, {1: "Retired", 2: "Retired", 3: "Champion"}, "Always"),
    ("always, an older one", "Always", None, [version(1), version(2, "Champion")], 2, {1: "Candidate"}, ""),
    ("what was rejected stays so", "Always", None, [FIRST, version(2, "Rejected")], 1, {}, ""),
    ("pinned back", "Always", 1, [version(1, "Retired"), version(2, "Champion"), version(3)],
     1, {1: "Champion", 2: "Retired", 3: "Candidate"}, "spec.champion pins version 1"),
    ("pinned though rejected", "OnImprovement", 2, [FIRST, version(2, "Rejected")], 2, {1: "Retired", 2: "Champion"}, "spec.champion names it"),
    ("unpinned: what was rolled back from does not come again", "Always", None, [FIRST, version(2, "Retired")], 1, {}, ""),
    ("a pin that is not kept", "Always", 7, [FIRST, SECOND], 1, {2: "Candidate"}, "version 7, which is not kept"),
    ("a write of two states broke off", "Manual", None, [version(1, "Champion"), version(2, "Champion")], 2, {1: "Retired"}, ""),
    ("none yet", "OnImprovement", None, [], None, {}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "promotion", "pin", "versions", "champion", "states", "said"), TABLE, ids=[row[0] for row in TABLE])
def test_champions(
    name: str, promotion: Any, pin: int | None, versions: list[ModelVersion], champion: int | None, states: dict[int, str], said: str
) -> None:
    spec = FineTunedModelSpec(storage=STORAGE, promotion=promotion, champion=pin)
    now = max((v.number for v in versions if v.state == "Champion"), default=None)
    found = decide(now, versions, spec)
    assert found.champion == champion and {n: state for n, (state, _) in found.states.items()} == states
    assert said in (found.states[max(found.states)][1] if found.states else "")
    assert found.pin_missing == (name == "a pin that is not kept")
    after_it = [
        v.model_copy(update=dict(zip(("state", "message"), found.states.get(v.number, (v.state, v.message)), strict=True)))
        for v in versions
    ]
    again = decide(found.champion, after_it, spec)
    assert again.champion == champion, "deciding again decides nothing else"
    assert all(v.state == again.states.get(v.number, (v.state, ""))[0] for v in after_it)


@pytest.mark.parametrize(
    ("retention", "protected", "gone"),
    [
        ({"versions": 2}, set(), [1, 2, 3]),
        ({"versions": 2}, {1, 3}, [2]),
        ({"versions": 5}, set(), []),
        ({"versions": 5, "age": "2d"}, {3}, [1, 2]),
        ({"versions": 4, "age": "4d"}, {1}, []),
        ({"versions": 3, "age": "1h"}, {2}, [1, 3, 4, 5]),
    ],
)
def test_retention(retention: dict[str, Any], protected: set[int], gone: list[int]) -> None:
    """By number and by age; never what is protected."""
    versions = [version(n, createdAt=stamp(after(-86_400 * (5 - n) - 3601))) for n in range(1, 6)]
    assert outdated(versions, Retention.model_validate(retention), protected, NOW) == gone


def test_a_status_has_room_for_what_is_kept() -> None:
    versions = [version(n) for n in range(1, 103)]
    gone = outdated(versions, Retention(versions=100), {1}, NOW)
    assert gone == [2, 3], "one hundred are left, the protected one among them"


@pytest.mark.parametrize(("method", "wanted", "merged_there"), [("lora", True, True), ("lora", False, False), ("full", True, False)])
def test_a_merged_model_beside_the_adapter_is_known(method: str, wanted: bool, merged_there: bool) -> None:
    artifact = {"uri": "pvc://c/bot/versions/1", "digest": "sha256:1", "bytes": 1, "model": "bot", "version": 1, "rank": 8}
    spec = merged(MINIMAL, tuning={"method": method}, output={"merged": wanted})
    version = version_of_job(job(spec, {"artifacts": [artifact]}), "bot", 1)
    assert version is not None and version.merged is merged_there


def test_settings_are_flat_and_bounded() -> None:
    wire = {"method": "lora", "lora": {"rank": 8, "alpha": None, "targets": ["q", "v"]}, "packing": True}
    assert flat(wire) == {"lora.rank": "8", "lora.targets": '["q", "v"]', "method": "lora", "packing": "true"}
    assert len(flat({f"k{n:03}": n for n in range(500)})) == 128


# a whole life


class Scene:
    """Carries plans out, as the writer would, and plays the catalog pods."""

    def __init__(self, settings: Settings = SETTINGS, **spec: Any) -> None:
        meta = {"name": "bot", "namespace": "team-a", "uid": "uid-bot", "generation": 1}
        self.raw: dict[str, Any] = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTunedModel", "metadata": meta}
        self.raw["spec"] = {"storage": STORAGE, **spec}
        self.settings, self.now = settings, NOW
        self.jobs: dict[str, dict[str, Any]] = {}
        self.serving: tuple[Serving, ...] = ()
        self.catalogs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, PodView] = {}
        self.applied: dict[tuple[str, str], dict[str, Any]] = {}
        self.records: dict[int, VersionRecord] = {}
        self.report: CatalogReport | None = None
        self.reported_by = ""
        self.events: list[str] = []
        self.runs = 0

    @property
    def status(self) -> FineTunedModelStatus:
        return read(FineTunedModelStatus, self.raw.get("status"))

    def observed(self) -> ObservedModel:
        return ObservedModel(
            raw=copy.deepcopy(self.raw),
            jobs=tuple(self.jobs.values()),
            serving=self.serving,
            catalogs=tuple(map(_seen, self.catalogs.values())),
            pods=tuple(self.pods.values()),
            applied={key: m["metadata"]["annotations"]["finetune.dev/applied-hash"] for key, m in self.applied.items()},
            report=self.report,
            reported_by=self.reported_by,
            now=self.now,
        )

    def once(self, *, dies: int | None = None) -> Plan[FineTunedModelStatus]:
        """One pass; with `dies` only so many of its writes are carried out."""
        plan = reconcile(self.observed(), self.settings)
        writes = [*sorted(plan.actions, key=lambda a: not isinstance(a, Apply)), *([plan.status] if plan.status is not None else [])]
        for write in writes[:dies]:
            if isinstance(write, Apply):
                self.applied[write.manifest["kind"], write.manifest["metadata"]["name"]] = write.manifest
            elif isinstance(write, Create):
                self.catalogs.setdefault(write.manifest["metadata"]["name"], write.manifest)
            elif isinstance(write, Delete):
                self.catalogs.pop(write.name, None)
                self.pods.pop(write.name, None)
            elif isinstance(write, FineTunedModelStatus):
                self.raw["status"] = write.to_wire()
        if dies is None or dies >= len(writes):
            self.events += [f"{e.reason}: {e.message}" for e in plan.events if plan.status is not None]
            self.report = None
        return plan

    def rest(self, *, fails: bool = False) -> FineTunedModelStatus:
        """Until nothing is left to do; catalog pods do their work meanwhile, or fail."""
        for _ in range(30):
            before = (copy.deepcopy(self.raw.get("status")), set(self.catalogs))
            self.once()
            played = self.play(fails=fails)
            if not played and (self.raw.get("status"), set(self.catalogs)) == before:
                return self.status
            if fails and played:
                self.once()
                return self.status
        raise AssertionError("it comes to no rest")

    def play(self, *, fails: bool = False) -> bool:
        """The catalog pod that is due, as the trainer's stage does it."""
        due = [name for name in self.catalogs if name not in self.pods]
        for name in due:
            self.runs += 1
            words = '{"reason": "StorageRefused", "message": "access denied to bucket"}' if fails else ""
            phase = "Failed" if fails else "Succeeded"
            self.pods[name] = PodView(
                name=f"{name}-x",
                uid=f"pod-{name}",
                stage="catalog",
                job_uid=f"uid-{name}",
                phase=phase,
                running=True,
                created=NOW,
                message=words,
            )
            if not fails:
                self.carry_out(name)
        return bool(due)

    def carry_out(self, name: str) -> None:
        file = CatalogFile.model_validate_json(self.applied["ConfigMap", "bot-catalog"]["data"]["model.json"])
        for number, record in self.records.items():
            changes: dict[str, Any] = {"state": file.states[number]} if number in file.states else {}
            if number in file.remove and record.removed_at is None:
                changes["removed_at"] = stamp(self.now)
            self.records[number] = record.model_copy(update=changes)
        self.report, self.reported_by = CatalogReport(done=file.digest, records=list(self.records.values())), name

    def publish(self, number: int, result: str | None = None, against: int = 0, *, ended: bool = False, record: bool = True) -> None:
        """A job adds a version, as its publish pod does."""
        evaluation = {**COMPARED.result}
        if result is not None:
            evaluation["champion"] = {"version": against, "prompts": 50, "metric": "loss", "result": result}
        uri = f"{STORAGE}/versions/{number}"
        status = {
            "artifacts": [{"uri": uri, "digest": f"sha256:{number:02}", "bytes": 10, "model": "bot", "version": number, "rank": 8}],
            "evaluation": evaluation,
            "base": {"uri": "hf://org/base", "revision": "abc", "fingerprint": "f"},
            **({"finishedAt": stamp(NOW)} if ended else {}),
        }
        spec = merged(MINIMAL, publish=[{"model": "bot"}], tuning={"method": "lora", "lora": {"rank": 8}})
        self.jobs[f"job-{number}"] = job(spec, status, name=f"job-{number}", uid=f"uid-job-{number}")
        if record:
            self.records[number] = VersionRecord(
                number=number,
                job=VersionJob(name=f"job-{number}", uid=f"uid-job-{number}"),
                uri=uri,
                digest=f"sha256:{number:02}",
                bytes=10,
                base=BaseModelReference(uri="hf://org/base"),
                created_at=stamp(self.now),
                evaluation=EvaluationStatus.model_validate(evaluation),
                tuning=spec["tuning"],
            )

    def end(self, number: int) -> None:
        self.jobs[f"job-{number}"]["status"]["finishedAt"] = stamp(NOW)

    def states(self) -> dict[int, str]:
        return {v.number: v.state for v in reversed(self.status.versions)}


def _seen(manifest: dict[str, Any]) -> ChildJobView:
    meta = manifest["metadata"]
    return job_view({"metadata": {**meta, "uid": f"uid-{meta['name']}"}, "spec": manifest["spec"]})


def condition(status: FineTunedModelStatus, type_: str) -> tuple[str, str]:
    found = status.condition(type_)
    assert found is not None
    return found.status, found.reason


def test_from_the_first_version_to_the_second_champion() -> None:
    scene = Scene()
    status = scene.rest()
    assert condition(status, "StorageReady") == ("True", "Synced") and condition(status, "Ready") == ("False", "NoVersions")
    scene.publish(1)
    status = scene.rest()
    assert (status.champion, status.latest, status.count, status.score) == (1, 1, 1, "loss 1 (base 2)")
    assert condition(status, "Ready") == ("True", "HasChampion") and scene.records[1].state == "Champion"
    found = status.version(1)
    assert found is not None and (found.job, found.digest, found.rank, found.settings["lora.rank"]) == ("job-1", "sha256:01", 8, "8")
    assert found.base is not None and found.base.revision == "abc" and found.promoted_at
    scene.publish(2, "Passed", against=1)
    scene.serving = (Serving(endpoint="chat", answers=True, versions=frozenset({1})),)
    status = scene.rest()
    assert scene.states() == {1: "Retired", 2: "Champion"} == {n: r.state for n, r in scene.records.items()}
    assert status.served == ["chat"]
    told = [event.split(":")[0] for event in scene.events]
    assert told == ["VersionAdded", "Promoted", "VersionAdded", "Promoted"], scene.events
    assert scene.runs == 3, "one catalog for the first look, one for each decision"
    assert scene.once().status is None and scene.once().actions == (), "at rest nothing is written"


def test_a_pin_rolls_back_and_says_who_set_it() -> None:
    scene = Scene(promotion="Always")
    for number in (1, 2):
        scene.publish(number)
        scene.rest()
    scene.raw["spec"]["champion"] = 1
    scene.raw["metadata"]["generation"] = 2
    entry = {"manager": "argocd", "time": stamp(NOW), "fieldsV1": {"f:spec": {"f:champion": {}}}}
    scene.raw["metadata"]["managedFields"] = [
        {"manager": "kubectl", "time": stamp(after(-9)), "fieldsV1": {"f:spec": {"f:champion": {}}}},
        entry,
    ]
    status = scene.rest()
    assert status.champion == 1 and scene.states() == {1: "Champion", 2: "Retired"}
    assert scene.events[-1] == "RolledBack: version 1 took over from 2: spec.champion names it, set by argocd"
    scene.raw["spec"]["champion"] = 9
    status = scene.rest()
    assert status.champion == 1 and condition(status, "Ready") == ("False", "VersionNotFound")
    assert "(kept: 1, 2); version 1 stays the champion" in status.condition("Ready").message  # type: ignore[union-attr]


def test_what_is_not_kept_goes_with_its_files_and_does_not_come_back() -> None:
    scene = Scene(promotion="Always", retention={"versions": 1})
    scene.serving = (Serving(endpoint="chat", answers=True, versions=frozenset({1})),)
    for number in (1, 2, 3, 4):
        scene.publish(number)
        scene.rest()
        scene.end(number)
    scene.rest()
    assert scene.states() == {1: "Retired", 4: "Champion"}, "one is served, one is the champion"
    assert {n for n, r in scene.records.items() if r.removed_at} == {2, 3}
    assert scene.status.storage.removed == [2, 3] and not scene.status.storage.removing
    assert any(event.startswith("VersionRemoved: files are removed of 2") for event in scene.events)
    scene.serving = ()
    scene.rest()
    assert scene.states() == {4: "Champion"} and scene.status.storage.highest == 4
    scene.jobs.clear()
    scene.rest()
    assert scene.status.storage.removed == [], "nothing could bring them back any more"


def test_a_version_stays_until_its_job_knows_that_it_is_on_record() -> None:
    scene = Scene(promotion="Always", retention={"versions": 1})
    scene.rest()
    for number in (1, 2):
        scene.publish(number)
    scene.rest()
    assert scene.states() == {1: "Retired", 2: "Champion"}
    scene.end(1)
    scene.rest()
    assert scene.states() == {2: "Champion"} and scene.records[1].removed_at


def test_a_new_object_has_the_versions_that_are_there() -> None:
    """Also while jobs that have ended are still there, of which one's version was removed, and one is publishing just now."""
    scene = Scene()
    for number, result in ((1, None), (2, "Passed"), (3, "NotPassed")):
        scene.publish(number, result, against=number - 1)
        scene.rest()
        scene.end(number)
    before = scene.states()
    assert before == {1: "Retired", 2: "Champion", 3: "Rejected"}
    scene.records[1] = scene.records[1].model_copy(update={"removed_at": stamp(NOW)})
    del scene.raw["status"]
    scene.raw["metadata"]["uid"] = "uid-again"
    scene.catalogs.clear()
    scene.pods.clear()
    scene.publish(4, "Passed", against=2)
    scene.events.clear()
    scene.once()
    assert scene.states() == {4: "Candidate"} and scene.status.champion is None, "nothing is decided before the records are read"
    status = scene.rest()
    assert scene.states() == {2: "Retired", 3: "Rejected", 4: "Champion"} and status.storage.removed == [1]
    assert scene.events[0].startswith("VersionAdded: version 4") and "VersionsRestored: found at pvc://models/bot: 2, 3" in scene.events
    assert [e for e in scene.events if e.startswith("Promoted")] == [e for e in scene.events if "version 4 took over from 2" in e]


def test_another_storage_is_another_line() -> None:
    scene = Scene()
    scene.publish(1)
    scene.rest()
    old_report, old_by = CatalogReport(done="sha256:old", records=list(scene.records.values())), next(iter(scene.catalogs))
    scene.raw["spec"]["storage"] = "pvc://models/other"
    scene.raw["metadata"]["generation"] = 2
    scene.once()
    assert scene.status.versions == [] and scene.status.champion is None
    scene.report, scene.reported_by = old_report, old_by
    scene.once()
    assert scene.status.versions == [], "what a pod of the old storage says does not count"
    scene.records.clear()
    assert scene.rest().versions == [] and scene.status.storage.written


def test_a_storage_that_cannot_be_reached_is_tried_again_with_back_off() -> None:
    scene = Scene()
    status = scene.rest(fails=True)
    assert condition(status, "StorageReady") == ("False", "StorageRefused") and status.storage.retries == 1
    assert "access denied" in status.condition("StorageReady").message  # type: ignore[union-attr]
    assert scene.once().actions == (), "not before it is time"
    first = set(scene.catalogs)
    scene.publish(1)
    scene.once()
    assert scene.states() == {1: "Candidate"}, "its job need not wait for the storage's records"
    scene.now = after(11)
    scene.once()
    assert set(scene.catalogs) != first and len(scene.catalogs) == 1, "the failed one is deleted when the next begins"
    status = scene.rest()
    assert condition(status, "StorageReady") == ("True", "Synced") and status.storage.retries == 0 and status.champion == 1


def test_a_report_that_was_lost_with_its_operator_is_asked_for_again() -> None:
    scene = Scene(settings=dataclasses.replace(SETTINGS, backoff_base_seconds=0.0))
    scene.once()  # what its storage is comes on record first
    scene.once()
    assert scene.play()
    scene.report = None
    status = scene.rest()
    assert condition(status, "StorageReady") == ("True", "Synced") and scene.runs == 2


@pytest.mark.parametrize("dies", range(4))
def test_killed_between_any_two_writes(dies: int) -> None:
    """The end is the same; nothing is removed that stands in the status, and nothing stands there whose files are gone."""
    scene = Scene(promotion="Always", retention={"versions": 2}, settings=dataclasses.replace(SETTINGS, backoff_base_seconds=0.0))
    for number in range(1, 6):
        scene.publish(number)
        for _ in range(6):
            scene.once(dies=dies)
            if dies % 2:
                scene.play()
                if scene.report is not None and dies == 3:
                    scene.report = None
            kept = {v.number for v in scene.status.versions}
            assert not kept & {n for n, r in scene.records.items() if r.removed_at}
        scene.rest()
        scene.end(number)
    scene.rest()
    assert scene.states() == {4: "Retired", 5: "Champion"}
    assert {n for n, r in scene.records.items() if r.removed_at} == {1, 2, 3}
    assert {n: scene.records[n].state for n in (4, 5)} == {4: "Retired", 5: "Champion"}


def test_without_reports_versions_are_added_and_decided_all_the_same() -> None:
    scene = Scene(settings=Settings(progress_url="none"))
    scene.publish(1)
    status = scene.rest()
    assert status.champion == 1 and condition(status, "StorageReady") == ("Unknown", "NoReports") and not scene.catalogs


def test_an_invalid_spec_and_a_deletion_change_nothing_else() -> None:
    scene = Scene()
    scene.publish(1)
    scene.rest()
    scene.raw["spec"]["storage"] = "ftp://x"
    assert condition(scene.rest(), "Ready") == ("False", "InvalidSpec") and scene.status.champion == 1
    scene.raw["metadata"]["deletionTimestamp"] = stamp(NOW)
    assert scene.once() == Plan()


def test_the_champions_ancestors_are_known_to_whoever_compares() -> None:
    scene = Scene(promotion="Always")
    for number in (1, 2, 3):
        scene.publish(number)
        scene.rest()
    for version in scene.raw["status"]["versions"]:
        if version["number"] > 1:
            version["parent"] = version["number"] - 1
    champion = tuned_model(scene.raw).champion
    assert champion is not None and (champion.number, champion.digest, champion.ancestors) == (3, "sha256:03", [2, 1])


@pytest.mark.parametrize("kubernetes", ["1.35", "1.37"])
@pytest.mark.parametrize("storage", [{}, {"storage": "s3://bucket/bot", "secretRef": {"name": "keys"}, "s3Endpoint": "http://minio:9000"}])
def test_the_catalogs_pod_is_restricted_and_has_its_storage_alone(kubernetes: str, storage: dict[str, Any]) -> None:
    scene = Scene(**storage)
    scene.once()
    scene.once()
    (made,) = scene.catalogs.values()
    for manifest in (made, *scene.applied.values()):
        kubernetes_validate.validate(manifest, kubernetes, strict=True)
    pod = made["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False and pod["securityContext"]["runAsNonRoot"] is True
    container = pod["containers"][0]
    assert (
        container["args"] == ["catalog", "--model", "/etc/finetune/job/model.json"]
        and container["securityContext"]["readOnlyRootFilesystem"]
    )
    token = next(v for v in pod["volumes"] if "projected" in v)["projected"]["sources"][0]["serviceAccountToken"]
    assert token["audience"] == "https://finetune.dev/namespaces/team-a/finetunedmodels/bot/catalog"
    mounts = {m["mountPath"]: m.get("readOnly", False) for m in container["volumeMounts"]}
    where = "/var/run/finetune/secrets/storage" if storage else "/targets/pvc/models"
    assert set(mounts) == {"/etc/finetune/job", "/tmp", "/var/run/finetune/progress", where} and mounts[where] is bool(storage)
    file = CatalogFile.model_validate_json(scene.applied["ConfigMap", "bot-catalog"]["data"]["model.json"])
    assert (file.targets, file.secrets) == (({}, {"storage": where}) if storage else ({"pvc://models": where}, {}))
    assert ("NetworkPolicy", "bot-catalog") in scene.applied
