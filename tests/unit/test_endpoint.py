"""What is decided about an endpoint: what replicas are told to serve, which version answers, and what is said of it."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import pytest

from finetune_api import API_VERSION, names
from finetune_api.endpoint import ENDPOINT_KIND, FineTuneEndpointStatus, ReplicaModel
from finetune_api.lenient import read
from finetune_api.serving import ArmTraffic, CanaryTraffic, ReplicaReport
from finetune_api.tuned_model import FineTunedModelSpec, FineTunedModelStatus
from finetune_api.validation import InvalidDocument, parse_endpoint
from finetune_operator.model.endpoint import ModelLine, ObservedEndpoint, ReplicaPod
from finetune_operator.reconcile.endpoint import order, reconcile
from finetune_operator.reconcile.plan import Apply, Patch, WriteUrgency
from finetune_operator.settings import Settings
from tests.factory import NOW, after, stamp

SETTINGS = Settings(serving_gateways="gateways:9090")
SPEC: dict[str, Any] = {"base": {"uri": "pvc://models/tiny"}, "models": [{"name": "support"}], "replicas": 2, "verifyEvery": "1h"}


def line(
    champion: int | None = 1, versions: int = 3, name: str = "support", labels: dict[str, str] | None = None, **version: Any
) -> ModelLine:
    found = [{"number": n, "job": "j", "digest": f"sha256:{n}", "rank": 8, **version} for n in range(1, versions + 1)]
    return ModelLine(
        name=name,
        labels=labels or {},
        spec=FineTunedModelSpec.model_validate({"storage": "pvc://published/support"}),
        status=FineTunedModelStatus.model_validate({"champion": champion, "versions": found}),
    )


class Scene:
    """An endpoint over time: what it says goes on record, and is what the next pass knows."""

    def __init__(self, spec: dict[str, Any] | None = None, *, pods: int = 2) -> None:
        self.spec = SPEC if spec is None else spec
        self.meta = {"name": "chat", "namespace": "team-a", "uid": "uid-chat", "generation": 3, "creationTimestamp": stamp(NOW)}
        self.meta |= {"finalizers": [names.FINALIZER], "resourceVersion": "7"}
        self.now = NOW
        self.lines = {"support": line()}
        self.pods = [ReplicaPod(name=f"chat-{n}", uid=f"pod-{n}", ip=f"10.0.0.{n}", ready=True) for n in range(pods)]
        self.found: dict[str, dict[str, str]] = {pod.uid: {} for pod in self.pods}
        """By pod: state of each version, where it is not Verified as soon as it is ordered"""
        self.traffic: tuple[CanaryTraffic, ...] = ()
        self.status = FineTuneEndpointStatus()
        self.more: dict[str, Any] = {}
        self.settings = SETTINGS
        self.events: list[str] = []

    @property
    def observed(self) -> ObservedEndpoint:
        try:
            spec, invalid = parse_endpoint({"spec": self.spec}, strict=False), ""
        except InvalidDocument as failure:
            spec, invalid = None, str(failure)
        raw = {"apiVersion": API_VERSION, "kind": ENDPOINT_KIND, "metadata": self.meta, "spec": self.spec}
        before = ObservedEndpoint(
            endpoint=raw, spec=spec, invalid=invalid, status=self.status, lines=self.lines, pods=tuple(self.pods), now=self.now
        )
        reports = {pod.uid: self._report(pod.uid, before) for pod in self.pods if spec is not None and self.found[pod.uid] is not None}
        return dataclasses.replace(before, **{"reports": reports, "identity": "tls", "traffic": self.traffic, **self.more})

    def _report(self, uid: str, observed: ObservedEndpoint) -> ReplicaReport:
        assert observed.spec is not None
        models = [
            ReplicaModel(name=ordered.name, state=self.found[uid].get(ordered.name, "Verified"), message="as found", verified_at=stamp(NOW))  # type: ignore[arg-type]
            for ordered in order(observed, observed.spec).models
        ]
        return ReplicaReport(generation=3, ready=True, models=models)

    def goes(self, passes: int = 1, seconds: float = 2) -> FineTuneEndpointStatus:
        """So many passes; what is written is read back as the API server gives it."""
        for _ in range(passes):
            self.plan = reconcile(self.observed, self.settings)
            self.events += [event.reason for event in self.plan.events]
            if self.plan.status is not None:
                self.status = read(FineTuneEndpointStatus, self.plan.status.to_wire())
            self.now += timedelta(seconds=seconds)
        return self.status

    @property
    def model(self) -> Any:
        return self.status.models[0]

    def condition(self, type_: str) -> tuple[str, str, str]:
        found = next(c for c in self.status.conditions if c.type == type_)
        return found.status, found.reason, found.message

    def ordered(self) -> dict[str, list[str]]:
        observed = self.observed
        assert observed.spec is not None
        return {model.name: model.aliases for model in order(observed, observed.spec).models}

    def counts(self, old: tuple[int, int], new: tuple[int, int]) -> None:
        """Two gateways with half of it each, and what an earlier step's was."""

        def arm(requests: int, errors: int) -> ArmTraffic:
            return ArmTraffic(requests=requests, errors=errors, log_seconds=0.0, log_seconds_squared=float(requests - errors))

        canary = self.model.canary
        told = CanaryTraffic(namespace="team-a", endpoint="chat", model="support", version=canary.version, since=canary.since)
        half = told.model_copy(update={"old": arm(old[0] // 2, old[1] // 2), "new": arm(new[0] // 2, new[1] // 2)})
        earlier = half.model_copy(update={"since": stamp(after(-9999)), "new": arm(9999, 9999)})
        self.traffic = (half, half, earlier)


def promoted(scene: Scene, champion: int = 2) -> Scene:
    """Version 1 answers, and another one is the champion now."""
    scene.goes(3)
    assert scene.model.version == 1 and scene.status.models_verified == "1/1"
    scene.lines = {"support": line(champion)}
    return scene


def test_the_first_champion_answers_when_every_replica_was_found_to_serve_it() -> None:
    scene = Scene()
    scene.found["pod-1"] = {"support@1": "Loaded"}
    scene.goes(2)
    assert scene.model.version is None and "verified on 1 of 2 replicas" in scene.model.canary.message
    assert scene.ordered() == {"support@1": []}, "not under the model's own name yet"
    assert scene.plan.requeue_at == scene.now - timedelta(seconds=2) + timedelta(seconds=2)
    scene.found["pod-1"] = {}
    scene.goes(2)
    assert (scene.model.version, scene.model.canary, scene.model.digest) == (1, None, "sha256:1")
    assert scene.ordered() == {"support@1": ["support"]}
    assert scene.condition("Verified")[:2] == ("True", "Verified") and scene.condition("Ready")[:2] == ("True", "Serving")
    assert (scene.status.ready_replicas, scene.status.models_verified) == (2, "1/1")
    assert [replica.address for replica in scene.status.pods] == ["10.0.0.0:8080", "10.0.0.1:8080"]
    assert scene.events.count("TookOver") == 1
    assert scene.plan.requeue_at is not None and scene.plan.requeue_at - scene.now > timedelta(seconds=10), "nothing is awaited"


def test_a_canary_goes_step_by_step() -> None:
    scene = promoted(Scene())
    scene.goes(2)
    canary = scene.model.canary
    assert (scene.model.version, canary.version, canary.percent, canary.step) == (1, 2, 10, 0)
    assert scene.ordered() == {"support@1": ["support"], "support@2": []}
    scene.counts((1000, 10), (100, 2))
    scene.goes(seconds=600)
    assert "100 of 200 requests, 9m56s more" in scene.model.canary.message
    assert scene.plan.due is WriteUrgency.LATER, "it only counts"
    scene.goes()
    assert scene.model.canary.percent == 10 and "waits: 100 of 200 requests; 2.0% of 100" in scene.model.canary.message
    scene.counts((2000, 20), (240, 2))
    scene.goes()
    assert (scene.model.canary.percent, scene.model.canary.step) == (50, 1) and scene.plan.due is WriteUrgency.NOW
    scene.counts((400, 4), (400, 4))
    scene.goes(seconds=601)
    assert scene.model.version == 1 and scene.model.canary.requests == 400
    scene.goes()
    assert (scene.model.version, scene.model.canary, scene.model.kept) == (2, None, [1])
    assert scene.ordered() == {"support@2": ["support"], "support@1": []}, "the one before stays loaded"
    assert scene.events.count("CanaryStep") == 2
    scene.goes(2, seconds=3600)
    assert scene.ordered() == {"support@2": ["support"]} and scene.model.kept == []


def test_a_worse_one_goes_back_and_is_not_tried_again() -> None:
    scene = promoted(Scene())
    scene.goes(2)
    scene.counts((900, 8), (100, 30))
    scene.goes()
    assert (scene.model.version, scene.model.canary, scene.model.rolled_back.version) == (1, None, 2)
    status, reason, message = scene.condition("RolledBack")
    assert (status, reason) == ("True", "CanaryWorse") and "30.0% of 100 requests failed, and 0.9% of 900" in message and "p <=" in message
    assert scene.ordered() == {"support@1": ["support"]}
    scene.goes(3, seconds=3600)
    assert scene.model.canary is None and scene.condition("Verified")[0] == "True"
    scene.lines = {"support": line(3)}
    scene.goes(2)
    assert scene.model.canary.version == 3 and scene.condition("RolledBack")[0] == "False"
    scene.lines = {"support": line(2)}
    scene.goes(2)
    assert scene.model.canary.version == 2, "somebody wants it again"


@pytest.mark.parametrize("state", ["Mismatch", "Refused"])
def test_one_that_a_replica_does_not_serve_as_evaluated_goes_back_at_once(state: str) -> None:
    scene = promoted(Scene())
    scene.found["pod-1"] = {"support@2": state}
    scene.goes(2)
    assert (scene.model.version, scene.model.canary, scene.model.rolled_back.version) == (1, None, 2)
    assert f"replica chat-1: {state}: as found" in scene.condition("RolledBack")[2]
    assert scene.condition("Verified")[0] == "True", "what was serving goes on serving"


def test_the_first_one_that_is_not_as_evaluated_does_not_answer() -> None:
    scene = Scene()
    scene.found["pod-0"] = {"support@1": "Mismatch"}
    scene.goes(3)
    assert scene.model.version is None and scene.condition("Verified")[:2] == ("False", "Mismatch")
    assert "chat-0" in scene.condition("Verified")[2] and scene.condition("RolledBack")[0] == "False"


def test_rolling_back_needs_no_canary() -> None:
    scene = promoted(Scene())
    scene.goes(2)
    scene.counts((1000, 10), (300, 3))
    scene.goes(2, seconds=600)
    scene.counts((1000, 10), (300, 3))
    scene.goes(2, seconds=600)
    assert scene.model.version == 2
    scene.lines = {"support": line(1)}  # pinned
    scene.goes()
    assert (scene.model.version, scene.model.canary, scene.model.kept) == (1, None, [2])


def test_a_roll_back_while_the_new_one_is_on_its_way() -> None:
    scene = promoted(Scene())
    scene.goes(2)
    scene.lines = {"support": line(1)}
    scene.goes()
    assert (scene.model.version, scene.model.canary, scene.model.rolled_back) == (1, None, None)
    assert scene.ordered() == {"support@1": ["support"]}


@pytest.mark.parametrize("how", ["no steps", "no gateway", "the present one is bad everywhere", "the present one's files are gone"])
def test_all_at_once(how: str) -> None:
    scene = promoted(Scene({**SPEC, "rollout": {"steps": []}} if how == "no steps" else None))
    if how == "no gateway":
        scene.more = {"canaries": False}
    elif how == "the present one is bad everywhere":
        scene.found = {uid: {"support@1": "Mismatch"} for uid in scene.found}
    elif how == "the present one's files are gone":
        left = line(2)
        left.status.versions = [version for version in left.status.versions if version.number != 1]
        scene.lines = {"support": left}
    scene.goes(2)
    assert scene.model.version == 2


def test_versions_that_are_named_and_those_that_are_gone() -> None:
    scene = Scene({**SPEC, "models": [{"name": "support", "versions": [2, 9]}]})
    scene.goes(2)
    assert scene.ordered() == {"support@1": ["support"], "support@2": []} and scene.model.kept == [2]
    scene.lines = {}
    scene.goes()
    assert scene.ordered() == {} and scene.status.models == []
    assert scene.condition("ModelsServed")[:2] == ("False", "ModelNotFound")


def test_models_by_their_labels() -> None:
    scene = Scene({"base": {"uri": "pvc://models/tiny"}, "modelSelector": {"matchLabels": {"tier": "chat"}}})
    scene.lines = {"a": line(name="a", labels={"tier": "chat"}), "b": line(name="b")}
    scene.goes(2)
    assert [model.name for model in scene.status.models] == ["a"]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ({"support": line(None)}, "NoChampion"),
        ({"support": line(form="Model")}, "WholeModel"),
        ({"support": line(rank=128)}, "RankTooHigh"),
    ],
)
def test_what_it_cannot_serve_it_says(lines: dict[str, ModelLine], reason: str) -> None:
    scene = Scene()
    scene.lines = lines
    scene.goes(2)
    assert scene.condition("ModelsServed")[:2] == ("False", reason)
    if reason != "RankTooHigh":  # the replica refuses that one by itself
        assert scene.ordered() == {}


def test_a_first_version_that_is_not_let_in_is_told() -> None:
    scene = Scene()
    for pod in scene.pods:
        scene.found[pod.uid]["support@1"] = "Refused"
    scene.goes(3)
    [model] = scene.status.models
    assert model.version is None and model.verified == 0 and "Refused: as found" in model.mismatch
    assert scene.condition("Verified")[0] == "False"


def test_a_model_has_not_the_name_of_the_base() -> None:
    scene = Scene({"base": {"uri": "pvc://models/tiny"}, "models": [{"name": "chat"}]})
    scene.lines = {"chat": line(name="chat")}
    scene.goes(2)
    assert scene.condition("ModelsServed")[:2] == ("False", "NameTaken") and scene.ordered() == {}


def test_one_that_cannot_be_told_from_its_base_answers_and_is_called_so() -> None:
    scene = Scene()
    scene.found = {uid: {"support@1": "Unverifiable"} for uid in scene.found}
    scene.goes(3)
    assert scene.model.version == 1 and scene.condition("Verified")[:2] == ("Unknown", "Unverifiable")
    assert scene.status.models_verified == "0/1"


def test_a_replica_that_says_nothing_keeps_what_is_on_record() -> None:
    """That the operator cannot reach it is no reason to take it from its users; a container that began anew is."""
    scene = Scene()
    scene.goes(3)
    scene.more = {"reports": {}, "silent": {"pod-0": "no answer", "pod-1": "no answer"}}
    scene.goes()
    assert scene.status.ready_replicas == 2 and scene.model.verified == 2
    assert scene.condition("Verified")[:2] == ("Unknown", "ReplicaSilent")
    scene.more |= {"emptied": frozenset({"pod-0"})}
    scene.goes()
    assert [[model.state for model in replica.models] for replica in scene.status.pods] == [["Pending"], ["Verified"]]
    scene.pods[1] = dataclasses.replace(scene.pods[1], ready=False)
    scene.goes()
    assert scene.status.ready_replicas == 1


def test_replicas_that_come_are_verified_before_they_count() -> None:
    scene = Scene(pods=1)
    scene.goes(3)
    scene.pods.append(ReplicaPod(name="chat-9", uid="pod-9", ip="10.0.0.9", ready=True))
    scene.found["pod-9"] = {"support@1": "Loaded"}
    scene.goes()
    assert (scene.model.verified, scene.model.replicas) == (1, 2) and scene.condition("Verified")[:2] == ("Unknown", "Pending")
    scene.found["pod-9"] = {"support@1": "Mismatch"}
    scene.goes()
    assert scene.model.mismatch == "chat-9: Mismatch: as found" and scene.condition("Verified")[:2] == ("False", "Mismatch")
    assert scene.model.version == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gpusPerReplica": 0}, "CPUNotAllowed"),
        ({"base": {"uri": "hf://a/b", "trustRemoteCode": True}}, "RemoteCodeNotAllowed"),
        ({"replicas": "many"}, "InvalidSpec"),
    ],
)
def test_what_cannot_be_made_is_refused_with_a_fix(change: dict[str, Any], reason: str) -> None:
    scene = Scene({**SPEC, **change})
    scene.goes()
    assert scene.condition("Ready")[:2] == ("False", reason) and scene.plan.actions == ()
    assert scene.status.observed_generation == 3 and scene.plan.requeue_at is not None, "what stands against it may go"


@pytest.mark.parametrize(("more", "reason"), [({"queue_problem": "q"}, "QueueNotAllowed"), ({"no_identity": "s"}, "APIRefused")])
def test_what_the_cluster_does_not_allow_is_told_and_what_runs_is_left(more: dict[str, Any], reason: str) -> None:
    scene = Scene()
    scene.goes(3)
    scene.more = more
    scene.goes()
    assert scene.condition("Ready")[:2] == ("False", reason) and scene.plan.actions == () and scene.status.ready_replicas == 2


def test_the_finalizer_comes_before_anything_is_made() -> None:
    scene = Scene()
    scene.meta["finalizers"] = ["example.com/other"]
    scene.goes()
    [action] = scene.plan.actions
    assert isinstance(action, Patch) and action.body["metadata"] == {
        "finalizers": ["example.com/other", names.FINALIZER],
        "resourceVersion": "7",
    }


@pytest.mark.parametrize(("loaded", "seconds", "goes"), [(True, 5, False), (False, 5, True), (True, 61, True)])
def test_deletion_waits_for_replicas_to_let_go_but_not_for_ever(loaded: bool, seconds: float, goes: bool) -> None:
    scene = Scene()
    scene.goes(2)
    scene.meta |= {"deletionTimestamp": stamp(scene.now), "finalizers": ["example.com/other", names.FINALIZER]}
    assert scene.ordered() == {}
    scene.now += timedelta(seconds=seconds)
    if loaded:
        scene.more = {"reports": {}}
    scene.goes()
    assert bool(scene.plan.actions) is goes
    if goes:
        [action] = scene.plan.actions
        assert isinstance(action, Patch) and action.body["metadata"]["finalizers"] == ["example.com/other"]


def test_deletion_waits_for_no_pod_that_never_started() -> None:
    scene = Scene()
    scene.goes(2)
    scene.meta |= {"deletionTimestamp": stamp(scene.now), "finalizers": [names.FINALIZER]}
    scene.more = {"reports": {}, "pods": tuple(dataclasses.replace(pod, ip="", ready=False) for pod in scene.observed.pods)}
    scene.goes()
    [action] = scene.plan.actions
    assert isinstance(action, Patch) and action.body["metadata"]["finalizers"] == []


def test_what_is_applied_is_not_applied_again() -> None:
    scene = Scene()
    scene.goes()
    made = {(a.manifest["kind"], a.manifest["metadata"]["name"]): a.manifest for a in scene.plan.actions if isinstance(a, Apply)}
    assert list(made)[-1] == ("Deployment", "chat-endpoint")
    scene.more = {"applied": {key: m["metadata"]["annotations"][names.ANNOTATION_HASH] for key, m in made.items()}}
    scene.goes()
    assert scene.plan.actions == ()
    scene.spec = {**SPEC, "replicas": 3}
    scene.goes()
    assert [a.manifest["kind"] for a in scene.plan.actions if isinstance(a, Apply)] == ["Deployment"]


def test_a_quiet_pass_writes_nothing() -> None:
    scene = Scene()
    scene.goes(4)
    frozen = scene.now
    scene.goes()
    scene.now = frozen
    scene.goes()
    assert scene.plan.status is None and scene.plan.events == ()


def test_the_orders_verification_time_follows_verify_every() -> None:
    scene = Scene()
    observed = scene.observed
    assert observed.spec is not None
    assert order(observed, observed.spec).verify_before == stamp(after(-3600))
