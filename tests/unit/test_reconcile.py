"""The state machine: given what is observed, what is done and said. A table row per decision."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest

from finetune_api import names
from finetune_api.contract import ExitCode, ProgressReport, StageResult
from finetune_api.lenient import read_status
from finetune_api.status import FineTuneJobStatus
from finetune_operator.model.job import ChildJobView, Observed, PodView
from finetune_operator.model.queueing import RECOVERED, Admission, Decision
from finetune_operator.model.seal import seal
from finetune_operator.model.times import parse_time
from finetune_operator.reconcile.job import reconcile, refused
from finetune_operator.reconcile.job.failures import classify, first_failure
from finetune_operator.reconcile.plan import Apply, Create, Delete, Patch, Plan, WriteUrgency
from finetune_operator.settings import Settings
from tests.factory import CHECKED, COMPARED, MINIMAL, NOW, PREPARED, PUBLISHED, RESULTS, TRAINED, UID, after, job, merged, stamp

SETTINGS = Settings(progress_url="none", backoff_base_seconds=10, seal_key="of this operator")
TWO = merged(MINIMAL, distribution={"nodes": 2, "gpusPerNode": 0})
EVALUATED = merged(
    MINIMAL,
    dataset={"train": {"uri": "configmap://rows/train.jsonl"}, "eval": {"splitFraction": 0.1}},
    evaluation={"gate": {"minImprovement": 0.1}},
    publish=[{"uri": "pvc://published/support"}],
)


def granted(pods: int = 1, **more: Any) -> Decision:
    return Decision(action="admit", message="admitted", admission=Admission(queue="", flavor="", pods=pods, **more))


class World:
    """A job, and the children that the plans made. Steps reconcile and the kubelet by hand; no I/O."""

    settings = SETTINGS

    def __init__(self, spec: dict[str, Any] | None = None, **meta: Any) -> None:
        self.job = job(spec, **meta)
        self.handed: dict[str, Any] = {}
        """What another scheduler says"""
        self.pods: dict[str, PodView] = {}
        self.jobs: dict[str, ChildJobView] = {}
        self.left: tuple[PodView, ...] = ()
        self.applied: dict[tuple[str, str], str] = {}
        self.report: ProgressReport | None = None
        self.lost: frozenset[str] = frozenset()
        nodes = self.job["spec"].get("distribution", {}).get("nodes", 1)
        self.decision: Decision | None = granted(nodes)
        self.time = 0.0
        self.events: list[str] = []
        self.made: dict[str, dict[str, Any]] = {}
        self.count = 0

    @property
    def status(self) -> FineTuneJobStatus:
        return read_status(self.job.get("status"))

    def observed(self) -> Observed:
        return Observed(
            job=self.job,
            pods=tuple(self.pods.values()),
            jobs=tuple(self.jobs.values()),
            left=self.left,
            applied=dict(self.applied),
            report=self.report,
            lost_nodes=self.lost,
            decision=self.decision,
            **self.handed,
            now=after(self.time),
        )

    def step(self) -> Plan:
        plan = reconcile(self.observed(), self.settings)
        for action in plan.actions:
            self._carry_out(action)
        self.events += [e.reason for e in plan.events]
        if plan.status is not None:
            self.job["status"] = plan.status.to_wire()
        return plan

    def settle(self, limit: int = 20) -> None:
        """Reconcile until nothing changes."""
        for _ in range(limit):
            plan = self.step()
            if not plan.actions and plan.status is None:
                return
        raise AssertionError(f"no rest after {limit} passes: {plan}")

    def _carry_out(self, action: Any) -> None:
        self.count += 1
        if isinstance(action, Apply):
            meta = action.manifest["metadata"]
            self.applied[action.manifest["kind"], meta["name"]] = meta["annotations"][names.ANNOTATION_HASH]
        elif isinstance(action, Patch):
            self.handed["place"] = merge(self.handed["place"], action.body)
        elif isinstance(action, Delete) and action.kind == "Workload":
            self.handed["place"] = None
        elif isinstance(action, Delete):
            self.pods = {k: p for k, p in self.pods.items() if p.uid != action.uid and p.job_uid != action.uid}
            self.jobs = {k: j for k, j in self.jobs.items() if j.uid != action.uid}
        else:
            self._create(action.manifest)

    def _create(self, manifest: dict[str, Any]) -> None:
        meta = manifest["metadata"]
        name, labels = meta["name"], meta["labels"]
        if manifest["kind"] == "Job":
            assert name not in self.jobs
            uid = f"job-{self.count}"
            self.jobs[name] = ChildJobView(name=name, uid=uid, stage=labels[names.LABEL_STAGE], created=after(self.time))
            self.pods[f"{name}-x"] = PodView(name=f"{name}-x", uid=f"pod-{self.count}", stage="", job_uid=uid, created=after(self.time))
            self.made[name] = manifest
            return
        if manifest["kind"] == "Workload":
            assert self.handed["place"] is None
            self.handed["place"] = {**manifest, "metadata": {**meta, "uid": f"workload-{self.count}"}}
            return
        assert name not in self.pods, "never two pods of one rank"
        self.pods[name] = PodView(
            name=name,
            uid=f"pod-{self.count}",
            stage="train",
            attempt=int(labels[names.LABEL_ATTEMPT]),
            rank=int(labels[names.LABEL_RANK]),
            created=after(self.time),
            admission=meta.get("annotations", {}).get(names.ANNOTATION_ADMISSION, ""),
            seal=meta.get("annotations", {}).get(names.ANNOTATION_SEAL, ""),
        )

    def pod(self, part: str) -> PodView:
        return next(p for name, p in sorted(self.pods.items()) if part in name and p.phase != "Succeeded")

    def set(self, pod: PodView, **changes: Any) -> None:
        self.pods[pod.name] = dataclasses.replace(pod, **changes)

    def succeed(self, part: str, result: StageResult | str) -> None:
        words = result if isinstance(result, str) else result.dumps()
        self.set(self.pod(part), phase="Succeeded", running=True, exit_code=0, message=words, finished=after(self.time))

    def fail(self, part: str, code: int, message: str = "", **more: Any) -> None:
        self.set(self.pod(part), phase="Failed", running=True, exit_code=code, message=message, finished=after(self.time), **more)

    def run(self, part: str) -> None:
        for pod in list(self.pods.values()):
            if part in pod.name and pod.phase == "Pending":
                self.set(pod, phase="Running", running=True)

    def to_training(self) -> World:
        self.settle()
        self.succeed("prepare", PREPARED)
        if "publish" in self.job["spec"]:
            self.succeed("check", CHECKED)
        self.settle()
        self.run("worker")
        self.settle()
        assert self.status.phase == "Training", self.status
        return self


def merge(old: Any, change: Any) -> Any:
    """JSON merge patch (RFC 7386)."""
    if not isinstance(old, dict) or not isinstance(change, dict):
        return change
    return {**old, **{key: merge(old.get(key), value) for key, value in change.items()}}


def workers(world: World) -> list[tuple[int, int]]:
    return sorted((p.rank, p.attempt) for p in world.pods.values() if p.stage == "train")


def test_the_undisturbed_story() -> None:
    world = World(EVALUATED)
    world.settle()
    assert world.status.phase == "Preparing"
    assert ("ConfigMap", "support-job") in world.applied
    assert ("PersistentVolumeClaim", "support-workspace") in world.applied
    world.run("prepare")
    world.settle()
    assert world.status.condition("DataReady").reason == "Running"  # type: ignore[union-attr]
    world.succeed("prepare", PREPARED)
    world.settle()
    assert world.status.phase == "Preparing", "nothing is asked for before the targets are known to be free"
    world.succeed("check", CHECKED)
    world.settle()
    assert world.status.phase == "Starting"
    assert ("Service", "support-workers") in world.applied
    world.run("worker")
    world.settle()
    assert (world.status.phase, world.status.attempt) == ("Training", 0)
    world.succeed("worker", TRAINED)
    world.settle()
    assert world.status.phase == "Evaluating"
    world.succeed("evaluate", COMPARED)
    world.settle()
    assert world.status.phase == "Publishing"
    world.succeed("publish", PUBLISHED)
    world.settle()
    status = world.status
    assert status.phase == "Succeeded"
    assert status.artifacts[0].uri == "pvc://published/support"
    assert status.evaluation is not None and status.evaluation.gate == "Passed"
    assert status.progress is not None and status.progress.percent == 100
    assert [c.type for c in status.conditions if c.status == "True"] == [
        "Ready", "Accepted", "TargetsReady", "DataReady", "Admitted", "QuotaReserved", "Trained", "Evaluated", "Published", "Succeeded",
        "Finished",
    ]  # fmt: skip
    assert world.events == [
        "PrepareStarted", "DataReady", "Admitted", "GangCreated", "GangRunning", "Trained", "EvaluateStarted", "Evaluated", "PublishStarted",
        "Published", "Succeeded",
    ]  # fmt: skip
    assert all(c.observed_generation == 1 and parse_time(c.last_transition_time) for c in status.conditions)


def test_without_evaluation_and_publish() -> None:
    world = World().to_training()
    world.succeed("worker", TRAINED)
    world.settle()
    assert world.status.phase == "Succeeded"
    assert "in the workspace" in world.status.condition("Succeeded").message  # type: ignore[union-attr]


def test_an_invalid_spec_fails_with_the_field_and_starts_nothing() -> None:
    world = World(merged(MINIMAL, tuning={"method": "lorra"}))
    world.settle()
    assert world.status.condition("Failed").reason == "InvalidSpec"  # type: ignore[union-attr]
    assert "did you mean 'lora'" in world.status.condition("Accepted").message  # type: ignore[union-attr]
    assert not world.pods and not world.jobs


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"uri": "pvc://models/tiny", "trustRemoteCode": True}},
        {"tuning": {"objective": "distill", "distillation": {"teacher": {"uri": "pvc://models/big", "trustRemoteCode": True}}}},
    ],
)
def test_a7_code_of_a_model_needs_an_administrator(change: dict[str, Any]) -> None:
    world = World(merged(MINIMAL, **change))
    world.settle()
    assert world.status.condition("Failed").reason == "RemoteCodeNotAllowed"  # type: ignore[union-attr]
    assert not world.jobs and not world.applied
    for namespaces, started in ((("team-b",), False), (("team-a",), True), (("*",), True)):
        plan = reconcile(World(merged(MINIMAL, **change)).observed(), dataclasses.replace(SETTINGS, remote_code_namespaces=namespaces))
        assert any(isinstance(action, Create) for action in plan.actions) == started


def test_a_target_that_is_taken_is_said_before_any_gpu() -> None:
    world = World(EVALUATED)
    world.settle()
    world.fail("check", ExitCode.USER_ERROR, StageResult(reason="TargetTaken", message="pvc://published/support: taken").dumps())
    world.settle()
    assert world.status.phase == "Failed" and world.status.condition("Failed").reason == "TargetTaken"  # type: ignore[union-attr]
    assert world.status.condition("TargetsReady").status == "False"  # type: ignore[union-attr]
    assert not workers(world) and not world.jobs.keys() & {"support-prepare-0"}, "prepare is stopped, too"


def test_a_job_that_had_ended_before_its_status_was_lost_is_not_trained_again() -> None:
    """Its targets hold its result: a backup was restored, or the status was wiped and its pods are gone."""
    world = World(EVALUATED)
    world.settle()
    forms = [{"name": "onnx", "bytes": 7, "state": "Verified", "probes": 8, "nearer": 8}]
    found = StageResult(reason="Restored", message="pvc://published/support: there already", result={**PUBLISHED.result, "forms": forms})
    world.succeed("check", found)
    world.settle()
    status = world.status
    assert (status.phase, status.finished_at is not None) == ("Succeeded", True) and "Restored" in world.events
    assert [(c.type, c.reason) for c in status.conditions if c.status == "True" and c.type in ("Succeeded", "Published", "Ready")] == [
        ("Ready", "Restored"),
        ("Published", "Restored"),
        ("Succeeded", "Restored"),
    ]
    assert [a.uri for a in status.artifacts] == ["pvc://published/support"]
    assert [(form.name, form.state) for form in status.forms] == [("onnx", "Verified")]
    assert not workers(world) and "support-prepare-0" not in world.jobs, "prepare is stopped"


def test_words_of_a_check_that_cannot_be_read_restore_nothing() -> None:
    world = World(EVALUATED)
    world.settle()
    world.succeed("check", StageResult(reason="Restored", message="", result={"artifacts": [{"uri": 3}]}))
    world.settle()
    assert world.status.condition("Failed").reason == "CheckFailed"  # type: ignore[union-attr]


def test_a_gang_that_runs_is_not_held_up_by_a_check_that_is_new_to_it() -> None:
    """Begun under a release that did not check."""
    world = World(EVALUATED).to_training()
    raw = world.job["status"]
    raw["conditions"] = [c for c in raw["conditions"] if c["type"] != "TargetsReady"]
    world.jobs.pop("support-check-0")
    world.settle()
    assert world.status.phase == "Training" and "support-check-0" not in world.jobs


def test_a_bad_dataset_fails_before_any_gpu() -> None:
    world = World(TWO)
    world.settle()
    world.fail("prepare", ExitCode.USER_ERROR, StageResult(reason="InvalidRows", message="2 row(s): line 3").dumps())
    world.settle()
    assert world.status.phase == "Failed"
    assert world.status.condition("Failed").reason == "InvalidRows"  # type: ignore[union-attr]
    assert not workers(world)


def test_a_stage_is_retried_after_infrastructure_failures_then_fails() -> None:
    world = World()
    for retry in range(SETTINGS.stage_retries):
        world.settle()
        assert f"support-prepare-{retry}" in world.jobs
        world.fail(f"prepare-{retry}", 1, "Traceback ... boom")
        world.settle()
        world.time += 25
    world.settle()
    world.fail("prepare-3", 1, "boom")
    world.settle()
    assert world.status.condition("Failed").reason == "PrepareFailed"  # type: ignore[union-attr]
    assert "boom" in world.status.condition("Failed").message  # type: ignore[union-attr]


def test_f27_an_evaluation_that_does_not_end_is_tried_again_then_fails_and_keeps_the_adapter() -> None:
    world = World(merged(EVALUATED, runPolicy={"stageTimeout": "1h"})).to_training()
    world.succeed("worker", TRAINED)
    for retry in range(SETTINGS.stage_retries + 1):
        world.settle()
        world.run(f"evaluate-{retry}")
        world.settle()
        assert world.step().requeue_at is not None
        world.time += 3601
        world.settle()
        world.time += 100
    world.settle()
    failed = world.status.condition("Failed")
    assert failed is not None and failed.reason == "EvaluateFailed" and "stageTimeout" in failed.message
    assert not world.status.artifacts and not [name for name in world.jobs if "evaluate" in name or "publish" in name], (
        "nothing is published or runs on"
    )
    assert world.status.is_true("Trained"), "the adapter is in the workspace"


def test_a_stage_is_not_tried_again_while_a_pod_of_the_last_try_runs() -> None:
    """Deleting a Job in the background takes it away first, and its pods when they have ended."""
    world = World(merged(EVALUATED, runPolicy={"stageTimeout": "1h"})).to_training()
    world.succeed("worker", TRAINED)
    world.settle()
    world.run("evaluate-0")
    world.settle()
    pod = dataclasses.replace(world.pod("evaluate-0"), job_uid="", stage="evaluate", node="n1", deleting=True)
    world.time = 3601
    world.left = (pod,)
    world.settle()
    assert "support-evaluate-0" not in world.jobs and "support-evaluate-1" not in world.jobs
    assert "support-evaluate-0-x" in world.status.condition("Evaluated").message  # type: ignore[union-attr]
    for ends in ({"left": ()}, {"left": (dataclasses.replace(pod, phase="Failed"),)}, {"lost": frozenset({"n1"})}):
        other = copy.deepcopy(world)
        vars(other).update(ends)
        other.settle()
        assert "support-evaluate-1" in other.jobs, ends


def test_f31_a_back_off_of_a_clock_that_was_wrong_holds_nothing_up() -> None:
    world = World()
    world.settle()
    world.time = 86400
    for retry in range(2):
        world.fail(f"prepare-{retry}", 1)
        world.settle()
    assert "support-prepare-2" not in world.jobs, "backing off, until tomorrow as it seems"
    world.time = 5
    world.settle()
    assert "support-prepare-2" in world.jobs


def test_retries_back_off() -> None:
    world = World()
    world.settle()
    world.fail("prepare-0", 1)
    world.settle()
    assert "support-prepare-1" in world.jobs, "the first retry is at once"
    world.fail("prepare-1", 1)
    plan = world.step()
    assert plan.requeue_at == after(10)
    world.settle()
    assert "support-prepare-2" not in world.jobs
    world.time = 11
    world.settle()
    assert "support-prepare-2" in world.jobs


def test_a_stage_without_words_is_tried_again() -> None:
    world = World()
    world.settle()
    world.succeed("prepare", "no json")
    world.settle()
    assert "support-prepare-1" in world.jobs


def test_prepare_of_another_version() -> None:
    world = World()
    world.settle()
    world.succeed("prepare", StageResult(reason="DataReady", result={"dataset": {}, "plan": {}}))
    world.settle()
    assert "prepare ended with a result that the operator cannot read" in world.status.condition("Failed").message  # type: ignore[union-attr]


def test_a_job_is_cancelled_for_good() -> None:
    world = World(TWO).to_training()
    world.job["spec"]["runPolicy"] = {"cancel": True}
    world.settle()
    assert world.status.phase == "Failed" and world.status.condition("Failed").reason == "Cancelled"  # type: ignore[union-attr]
    assert workers(world) == []
    world.job["spec"]["runPolicy"] = {"cancel": False}
    world.settle()
    assert world.status.phase == "Failed" and workers(world) == [], "what has ended does not begin again"


def test_f8_one_failing_worker_restarts_the_whole_gang() -> None:
    world = World(TWO).to_training()
    assert workers(world) == [(0, 0), (1, 0)]
    world.fail("worker-1", 1, "NCCL error: unhandled cuda error")
    plan = world.step()
    assert not plan.actions, "the decision goes on record before the evidence is deleted"
    assert world.status.attempt == 1
    restart = world.status.restarts[0]
    assert (restart.pod, restart.cause, restart.counted) == ("support-worker-1", "Infrastructure", True)
    assert "NCCL error" in restart.message
    world.settle()
    assert workers(world) == [(0, 1), (1, 1)]
    assert "GangRestarted" in world.events
    world.run("worker")
    world.settle()
    world.succeed("worker-0", TRAINED)
    world.succeed("worker-1", "")
    world.settle()
    assert world.status.phase == "Succeeded"


def test_the_first_failing_pod_is_named() -> None:
    world = World(TWO).to_training()
    world.fail("worker-0", 1, "connection closed by peer")
    world.time = 2
    world.fail("worker-1", ExitCode.USER_ERROR, StageResult(reason="NonFiniteLoss", message="nan").dumps())
    world.settle()
    assert world.status.condition("Failed").reason == "NonFiniteLoss", "a user error explains more than what it broke"  # type: ignore[union-attr]


def test_f8_the_worker_that_was_lost_is_named_not_the_one_that_lost_it() -> None:
    world = World(TWO).to_training()
    lost = StageResult(reason="PeerLost", message="Connection reset by peer").dumps()
    world.fail("worker-0", ExitCode.INFRASTRUCTURE, lost)
    assert world.step().requeue_at is not None
    assert world.status.attempt == 0, "a moment for the other's last words"
    world.time = 2
    world.fail("worker-1", 137)
    world.settle()
    assert world.status.restarts[0].pod == "support-worker-1"


def test_f8_a_lost_peer_that_stays_silent_is_not_waited_for() -> None:
    world = World(TWO).to_training()
    world.fail("worker-0", ExitCode.INFRASTRUCTURE, StageResult(reason="PeerLost", message="x").dumps())
    world.step()
    world.time = 16
    world.step()
    assert world.status.attempt == 1 and world.status.restarts[0].pod == "support-worker-0"


def test_restarts_are_limited() -> None:
    world = World(merged(MINIMAL, runPolicy={"maxRestarts": 2})).to_training()
    for _ in range(3):
        world.fail("worker", 1)
        world.settle()
        world.time += 1000
        world.settle()
        world.run("worker")
        world.settle()
    status = world.status
    assert status.condition("Failed").reason == "TooManyRestarts"  # type: ignore[union-attr]
    assert status.restarts_counted == 2


def test_a_plan_that_somebody_took_away_is_read_again_from_prepare() -> None:
    """And the gang goes on: nothing is prepared or started anew."""
    world = World(TWO).to_training()
    pods, jobs, plan = dict(world.pods), set(world.jobs), world.status.plan
    del world.job["status"]["plan"]
    world.settle()
    assert world.status.plan == plan and world.status.phase == "Training" and world.status.is_true("DataReady")
    assert (world.pods, set(world.jobs)) == (pods, jobs)


def test_disruptions_do_not_count() -> None:
    world = World(merged(MINIMAL, runPolicy={"maxRestarts": 0})).to_training()
    world.fail("worker", 137, disrupted=True)
    world.settle()
    assert (world.status.attempt, world.status.restarts_counted) == (1, 0)
    assert world.status.restarts[0].cause == "Disruption"


def test_the_budget_refills_with_every_new_checkpoint() -> None:
    """A job of a week is not killed by its sixth node failure; one that makes no progress is, soon."""
    world = World(merged(MINIMAL, runPolicy={"maxRestarts": 1})).to_training()
    for step in (10, 20, 30):
        world.report = ProgressReport(attempt=world.status.attempt, step=step + 1, total_steps=100, checkpoint_step=step)
        world.settle()
        world.fail("worker", 1)
        world.settle()
        world.run("worker")
        world.settle()
    assert world.status.phase == "Training" and [r.checkpoint_step for r in world.status.restarts] == [10, 20, 30]
    assert world.status.restarts_counted == 1
    world.fail("worker", 1)
    world.settle()
    assert world.status.condition("Failed").reason == "TooManyRestarts"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("rules", "code", "reason", "phase", "counted"),
    [
        ([], ExitCode.USER_ERROR, "NonFiniteLoss", "Failed", 0),
        ([{"action": "RestartGang", "onReasons": ["NonFiniteLoss"]}], ExitCode.USER_ERROR, "NonFiniteLoss", "Starting", 1),
        ([{"action": "RestartGang", "onReasons": ["NonFiniteLoss"]}], ExitCode.USER_ERROR, "InvalidRows", "Failed", 0),
        ([{"action": "FailJob", "onCauses": ["Hang"]}], ExitCode.HANG, "Hang", "Failed", 0),
        ([{"action": "FailJob", "onCauses": ["Hang"]}], ExitCode.INFRASTRUCTURE, "DeviceMismatch", "Starting", 1),
        ([{"action": "RestartGangAndIgnoreMaxRestarts", "onExitCodes": {"values": [12]}}], ExitCode.INFRASTRUCTURE, "X", "Starting", 0),
        ([{"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [14]}}], ExitCode.INFRASTRUCTURE, "X", "Failed", 0),
        (
            [{"action": "RestartGang", "onCauses": ["Infrastructure"], "onReasons": ["A"]}, {"action": "FailJob"}],
            ExitCode.INFRASTRUCTURE,
            "B",
            "Failed",
            0,
        ),
        ([{"action": "FailJob"}], ExitCode.STOPPED, "Stopped", "Starting", 0),
    ],
)
def test_the_users_failure_policy(rules: list[Any], code: int, reason: str, phase: str, counted: int) -> None:
    world = World(merged(MINIMAL, runPolicy={"failurePolicy": {"rules": rules}})).to_training()
    world.fail("worker", code, StageResult(reason=reason, message="m").dumps())
    world.step()
    assert (world.status.phase, world.status.restarts_counted) == (phase, counted)
    if rules and phase == "Failed" and code != ExitCode.USER_ERROR:
        assert f"runPolicy.failurePolicy rule {len(rules)}: FailJob" in world.status.condition("Failed").message  # type: ignore[union-attr]


def test_f25_the_checkpoint_of_a_stop_is_taken_from_the_last_words() -> None:
    world = World(TWO).to_training()
    world.job["spec"]["runPolicy"] = {"suspend": True}
    world.step()
    words = StageResult(reason="Stopped", message="stopped on request", result={"checkpointStep": 42}).dumps()
    for rank in (0, 1):
        world.fail(f"worker-{rank}", ExitCode.STOPPED, words)
    world.settle()
    assert world.status.phase == "Suspended" and world.status.checkpoint is not None and world.status.checkpoint.step == 42
    assert world.status.restarts[-1].reason == "Suspended" and world.status.restarts_counted == 0
    world.job["spec"]["runPolicy"] = {"suspend": False}
    world.settle()
    assert workers(world) == [(0, 1), (1, 1)] and world.status.retry_after is None


def test_pods_get_the_time_to_save_only_where_they_can() -> None:
    """Without one of its pods a gang can save nothing: waiting for it would hold GPUs for nothing."""
    broken = World(TWO).to_training()
    broken.fail("worker-1", 1)
    broken.step()
    deleted = {a.name: a.grace_seconds for a in broken.step().actions if isinstance(a, Delete)}
    assert deleted == {"support-worker-0": 10, "support-worker-1": 10}
    suspended = World(merged(TWO, runPolicy={"suspend": False})).to_training()
    suspended.job["spec"]["runPolicy"]["suspend"] = True
    suspended.step()
    deleted = {a.name: a.grace_seconds for a in suspended.step().actions if isinstance(a, Delete)}
    assert deleted == {"support-worker-0": None, "support-worker-1": None}


def test_f11_a_drained_pod_makes_the_gang_save_and_end() -> None:
    """The attempt ends when the gang has, with the checkpoint that it saved: nothing is lost, and nothing is counted."""
    world = World(TWO).to_training()
    world.set(world.pod("worker-1"), deleting=True)
    world.settle()
    assert world.status.condition("Running").reason == "Stopping" and world.status.attempt == 0  # type: ignore[union-attr]
    assert workers(world) == [(0, 0), (1, 0)], "nothing is deleted: it ends by itself"
    world.time = 20
    words = StageResult(reason="Stopped", message="stopped on request at step 42", result={"checkpointStep": 42}).dumps()
    world.fail("worker-1", ExitCode.STOPPED, words)
    world.fail("worker-0", ExitCode.STOPPED, words)
    world.settle()
    restart = world.status.restarts[0]
    assert (restart.cause, restart.counted, restart.checkpoint_step, restart.pod) == ("Disruption", False, 42, "support-worker-1")
    assert "pod support-worker-1 was deleted; stopped on request" in restart.message
    del world.pods["support-worker-1"]
    world.settle()
    assert world.status.usage.lost_seconds == 0 and workers(world) == [(0, 1), (1, 1)]


@pytest.mark.parametrize("gone", [True, False])
def test_f11_a_gang_that_does_not_end_is_not_waited_for_for_ever(gone: bool) -> None:
    world = World(TWO).to_training()
    world.set(world.pod("worker-1"), deleting=True)
    world.settle()
    if gone:
        del world.pods["support-worker-1"]
        world.settle()
    world.time = 14
    world.settle()
    assert world.status.attempt == 0
    world.time = 16 if gone else SETTINGS.termination_grace_seconds + 16
    world.settle()
    assert world.status.attempt == 1 and world.status.restarts[0].cause == "Disruption"


def test_f10_a_pod_on_a_lost_node_is_not_waited_for() -> None:
    world = World(TWO).to_training()
    world.set(world.pod("worker-1"), deleting=True, node="n1")
    plan = world.step()
    assert world.status.attempt == 0 and plan.requeue_at is not None, "its node answers: it is waited for"
    world.lost = frozenset({"n1"})
    world.step()
    assert world.status.attempt == 1 and world.status.restarts[0].node == "n1"
    plan = world.step()
    assert [(a.name, a.grace_seconds) for a in plan.actions if isinstance(a, Delete)] == [
        ("support-worker-0", None),
        ("support-worker-1", 0),
    ]
    assert [e.reason for e in plan.events] == ["PodForceDeleted"]


def test_f18_skipped_checkpoints_are_said_once() -> None:
    world = World().to_training()
    world.report = ProgressReport(
        attempt=0, step=8, total_steps=100, checkpoint_step=7, checkpoint_every=90, resumed_from=7, skipped_checkpoints=[21, 14]
    )
    world.settle()
    saved = world.status.checkpoint
    assert saved is not None and (saved.resumed_from, saved.skipped, saved.every) == (7, [21, 14], "1m30s")
    assert world.events.count("CheckpointSkipped") == 1


def test_lost_seconds_are_counted_from_the_last_checkpoint() -> None:
    world = World().to_training()
    world.time = 100
    world.report = ProgressReport(attempt=0, step=8, total_steps=100, checkpoint_step=7)
    world.settle()
    world.time = 130
    world.fail("worker", 1)
    world.settle()
    assert world.status.usage.lost_seconds == 30


def test_f9_out_of_memory_halves_the_batch_and_keeps_the_global_batch() -> None:
    world = World().to_training()
    for expected in ((2, 8), (1, 16)):
        world.fail("worker", ExitCode.OUT_OF_MEMORY)
        world.settle()
        world.time += 1000
        world.settle()
        plan = world.status.plan
        assert plan is not None and (plan.per_device_batch_size, plan.gradient_accumulation) == expected
        world.run("worker")
        world.settle()
    world.fail("worker", 137, reason="OOMKilled")
    world.settle()
    assert world.status.condition("Failed").reason == "OutOfMemory"  # type: ignore[union-attr]
    assert "gradientCheckpointing" in world.status.condition("Failed").message  # type: ignore[union-attr]


def test_f21_a_deleted_worker_restarts_the_gang() -> None:
    world = World(TWO).to_training()
    del world.pods["support-worker-1"]
    world.settle()
    assert workers(world) == [(0, 1), (1, 1)]
    assert world.status.restarts[0].reason == "PodDeleted"
    assert world.status.restarts_counted == 0


def test_f1_a_gang_that_was_half_created_is_completed_not_restarted() -> None:
    world = World(TWO)
    world.settle()
    world.succeed("prepare", PREPARED)
    world.step()  # DataReady is on record
    world.step()  # both pods exist, their UIDs are not on record
    world.job["status"].pop("gang", None)
    del world.pods["support-worker-1"]
    world.settle()
    assert workers(world) == [(0, 0), (1, 0)]
    assert world.status.attempt == 0 and not world.status.restarts


def test_f21_deleted_shared_objects_come_back() -> None:
    world = World(TWO).to_training()
    world.applied.clear()
    world.settle()
    assert {kind for kind, _ in world.applied} == {"ConfigMap", "PersistentVolumeClaim", "Service"}
    assert world.status.attempt == 0


def test_f21_a_deleted_stage_job_comes_back() -> None:
    world = World()
    world.settle()
    world.jobs.clear()
    world.pods.clear()
    world.settle()
    assert "support-prepare-0" in world.jobs


def test_a_job_whose_pod_was_deleted_is_retried() -> None:
    world = World()
    world.settle()
    world.pods.clear()
    name = "support-prepare-0"
    world.jobs[name] = dataclasses.replace(world.jobs[name], failed=True, message="pod deleted")
    plan = world.step()
    assert plan.requeue_at is not None
    world.time = 30
    world.settle()
    assert "support-prepare-1" in world.jobs


def test_f14_image_pull_failure_is_said_and_resources_are_given_back() -> None:
    world = World(merged(TWO, runPolicy={"gangTimeout": "2m"}))
    world.settle()
    world.succeed("prepare", PREPARED)
    world.settle()
    waiting = {"waiting_reason": "ImagePullBackOff", "waiting_message": 'Back-off pulling image "nope"'}
    world.set(world.pods["support-worker-0"], **waiting)
    world.settle()
    running = world.status.condition("Running")
    assert running is not None and running.reason == "ImagePullFailed" and 'Back-off pulling image "nope"' in running.message
    world.time = 121
    world.step()
    assert world.status.attempt == 1
    restart = world.status.restarts[0]
    assert (restart.reason, restart.counted) == ("GangTimeout", False)
    assert "gangTimeout" in restart.message
    world.settle()
    assert all(attempt == 1 for _, attempt in workers(world))


def test_f15_repeated_gang_timeouts_back_off() -> None:
    world = World(merged(MINIMAL, runPolicy={"gangTimeout": "1m"}))
    world.settle()
    world.succeed("prepare", PREPARED)
    world.settle()
    for _ in range(2):
        world.time += 61
        world.settle()
    assert world.status.retry_after is not None
    assert world.status.phase == "Queued"
    assert not workers(world)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("unschedulable", "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.", "Unschedulable"),
        ("waiting_reason", "CreateContainerConfigError", "ContainerNotStarted"),
        ("waiting_reason", "ErrImagePull", "ImagePullFailed"),
    ],
)
def test_why_a_stage_does_not_start(field: str, value: str, reason: str) -> None:
    world = World(merged(MINIMAL, runPolicy={"gangTimeout": "1m"}))
    world.settle()
    world.set(world.pod("prepare"), **{field: value})
    world.settle()
    condition = world.status.condition("DataReady")
    assert condition is not None and (condition.status, condition.reason) == ("False", reason)
    world.time = 61
    world.settle()
    assert "support-prepare-1" in world.jobs and "support-prepare-0" not in world.jobs


def test_f29_the_gate() -> None:
    world = World(EVALUATED).to_training()
    world.succeed("worker", TRAINED)
    world.settle()
    lost = COMPARED.model_copy(update={"result": {**COMPARED.result, "gate": "NotPassed"}})
    world.succeed("evaluate", lost)
    world.settle()
    failed = world.status.condition("Failed")
    assert failed is not None and failed.reason == "GateNotPassed"
    assert "nothing was published" in failed.message
    assert not any("publish" in name for name in world.jobs)


@pytest.mark.parametrize(("policy", "phase", "reason"), [("fail", "Failed", "GateInconclusive"), ("publish", "Publishing", None)])
def test_a_gate_that_cannot_tell_publishes_only_when_asked_to(policy: str, phase: str, reason: str | None) -> None:
    spec = merged(EVALUATED, evaluation={**EVALUATED["evaluation"], "gate": {"metric": "loss", "onInconclusive": policy}})
    world = World(spec).to_training()
    world.succeed("worker", TRAINED)
    world.settle()
    world.succeed("evaluate", COMPARED.model_copy(update={"result": {**COMPARED.result, "gate": "Inconclusive"}}))
    world.settle()
    failed = world.status.condition("Failed")
    assert world.status.phase == phase and (failed.reason if failed is not None else None) == reason
    assert any("publish" in name for name in world.jobs) == (policy == "publish")


def test_prompting_may_do_is_the_reason_and_an_event() -> None:
    world = World(EVALUATED).to_training()
    world.succeed("worker", TRAINED)
    world.settle()
    world.succeed("evaluate", COMPARED.model_copy(update={"reason": "PromptingMayDo", "message": "the base with 4 examples"}))
    world.settle()
    evaluated = world.status.condition("Evaluated")
    assert evaluated is not None and (evaluated.status, evaluated.reason) == ("True", "PromptingMayDo")
    assert world.events.count("PromptingMayDo") == 1


def test_f22_nothing_is_done_for_a_job_that_is_being_deleted() -> None:
    world = World(deletionTimestamp=stamp(NOW))
    assert reconcile(world.observed(), SETTINGS) == Plan()


def test_a_terminal_state_is_terminal() -> None:
    world = World(EVALUATED).to_training()
    for part, result in (("worker", TRAINED), ("evaluate", COMPARED), ("publish", PUBLISHED)):
        world.succeed(part, result)
        world.settle()
    before = world.job["status"]
    world.pods.clear()
    world.jobs.clear()
    world.applied.clear()
    world.settle()
    assert world.job["status"] == before
    assert not world.pods and not world.jobs


def test_a18_a_wiped_status_is_derived_again() -> None:
    world = World(EVALUATED).to_training()
    world.fail("worker", 1)
    world.settle()
    world.run("worker")
    world.settle()
    world.job["status"] = {"phase": "Succeeded", "conditions": "nonsense", "attempt": -5}
    world.decision = Decision(action="keep", reason=RECOVERED)
    world.settle()
    assert world.status.phase == "Training"
    assert world.status.attempt == 1, "the pods know their attempt"
    assert world.status.dataset is not None and world.status.dataset.train == 90


@pytest.mark.parametrize("forged", ["admission", "seal", "key", "another job's", "unchecked"])
def test_a18_what_pods_say_of_their_admission_is_believed_with_the_operators_seal_alone(forged: str) -> None:
    """Whoever may edit pods could take quota: with a wiped status, their annotations were the record."""
    world = World(TWO).to_training()
    pods = {name: pod for name, pod in world.pods.items() if pod.stage == "train"}
    greedy = json.dumps({**json.loads(pods["support-worker-0"].admission), "queue": "of-somebody-else"})
    changed = {
        "admission": lambda pod: {"admission": greedy},
        "seal": lambda pod: {"seal": ""},
        "key": lambda pod: {"seal": seal("guessed", UID, pod.admission)},
        "another job's": lambda pod: {"admission": greedy, "seal": seal(SETTINGS.seal_key, "uid-of-another", greedy)},
        "unchecked": lambda pod: {},
    }[forged]
    for name, pod in pods.items():
        world.pods[name] = dataclasses.replace(pod, **changed(pod))
    world.job["status"] = {}
    world.decision = Decision(action="wait", reason="WaitingForQuota", message="no room")
    if forged != "unchecked":  # quota has room, as the admission loop may have said of the record before
        world.decision = Decision(action="keep", reason=RECOVERED)
    world.settle()
    assert not world.status.is_true("Admitted") and not workers(world), "it gives its pods back, and waits for its turn"


def test_a18_a_gang_whose_record_was_wiped_runs_on_until_quota_was_looked_at() -> None:
    world = World(TWO).to_training()
    world.job["status"], made = {}, world.count
    for decision in (None, Decision(action="keep"), Decision(action="preempt", message="as of before")):
        world.decision = decision
        world.settle()
        assert not world.status.is_true("Admitted") and len(workers(world)) == 2
    world.decision = Decision(action="keep", reason=RECOVERED)
    world.settle()
    assert world.status.condition("Admitted").reason == "Recovered" and world.status.phase == "Training"  # type: ignore[union-attr]
    assert len(workers(world)) == 2 and world.count == made, "nothing was made anew"


def test_a_dashboard_for_kueues_workloads_reads_ours() -> None:
    world = World(TWO).to_training()

    def told(type_: Any) -> tuple[str, str] | None:
        return (c.status, c.reason) if (c := world.status.condition(type_)) is not None else None

    assert told("QuotaReserved") == ("True", "QuotaReserved") and told("Evicted") is None and told("Finished") is None
    world.decision = Decision(action="preempt", reason="Preempted", message="for team-b/urgent")
    world.settle()
    world.decision = Decision(action="wait", reason="WaitingForQuota", message="4 GPUs are free")
    world.settle()
    assert told("QuotaReserved") == ("False", "Pending") and world.status.condition("QuotaReserved").message == "4 GPUs are free"  # type: ignore[union-attr]
    assert told("Evicted") == ("True", "Preempted") and told("Preempted") == ("True", "InClusterQueue")
    world.decision = granted(2)
    world.settle()
    assert told("Evicted") == told("Preempted") == ("False", "QuotaReserved")
    world.job["spec"]["runPolicy"] = {"cancel": True}
    world.settle()
    assert told("Finished") == ("True", "Failed")


def test_suspend_and_resume() -> None:
    world = World(TWO).to_training()
    world.job["spec"]["runPolicy"] = {"suspend": True}
    world.settle()
    assert world.status.phase == "Suspended" and not workers(world)
    assert world.status.restarts[0].reason == "Suspended" and world.status.restarts_counted == 0
    world.job["spec"]["runPolicy"] = {"suspend": False}
    world.settle()
    assert workers(world) == [(0, 1), (1, 1)]
    assert world.status.condition("Suspended").status == "False"  # type: ignore[union-attr]


def test_suspend_before_anything_started() -> None:
    world = World(merged(MINIMAL, runPolicy={"suspend": True}))
    world.settle()
    assert world.status.phase == "Suspended" and not world.jobs


def test_f26_deadline_and_ttl() -> None:
    world = World(merged(MINIMAL, runPolicy={"activeDeadline": "1h", "ttlAfterFinished": "1d"})).to_training()
    assert world.step().requeue_at == after(3600)
    world.time = 3601
    world.settle()
    assert world.status.condition("Failed").reason == "DeadlineExceeded"  # type: ignore[union-attr]
    assert not workers(world)
    plan = world.step()
    assert plan.requeue_at == after(3601 + 86400)
    world.time = 3602 + 86400
    assert Delete("FineTuneJob", "support", UID) in world.step().actions


def test_a_bad_ttl_in_a_finished_job_is_harmless() -> None:
    world = World(merged(MINIMAL, runPolicy={"ttlAfterFinished": "soon"}))
    world.settle()
    assert world.status.phase == "Failed"
    world.settle()


def test_progress_is_taken_from_the_current_attempt_only() -> None:
    world = World().to_training()
    world.report = ProgressReport(
        attempt=0, step=5, total_steps=10, loss=1.23456, eta_seconds=61, checkpoint_step=4, tokens_per_second=9.99
    )
    plan = world.step()
    assert plan.due is WriteUrgency.LATER, "progress alone may wait"
    progress = world.status.progress
    assert progress is not None
    assert (progress.percent, progress.loss, progress.eta, progress.tokens_per_second) == (50, 1.2346, "1m1s", 10.0)
    assert world.status.checkpoint is not None and world.status.checkpoint.step == 4
    world.report = ProgressReport(attempt=0, step=3, total_steps=10)
    world.settle()
    assert world.status.progress.step == 5, "never back within an attempt"  # type: ignore[union-attr]
    world.fail("worker", 1)
    world.settle()
    assert world.status.progress is None, "cleared on restart"
    world.report = ProgressReport(attempt=0, step=9, total_steps=10)
    world.run("worker")
    world.settle()
    assert world.status.progress is None, "a late report of the old attempt"


def test_f35_a_refusal_of_the_api_server_is_shown_and_taken_back() -> None:
    world = World()
    world.settle()
    plan = refused(world.observed(), SETTINGS, 'pods "x" is forbidden: exceeded quota')
    assert plan.status is not None and plan.actions == ()
    assert [e.reason for e in plan.events] == ["APIRefused"]
    world.job["status"] = plan.status.to_wire()
    assert "exceeded quota" in world.status.condition("Accepted").message  # type: ignore[union-attr]
    again = refused(world.observed(), SETTINGS, 'pods "x" is forbidden: exceeded quota')
    assert (again.status, again.events) == (None, ()), "said once"
    world.settle()
    assert world.status.condition("Accepted").reason == "Valid"  # type: ignore[union-attr]


def test_gpu_seconds_are_counted_by_attempt() -> None:
    world = World(merged(MINIMAL, distribution={"nodes": 2, "gpusPerNode": 4})).to_training()
    world.time = 100
    world.fail("worker-0", 1)
    world.settle()
    assert world.status.usage.gpu_seconds == 800
    assert world.status.total_gpus == 8


def test_foreign_attempt_labels_do_not_confuse() -> None:
    world = World(TWO).to_training()
    world.pods["extra"] = PodView(name="extra", uid="e", stage="train", rank=7, created=NOW, phase="Running", running=True)
    world.settle()
    assert "extra" not in world.pods


@pytest.mark.parametrize(
    ("pod", "cause", "message"),
    [
        ({"exit_code": 10, "message": StageResult(reason="InvalidRows", message="line 3").dumps()}, "UserError", "line 3"),
        ({"exit_code": 11}, "OutOfMemory", "exited 11"),
        ({"exit_code": 137, "reason": "OOMKilled"}, "OutOfMemory", "SIGKILL"),
        ({"exit_code": 137, "disrupted": True}, "Disruption", "SIGKILL"),
        ({"reason": "Evicted", "message": "The node was low on memory"}, "Disruption", "low on memory"),
        ({"exit_code": 13}, "Stopped", "exited 13"),
        ({"exit_code": 13, "disrupted": True}, "Stopped", "exited 13"),
        ({"exit_code": 14, "message": StageResult(reason="Hang", message="rank 3 gave no sign").dumps()}, "Hang", "rank 3"),
        ({"exit_code": 1, "message": "RuntimeError: CUDA error: unknown error"}, "Infrastructure", "a GPU or its driver failed"),
        ({"exit_code": 1, "message": "NVRM: Xid (PCI:0000:0f:00): 79, GPU has fallen off the bus"}, "Infrastructure", "a GPU"),
        ({"exit_code": 1, "message": "torch.OutOfMemoryError: CUDA out of memory."}, "OutOfMemory", "memory was not enough"),
        ({"exit_code": 1, "message": "OSError: [Errno 28] No space left on device"}, "Infrastructure", "the workspace is full"),
        ({"exit_code": 134, "message": "Watchdog caught collective: NCCL operation timed out"}, "Infrastructure", "another worker"),
        ({"exit_code": 1, "message": "x" * 5000}, "Infrastructure", "last words: ..."),
        ({"exit_code": 139, "message": "\x1b[31mred\x00"}, "Infrastructure", "?[31mred?"),
    ],
)
def test_the_failure_table(pod: dict[str, Any], cause: str, message: str) -> None:
    failure = classify(PodView(name="p", uid="u", stage="train", phase="Failed", created=NOW, **pod))
    assert failure.cause == cause
    assert message in failure.message
    assert len(failure.message) < 2000


def test_first_failure_by_time() -> None:
    early = PodView(name="a", uid="1", stage="train", rank=1, phase="Failed", created=NOW, finished=after(1), exit_code=1)
    late = PodView(name="b", uid="2", stage="train", rank=0, phase="Failed", created=NOW, finished=after(60), exit_code=10)
    assert first_failure([late, early]).pod == "a"


def test_a_second_pass_changes_nothing() -> None:
    """Idempotence at every point of the undisturbed story."""
    world = World(EVALUATED)
    for part, result in (("", None), *RESULTS.items()):
        if result is not None:
            world.succeed("worker" if part == "train" else part, result)
        world.settle()
        before = world.count
        world.settle()
        assert world.count == before


def test_every_action_is_of_a_known_kind() -> None:
    world = World(EVALUATED)
    plan = world.step()
    assert all(isinstance(a, Apply | Create | Delete) for a in plan.actions)
