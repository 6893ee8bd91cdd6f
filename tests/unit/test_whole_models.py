"""A whole model as an endpoint's base: what its replicas are made with, how they are replaced, and what is said of it meanwhile."""

from __future__ import annotations

import dataclasses
import json
from datetime import timedelta
from typing import Any

import pytest

from finetune_api import names
from finetune_api.contract import StageResult
from finetune_api.endpoint import ReplicaModel
from finetune_api.serving import OrderedModel, ReplicaReport
from finetune_api.validation import InvalidDocument, parse_endpoint
from finetune_gateway.catalog import asked, read_endpoint
from finetune_gateway.choosing import choose
from finetune_operator.model.children import pod_view
from finetune_operator.model.endpoint import ObservedEndpoint, ReplicaPod, replica_pod
from finetune_operator.model.tuned_model import models_served, serving_of
from finetune_operator.reconcile.endpoint import order
from finetune_operator.reconcile.plan import Apply
from tests.factory import NOW, stamp
from tests.unit.test_endpoint import Scene, line

SPEC: dict[str, Any] = {"base": {"uri": "model://support"}, "replicas": 2}


class Cluster(Scene):
    """Replicas with a whole model each; the Deployment's controller is played by `replace`."""

    def __init__(self, spec: dict[str, Any] | None = None) -> None:
        super().__init__(spec or SPEC, pods=0)
        self.lines = {"support": line(form="Model", rank=None)}
        self.states: dict[str, str] = {}
        """By pod: what it is found to be, where that is not Verified"""
        self.deployment: dict[str, Any] = {}

    def _report(self, uid: str, observed: ObservedEndpoint) -> ReplicaReport:
        pod = next(pod for pod in self.pods if pod.uid == uid)
        state = self.states.get(uid, "Verified")
        base = ReplicaModel(name=pod.version, state=state, message="as found", verified_at=stamp(NOW))  # type: ignore[arg-type]
        adapters = super()._report(uid, observed).models
        return ReplicaReport(generation=3, ready=state in ("Verified", "Unverifiable"), models=[base, *adapters])

    def goes(self, passes: int = 1, seconds: float = 2) -> Any:
        for _ in range(passes):
            super().goes(seconds=seconds)
            made = [action.manifest for action in self.plan.actions if isinstance(action, Apply)]
            self.deployment = next((manifest for manifest in made if manifest["kind"] == "Deployment"), self.deployment)
        return self.status

    @property
    def version(self) -> str:
        """What new replicas get."""
        return str(self.deployment["spec"]["template"]["metadata"]["annotations"][names.ANNOTATION_VERSION])

    def start(self, number: int, state: str = "Verified") -> None:
        """A replica of the template comes up."""
        uid = f"pod-{number}"
        self.pods.append(ReplicaPod(name=f"chat-{number}", uid=uid, ip=f"10.0.0.{number}", ready=state == "Verified", version=self.version))
        self.states[uid], self.found[uid] = state, {}

    def end(self, number: int) -> None:
        self.pods = [pod for pod in self.pods if pod.uid != f"pod-{number}"]

    def answers(self, model: str) -> list[tuple[int | None, tuple[str, ...]]]:
        """What the gateway takes for a model's name, whatever the dice say."""
        raw = {"metadata": {"name": "chat", "namespace": "team-a"}, "status": self.status.to_wire()}
        endpoint, wanted = read_endpoint(json.dumps(raw).encode()), asked(model)
        assert wanted is not None
        targets = [choose(wanted, [endpoint], lambda at=at: at / 100) for at in range(100)]  # type: ignore[misc]
        return sorted({(t.version, t.replicas) for t in targets if t is not None})


def running() -> Cluster:
    """Two replicas serve version 1."""
    cluster = Cluster()
    cluster.goes()
    for number in (1, 2):
        cluster.start(number)
    cluster.goes(2)
    assert (cluster.model.version, cluster.model.verified, cluster.status.models_verified) == (1, 2, "1/1")
    return cluster


def test_the_champion_is_what_replicas_are_made_with_and_answers_under_its_names() -> None:
    cluster = running()
    pod = cluster.deployment["spec"]["template"]["spec"]
    base, engine = pod["initContainers"][0], pod["containers"][0]
    version = OrderedModel.model_validate_json(base["args"][2])
    assert base["args"][:2] == ["fetch", "--version"]
    assert (version.name, version.storage, version.digest, version.folder) == ("support@1", "pvc://published/support", "sha256:1", "")
    at = engine["args"].index("--served-model-name")
    assert engine["args"][at + 1 : at + 4] == ["support@1", "support", "chat"]
    assert [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v] == ["published"]
    assert cluster.model.digest == "sha256:1" and cluster.condition("Verified")[0] == "True"
    assert cluster.condition("ModelsServed")[0] == "True" and "TookOver" in cluster.events
    assert cluster.ordered() == {}, "it is there from the engine's start"
    assert cluster.answers("support") == cluster.answers("support@1") == [(1, ("10.0.0.1:8080", "10.0.0.2:8080"))]
    assert cluster.plan.requeue_at is not None and cluster.plan.requeue_at - cluster.now > timedelta(seconds=10), "nothing is awaited"


def test_a_new_champion_takes_over_replica_by_replica_and_so_does_a_roll_back() -> None:
    cluster = running()
    settings = [a.manifest for a in cluster.plan.actions if isinstance(a, Apply) and a.manifest["kind"] == "ConfigMap"]
    cluster.lines = {"support": line(2, form="Model", rank=None)}
    cluster.goes()
    assert cluster.version == "support@2" and (cluster.model.version, cluster.model.canary.percent) == (1, 0)
    after = [a.manifest for a in cluster.plan.actions if isinstance(a, Apply) and a.manifest["kind"] == "ConfigMap"]
    assert len(settings) == 1 and settings == after, "replicas of the version before may start anew"
    cluster.start(3, "Loaded")
    cluster.goes()
    assert cluster.answers("support") == [(1, ("10.0.0.1:8080", "10.0.0.2:8080"))], "it was not asked yet"
    assert cluster.status.ready_replicas == 2 and not next(r for r in cluster.status.pods if r.name == "chat-3").ready
    cluster.end(3)
    cluster.start(3)
    cluster.goes()
    assert cluster.model.canary.percent == 33 and "1 of 3 replicas were found to serve it" in cluster.model.canary.message
    assert cluster.condition("Verified")[1] == "Pending"
    both = [(1, ("10.0.0.1:8080", "10.0.0.2:8080")), (2, ("10.0.0.3:8080",))]
    assert cluster.answers("support") == both, "each for its share"
    cluster.end(1)
    cluster.start(4)
    cluster.goes()
    assert cluster.model.version == 1 and cluster.model.canary.percent == 66
    cluster.end(2)
    cluster.goes()
    assert (cluster.model.version, cluster.model.canary, cluster.model.verified, cluster.model.digest) == (2, None, 2, "sha256:2")
    assert cluster.answers("support") == [(2, ("10.0.0.3:8080", "10.0.0.4:8080"))] and cluster.answers("support@1") == []

    cluster.lines = {"support": line(1, form="Model", rank=None)}  # pinned
    cluster.goes()
    assert cluster.version == "support@1" and cluster.model.version == 2
    cluster.start(5)
    for number in (3, 4):
        cluster.end(number)
    cluster.goes()
    assert cluster.model.version == 1 and cluster.answers("support") == [(1, ("10.0.0.5:8080",))]


@pytest.mark.parametrize("state", ["Mismatch", "Refused"])
def test_one_that_is_not_what_was_evaluated_goes_back_and_is_not_tried_again(state: str) -> None:
    cluster = running()
    cluster.lines = {"support": line(2, form="Model", rank=None)}
    cluster.goes()
    cluster.start(3, state)
    cluster.goes(2)
    assert (cluster.model.version, cluster.model.canary, cluster.version) == (1, None, "support@1")
    assert f"replica chat-3: {state}: as found" in cluster.condition("RolledBack")[2] and "RolledBack" in cluster.events
    cluster.end(3)
    cluster.goes(3, seconds=3600)
    assert cluster.version == "support@1" and cluster.condition("Verified")[0] == "True"
    cluster.lines = {"support": line(3, form="Model", rank=None)}
    cluster.goes()
    assert cluster.version == "support@3" and cluster.condition("RolledBack")[0] == "False"


def test_what_a_replica_does_not_let_in_is_told_with_its_words() -> None:
    cluster = Cluster()
    cluster.goes()
    words = StageResult(reason="VersionRefused", message="versions/1/model.safetensors is not what SHA256SUMS says").dumps()
    init = {"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": {"exitCode": 10, "message": words}}}
    main = {"state": {"waiting": {"reason": "PodInitializing"}}}
    meta = {"name": "chat-1", "uid": "pod-1", "annotations": {names.ANNOTATION_VERSION: "support@1"}}
    raw = {"metadata": meta, "status": {"initContainerStatuses": [init], "containerStatuses": [main]}}
    found = replica_pod(pod_view(raw))
    assert found is not None and found.refused.startswith("versions/1/model.safetensors is not")
    cluster.pods = [found]
    cluster.more = {"reports": {}}
    cluster.found["pod-1"] = {}
    cluster.goes(2)
    [replica] = cluster.status.pods
    assert [(model.name, model.state) for model in replica.models] == [("support@1", "Refused")]
    assert "is not what SHA256SUMS says" in cluster.model.mismatch and cluster.condition("Verified")[:2] == ("False", "Mismatch")
    assert "VersionRefused: versions/1/model.safetensors" in cluster.condition("Ready")[2]

    init["lastState"]["terminated"]["message"] = StageResult(reason="StorageRefused", message="its keys may not").dumps()  # type: ignore[index]
    away = replica_pod(pod_view(raw))
    assert away is not None and away.refused == "" and away.problem == "StorageRefused: its keys may not", "which may be mended"
    cluster.pods = [away]
    cluster.goes()
    assert cluster.model.mismatch == "" and "chat-1: StorageRefused: its keys may not" in cluster.model.canary.message
    init["state"], init["lastState"] = {"terminated": {"exitCode": 0}}, {"terminated": {"exitCode": 10, "message": words}}
    mended = replica_pod(pod_view(raw))
    assert mended is not None and (mended.refused, mended.problem) == ("", "")


def test_a_version_that_is_named_stays() -> None:
    cluster = Cluster({**SPEC, "base": {"uri": "model://support@2"}})
    cluster.goes()
    assert cluster.version == "support@2"
    cluster.start(1)
    cluster.lines = {"support": line(3, form="Model", rank=None)}
    cluster.goes(2)
    assert cluster.version == "support@2" and cluster.answers("support") == [(2, ("10.0.0.1:8080",))]


def test_a_merged_model_is_served_from_its_own_folder() -> None:
    cluster = Cluster()
    cluster.lines = {"support": line(merged=True)}
    cluster.goes()
    args = cluster.deployment["spec"]["template"]["spec"]["initContainers"][0]["args"]
    assert OrderedModel.model_validate_json(args[2]).folder == "merged"


@pytest.mark.parametrize(
    ("uri", "champion", "version", "reason", "told"),
    [
        ("model://support", None, {"form": "Model"}, "NoChampion", "support has no champion yet"),
        ("model://support@7", 1, {"form": "Model"}, "VersionNotFound", "keeps no version 7 (kept: 1, 2, 3)"),
        ("model://support", 1, {}, "NotWhole", "publish it with output.merged"),
        ("model://other", 1, {"form": "Model"}, "ModelNotFound", "no FineTunedModel other"),
    ],
)
def test_what_cannot_be_served_is_told(uri: str, champion: int | None, version: dict[str, Any], reason: str, told: str) -> None:
    cluster = Cluster({**SPEC, "base": {"uri": uri}})
    cluster.lines = {"support": line(champion, **version)}
    cluster.goes(2)
    assert cluster.condition("Ready")[:2] == ("False", reason) and told in cluster.condition("Ready")[2]
    assert not cluster.plan.actions and cluster.plan.requeue_at is not None


def test_what_runs_goes_on_when_the_champion_cannot_be_served_or_the_model_is_gone() -> None:
    cluster = running()
    for lines in ({"support": line(2)}, {"support": line(None, 0)}, {}):
        left = lines.get("support")
        if left is not None:  # a whole model before, adapters from then on
            left.status.versions = [*line(1, 1, form="Model", rank=None).status.versions, *left.status.versions[1:]]
        cluster.lines = lines
        cluster.goes(2)
        assert cluster.condition("Ready")[0] == "True" and cluster.condition("ModelsServed")[0] == "False"
        assert cluster.version == "support@1" and cluster.answers("support") == [(1, ("10.0.0.1:8080", "10.0.0.2:8080"))]
        assert cluster.model.digest == "sha256:1"
        assert bool(cluster.plan.actions) is bool(lines), "other changes are carried out while its version is there"


def test_adapters_are_served_beside_it_and_it_is_not_one_of_them() -> None:
    cluster = Cluster({**SPEC, "models": [{"name": "tone"}], "modelSelector": {"matchLabels": {"tier": "chat"}}})
    cluster.lines = {"support": line(labels={"tier": "chat"}, form="Model", rank=None), "tone": line(name="tone")}
    cluster.goes()
    cluster.start(1)
    cluster.goes(3)
    assert cluster.ordered() == {"tone@1": ["tone"]} and [model.name for model in cluster.status.models] == ["support", "tone"]
    assert cluster.status.models_verified == "2/2"


def test_a_whole_model_among_adapters_says_how_it_is_served() -> None:
    scene = Scene()
    scene.lines = {"support": line(form="Model")}
    scene.goes(2)
    assert scene.condition("ModelsServed")[2].endswith("make an endpoint of its own with base.uri: model://support")


def test_deletion_waits_for_adapters_alone() -> None:
    cluster = running()
    cluster.meta |= {"deletionTimestamp": stamp(cluster.now)}
    cluster.goes()
    assert cluster.plan.actions, "let go at once: the base cannot be unloaded"


def test_what_an_endpoint_serves_as_its_base_is_never_removed() -> None:
    cluster = running()
    cluster.lines = {"support": line(2, form="Model", rank=None)}
    cluster.goes()
    raw = {**cluster.observed.endpoint, "status": cluster.status.to_wire()}
    serving = serving_of(raw, "support")
    assert serving is not None and (serving.answers, serving.versions) == (True, {1, 2})
    assert models_served(raw) == ["support"] and models_served({"spec": SPEC}) == ["support"]
    pinned = serving_of({"metadata": {"name": "chat"}, "spec": {"base": {"uri": "model://support@3"}}}, "support")
    assert pinned is not None and (pinned.answers, pinned.versions) == (False, {3})
    for uri in ("pvc://support", "model://support@x", 7, "model://supporter@3"):
        assert serving_of({"metadata": {"name": "chat"}, "spec": {"base": {"uri": uri}}}, "support") is None


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"engine": "external", "external": {"service": "vllm"}}, "set engine to vllm, or name what they serve"),
        ({"models": [{"name": "support"}]}, "remove it from models"),
        ({"base": {"uri": "model://support@2"}, "models": [{"name": "support", "versions": [1]}]}, "remove it from models"),
        ({"base": {"uri": "model://support", "secretRef": {"name": "s"}}}, "whose FineTunedModel has its own"),
        ({"base": {"uri": "model://team-b/support"}}, "model://FINETUNEDMODEL[@VERSION]"),
    ],
)
def test_what_contradicts_itself_is_refused(spec: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidDocument, match=told.replace("[", r"\[")):
        parse_endpoint({"spec": {**SPEC, **spec}})
    parse_endpoint({"spec": {**SPEC, "models": [{"name": "suppor"}, {"name": "support.two"}]}})


def test_a_replica_that_started_anew_is_verified_again_before_it_counts() -> None:
    cluster = running()
    cluster.pods[0] = dataclasses.replace(cluster.pods[0], ready=False)
    cluster.states["pod-1"] = "Pending"
    cluster.goes()
    assert cluster.answers("support") == [(1, ("10.0.0.2:8080",))] and cluster.condition("Verified")[1] == "Pending"
    assert order(cluster.observed, parse_endpoint({"spec": SPEC})).models == []
