"""The operator as a machine: every order in which an API server may deliver what happened.

The real controller, store and reconcile run against a server in memory. Hypothesis chooses what is delivered, late, twice
or never; which request fails, before or after it was carried out; when the operator dies; and what pods, users and
kubelets do meanwhile. Whatever it chooses, the invariants hold, and once it stops interfering the job ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finetune_api import names
from finetune_api.contract import ExitCode, StageResult
from finetune_api.lenient import read_status
from finetune_operator.cache import objects, store
from finetune_operator.cache.progress import ProgressBoard
from finetune_operator.cache.store import Store
from finetune_operator.cluster import reflector
from finetune_operator.cluster.errors import APIError
from finetune_operator.controllers import admission, controller, jobs, queue_status, resync, writer
from finetune_operator.controllers.manager import Manager
from finetune_operator.model.objects import Object
from finetune_operator.model.queueing import Decision
from finetune_operator.settings import Settings
from tests.factory import MINIMAL, NOW, RESULTS, after, container_status, ended, job, merged, stamp
from tests.listing import InMemory

KEY = ("team-a", "support")
LATER = NOW + timedelta(days=7)
"""When the operator looks at the job."""
SPEC = merged(
    MINIMAL,
    dataset={"train": {"uri": "configmap://rows/train.jsonl"}, "eval": {"splitFraction": 0.1}},
    distribution={"nodes": 2, "gpusPerNode": 0},
    evaluation={"gate": {"minImprovement": 0.1}},
    publish=[{"uri": "pvc://published/support"}],
    runPolicy={"maxRestarts": 1000, "gangTimeout": "30d"},
)
SETTINGS = Settings(progress_url="none", backoff_base_seconds=0, stage_retries=1000, status_interval_seconds=0, snapshot_seconds=0)


class Died(BaseException):
    """The operator's process is gone."""


class Server(InMemory):
    """Objects by (kind, name) with versions; what happens is noted for the watch. Requests fail when told to."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.watch: list[tuple[str, Object, bool]] = []
        self.count = itertools.count(1)
        self.trouble: tuple[int, str] | None = None
        """(requests left, what happens then): refuse, lose (the answer, not the request), die, die-after."""
        self.broken: list[str] = []
        self.skew = 0.0
        """Seconds that its clock goes wrong by."""
        self.looks = 0
        """How often its clock was asked: time goes on by that, the same in every run of an example."""

    def put(self, kind: str, raw: Object) -> Object:
        raw["metadata"]["resourceVersion"] = str(next(self.count))
        self.objects[kind, raw["metadata"]["name"]] = raw
        self.watch.append((kind, copy.deepcopy(raw), False))
        return copy.deepcopy(raw)

    def remove(self, kind: str, name: str) -> None:
        gone = self.objects.pop((kind, name))
        gone["metadata"]["resourceVersion"] = str(next(self.count))
        self.watch.append((kind, copy.deepcopy(gone), True))
        for (other, child), raw in list(self.objects.items()):  # the garbage collector
            if any(o["uid"] == gone["metadata"]["uid"] for o in raw["metadata"].get("ownerReferences", [])):
                self.remove(other, child)

    def of(self, kind: str) -> list[Object]:
        return [raw for (k, _), raw in sorted(self.objects.items()) if k == kind]

    def _before(self) -> bool:
        """Count a request down; True when its answer is to be lost."""
        if self.trouble is None:
            return False
        left, what = self.trouble
        if left > 0:
            self.trouble = (left - 1, what)
            return False
        self.trouble = None
        if what == "refuse":
            raise APIError(503, "Unavailable", "try again")
        if what == "die":
            raise Died
        return True

    async def _request(self, do: Any) -> Any:
        lost = self._before()
        result = do()
        if lost:
            raise Died if next(self.count) % 2 else APIError(0, "Unreachable", "connection reset")
        return result

    # what the controller asks for

    async def apply(self, manifest: Object) -> Object:
        def do() -> Object:
            kind, name = manifest["kind"], manifest["metadata"]["name"]
            old = self.objects.get((kind, name))
            raw = copy.deepcopy(manifest)
            raw["metadata"]["uid"] = old["metadata"]["uid"] if old else f"uid-{next(self.count)}"
            return self.put(kind, raw)

        return await self._request(do)  # type: ignore[no-any-return]

    async def create(self, manifest: Object) -> Object:
        def do() -> Object:
            kind, name = manifest["kind"], manifest["metadata"]["name"]
            if kind == "Event":
                return manifest
            if (kind, name) in self.objects:
                raise APIError(409, "AlreadyExists", name)
            raw = copy.deepcopy(manifest)
            raw["metadata"] |= {"uid": f"uid-{next(self.count)}", "creationTimestamp": stamp(NOW)}
            if kind == "Pod":
                raw["status"] = {"phase": "Pending"}
                gang = (self.objects["FineTuneJob", KEY[1]].get("status") or {}).get("gang") or {}
                if str(gang.get("attempt")) == raw["metadata"]["labels"][names.LABEL_ATTEMPT]:
                    self.broken.append(f"{name} of attempt {gang['attempt']} is made again")
            return self.put(kind, raw)

        return await self._request(do)  # type: ignore[no-any-return]

    async def get(self, kind: str, namespace: str, name: str) -> Object:
        def do() -> Object:
            if kind == "Node":
                return {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
            if (kind, name) not in self.objects:
                raise APIError(404, "NotFound", name)
            return copy.deepcopy(self.objects[kind, name])

        return await self._request(do)  # type: ignore[no-any-return]

    async def delete(self, kind: str, namespace: str, name: str, uid: str, grace_seconds: int | None = None) -> Object | None:
        def do() -> Object | None:
            raw = self.objects.get((kind, name))
            if raw is None or raw["metadata"]["uid"] != uid:
                return None
            if kind == "Pod" and raw["status"]["phase"] not in ("Succeeded", "Failed"):
                raw["metadata"]["deletionTimestamp"] = stamp(after(10))
                return self.put(kind, raw)
            self.remove(kind, name)
            return None

        return await self._request(do)  # type: ignore[no-any-return]

    async def replace(self, manifest: Object) -> Object:
        raise NotImplementedError

    def now(self) -> datetime:
        self.looks += 1
        return LATER + timedelta(seconds=self.skew + self.looks / 100)

    async def replace_status(self, raw: Object, *, urgent: bool = True) -> Object:
        def do() -> Object:
            old = self.objects.get(("FineTuneJob", raw["metadata"]["name"]))
            if old is None:
                raise APIError(404, "NotFound", "gone")
            if old["metadata"]["resourceVersion"] != raw["metadata"]["resourceVersion"]:
                raise APIError(409, "Conflict", "stale")
            return self.put("FineTuneJob", {**old, "metadata": dict(old["metadata"]), "status": copy.deepcopy(raw["status"])})

        return await self._request(do)  # type: ignore[no-any-return]

    async def list(self, kind: str, namespace: str = "", selector: str = "") -> AsyncIterator[Object]:
        found = await self._request(lambda: copy.deepcopy(self.of(kind)))
        for raw in found:
            yield raw

    async def review_token(self, token: str, audience: str) -> Object:
        raise NotImplementedError


class Machine(RuleBasedStateMachine):
    """One job."""

    def __init__(self) -> None:
        super().__init__()
        ticks = itertools.count()  # not this machine's clock, which makes a busy machine's runs differ
        clock = SimpleNamespace(monotonic=lambda: next(ticks) / 1000)
        self.clocks = contextlib.ExitStack()
        for module in (admission, controller, jobs, queue_status, resync, writer, reflector, objects, store):
            self.clocks.enter_context(mock.patch.object(module, "time", clock))

    @initialize(stage=st.sampled_from(["", "prepare", "check", "train", "train", "train", "evaluate", "publish"]), patient=st.booleans())
    def begin(self, stage: str, patient: bool) -> None:
        """Until a pod of that stage runs, nothing disturbs. `patient`: what may be written soon is not, as long as it may."""
        self.operator_settings = dataclasses.replace(SETTINGS, soon_seconds=3600.0 if patient else 0.0)
        self.server = Server()
        self.server.put("FineTuneJob", job(SPEC))
        self.faults = 0
        """Things that may end an attempt, at most once each."""
        self.finished: set[str] = set()
        """Stages of which a pod has ended with a result."""
        self.attempt, self.terminal = 0, None
        self.restart()
        for _ in range(100):
            if not stage or any(p["metadata"]["labels"][names.LABEL_STAGE] == stage for p in self.pods("Running")):
                break
            self.go_on(but=stage)

    def go_on(self, but: str = "") -> None:
        """Everybody does their part, but pods of one stage do not end."""
        self.deliver_everything()
        self.schedule(0, "")
        self.work(0, "")
        self.deletions_end(137)
        self.job_controller()
        self.pods_run()
        if not any(p["metadata"]["labels"][names.LABEL_STAGE] == but for p in self.pods("Running")):
            self.pods_succeed(0.0, True)

    def restart(self) -> None:
        """The operator starts anew and knows nothing."""
        self.server.trouble = None
        self.server.watch.clear()
        self.manager = Manager(self.server, Store(), ProgressBoard(), self.operator_settings)  # type: ignore[arg-type]
        asyncio.run(self.manager.resync.once())

    def run(self, what: Any) -> None:
        try:
            asyncio.run(what)
        except (Died, BaseExceptionGroup):
            self.restart()

    @property
    def status(self) -> Any:
        return read_status(self.server.objects["FineTuneJob", "support"].get("status"))

    # the operator

    @rule(after=st.integers(0, 6), what=st.sampled_from(["", "", "", "refuse", "lose", "die"]))
    def work(self, after: int, what: str) -> None:
        """One pass, in which a request may fail."""
        self.server.trouble = (after, what) if what else None
        self.run(self.manager.jobs.process(KEY))
        self.server.trouble = None

    @rule(after=st.integers(0, 6), what=st.sampled_from(["", "", "", "refuse", "die"]))
    def schedule(self, after: int, what: str) -> None:
        """One look at the queue."""
        self.server.trouble = (after, what) if what else None
        with contextlib.suppress(APIError):
            self.run(self.manager.admission.once())
        self.server.trouble = None

    @rule()
    def gives_way(self) -> None:
        """The scheduler wants the GPUs for somebody else."""
        if self.status.is_true("Admitted") and not self.status.is_true("Trained"):
            self.faults += 1
            uid = self.server.objects["FineTuneJob", KEY[1]]["metadata"]["uid"]
            self.manager.assumptions.decide(uid, Decision(action="preempt", reason="Preempted", message="for another"))

    @rule()
    def crash(self) -> None:
        self.restart()

    @rule(skew=st.sampled_from([0.0, 0.0, -86400.0, -30.0, 30.0, 86400.0]))
    def the_clock_is_set(self, skew: float) -> None:
        """Also to and fro."""
        self.server.skew = skew

    @rule()
    def look_at_everything(self) -> None:
        self.run(self.manager.resync.once())

    # the watch

    @precondition(lambda self: self.server.watch)
    @rule(place=st.floats(0, 1, exclude_max=True), fate=st.sampled_from(["once", "once", "again", "never"]))
    def deliver(self, place: float, fate: str) -> None:
        """Any of what happened, in any order: once, and perhaps again later, or never."""
        index = int(place * len(self.server.watch))
        kind, raw, deleted = self.server.watch[index]
        if fate != "again":
            del self.server.watch[index]
        if fate != "never":
            self.tell(kind, raw, deleted)

    @rule()
    def deliver_everything(self) -> None:
        while self.server.watch:
            self.tell(*self.server.watch.pop(0))

    def tell(self, kind: str, raw: Object, deleted: bool) -> None:
        if kind == "FineTuneJob":
            self.manager.object_event("FineTuneJob", copy.deepcopy(raw), deleted=deleted)
        else:
            self.manager.child_event(kind, copy.deepcopy(raw), deleted=deleted)

    # kubelets and the job controller

    @rule()
    def job_controller(self) -> None:
        """Pods of child Jobs, and their ends."""
        for child in self.server.of("Job"):
            meta = child["metadata"]
            pods = [p for p in self.server.of("Pod") if p["metadata"]["ownerReferences"][0]["uid"] == meta["uid"]]
            if child.get("status"):
                continue
            if not pods and not child.get("started"):
                child["started"] = True
                labels = {**child["spec"]["template"]["metadata"]["labels"]}
                owner = [{"kind": "Job", "name": meta["name"], "uid": meta["uid"], "controller": True}]
                uid = f"uid-{next(self.server.count)}"
                pod = {
                    "metadata": {"name": f"{meta['name']}-x", "namespace": KEY[0], "uid": uid, "labels": labels, "ownerReferences": owner}
                }
                pod["metadata"]["creationTimestamp"] = stamp(NOW)
                self.server.put("Pod", {**pod, "status": {"phase": "Pending"}})
            elif not pods or pods[0]["status"]["phase"] in ("Succeeded", "Failed"):
                good = bool(pods) and pods[0]["status"]["phase"] == "Succeeded"
                child["status"] = {"conditions": [{"type": "Complete" if good else "Failed", "status": "True"}]}
                self.server.put("Job", child)

    def pods(self, *phases: str) -> list[Object]:
        return [p for p in self.server.of("Pod") if p["status"]["phase"] in phases]

    @rule()
    def pods_run(self) -> None:
        for pod in self.pods("Pending"):
            if "deletionTimestamp" not in pod["metadata"]:
                running = {"phase": "Running", "containerStatuses": container_status({"running": {"startedAt": stamp(NOW)}})}
                self.server.put("Pod", {**pod, "status": running})

    def end(self, pod: Object, code: int, words: StageResult | None) -> None:
        self.server.put("Pod", {**pod, "status": ended(code, words.dumps() if words else "")})

    @rule(which=st.floats(0, 1, exclude_max=True), everything=st.booleans())
    def pods_succeed(self, which: float, everything: bool) -> None:
        running = [p for p in self.pods("Running") if "deletionTimestamp" not in p["metadata"]]
        chosen = running if everything else running[int(which * len(running)) :][:1]
        for pod in chosen:
            stage = pod["metadata"]["labels"][names.LABEL_STAGE]
            self.end(pod, 0, RESULTS[stage])
            if stage != "train":
                self.finished.add(stage)

    @precondition(lambda self: self.pods("Running"))
    @rule(which=st.floats(0, 1, exclude_max=True), code=st.sampled_from([1, 137, ExitCode.INFRASTRUCTURE, ExitCode.STOPPED, ExitCode.HANG]))
    def a_pod_fails(self, which: float, code: int) -> None:
        running = self.pods("Running")
        self.faults += 1
        self.end(running[int(which * len(running))], code, None)

    @precondition(lambda self: self.server.of("Pod"))
    @rule(which=st.floats(0, 1, exclude_max=True))
    def a_pod_is_drained(self, which: float) -> None:
        found = self.server.of("Pod")
        pod = found[int(which * len(found))]
        self.forgive(pod)
        self.faults += 1
        asyncio.run(self.server.delete("Pod", *KEY[:1], pod["metadata"]["name"], pod["metadata"]["uid"]))

    def forgive(self, pod: Object) -> None:
        """What is deleted by hand may have to be done again."""
        self.finished.discard(pod["metadata"]["labels"][names.LABEL_STAGE])

    @rule(code=st.sampled_from([ExitCode.STOPPED, 137]))
    def deletions_end(self, code: int) -> None:
        """Kubelets confirm: some pods have ended before, some vanish."""
        for pod in self.server.of("Pod"):
            if "deletionTimestamp" in pod["metadata"]:
                if code == ExitCode.STOPPED and pod["status"]["phase"] == "Running":
                    self.end(pod, code, StageResult(reason="Stopped", result={"checkpointStep": 5}))
                self.server.remove("Pod", pod["metadata"]["name"])

    # users

    @rule(kind=st.sampled_from(["Job", "ConfigMap", "Service"]))
    def a_child_is_deleted_by_hand(self, kind: str) -> None:
        for raw in self.server.of(kind)[:1]:
            if kind == "Job":
                self.finished.discard(raw["metadata"]["labels"][names.LABEL_STAGE])
            self.server.remove(kind, raw["metadata"]["name"])

    @rule(suspend=st.booleans())
    def suspend(self, suspend: bool) -> None:
        raw = self.server.objects["FineTuneJob", "support"]
        if raw["spec"]["runPolicy"].get("suspend", False) != suspend:
            self.faults += suspend
            policy = {**raw["spec"]["runPolicy"], "suspend": suspend}
            meta = {**raw["metadata"], "generation": raw["metadata"]["generation"] + 1}
            self.server.put("FineTuneJob", {**raw, "metadata": meta, "spec": {**raw["spec"], "runPolicy": policy}})

    # what always holds

    @invariant()
    def it_never_goes_back(self) -> None:
        status = self.status
        assert status.attempt >= self.attempt, "attempts only grow"
        self.attempt = status.attempt
        if self.terminal is not None:
            assert status.phase == self.terminal, "a terminal state is terminal"
        if status.finished:
            self.terminal = status.phase
            assert status.phase == "Succeeded", status.conditions

    @invariant()
    def no_rank_is_made_twice_in_an_attempt(self) -> None:
        assert not self.server.broken, self.server.broken

    @invariant()
    def no_failure_counts_twice(self) -> None:
        assert self.status.attempt <= self.faults

    @invariant()
    def no_more_pods_than_asked_for(self) -> None:
        live = [p["metadata"]["labels"] for p in self.pods("Pending", "Running")]
        ranks = Counter(labels[names.LABEL_RANK] for labels in live if labels[names.LABEL_STAGE] == "train")
        assert all(count == 1 for count in ranks.values()) and set(ranks) <= {"0", "1"}

    @invariant()
    def no_finished_stage_is_done_again(self) -> None:
        for stage in self.finished:
            tries = [j for j in self.server.of("Job") if j["metadata"]["labels"][names.LABEL_STAGE] == stage and not j.get("status")]
            done = [p for p in self.pods("Succeeded") if p["metadata"]["labels"][names.LABEL_STAGE] == stage]
            owners = {p["metadata"]["ownerReferences"][0]["uid"] for p in done}
            assert all(j["metadata"]["uid"] in owners for j in tries) or not done, f"{stage} has a result and runs again"

    def teardown(self) -> None:
        """Left alone, the job ends, however things stood."""
        try:
            self.ends()
        finally:
            self.clocks.close()

    def ends(self) -> None:
        if not hasattr(self, "server"):
            return
        self.server.trouble = None
        self.suspend(False)
        for _ in range(200):
            self.look_at_everything()
            self.go_on()
            if self.status.finished:
                break
        assert self.status.phase == "Succeeded", (self.status, [(p["metadata"]["name"], p["status"]) for p in self.server.of("Pod")])
        self.it_never_goes_back()
        self.no_failure_counts_twice()
        for _ in range(3):
            self.deliver_everything()
            self.work(0, "")
        assert not self.pods("Pending", "Running") or all("deletionTimestamp" in p["metadata"] for p in self.pods("Pending", "Running"))


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=int(os.environ.get("MACHINE_EXAMPLES", "150")),
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def test_a_job_that_is_looked_at_late_is_queued_and_admitted_in_one_write() -> None:
    """A busy operator looks at a ready job long after it might have told: the scheduler still has its say first, and one write tells both."""
    machine = Machine()
    machine.begin("prepare", patient=False)
    machine.manager.writer.soon_seconds = 60.0
    uid = machine.server.objects["FineTuneJob", KEY[1]]["metadata"]["uid"]
    machine.pods_succeed(0.0, True)
    machine.deliver_everything()
    machine.manager.writer._untold[uid] = -3600.0
    machine.work(0, "")
    assert not machine.status.is_true("DataReady"), "not on record yet: the scheduler is asked first"
    machine.schedule(0, "")
    machine.work(0, "")
    assert machine.status.is_true("DataReady") and machine.status.is_true("Admitted")
    told = [raw for kind, raw, _ in machine.server.watch if kind == "FineTuneJob"]
    assert len(told) == 1, "one write"
    machine.clocks.close()


def test_a_job_that_is_looked_at_late_and_waits_is_told_so_in_time() -> None:
    """It is put off once, not for as long as the operator is late."""
    machine = Machine()
    machine.begin("prepare", patient=False)
    machine.manager.writer.soon_seconds = 0.01
    machine.pods_succeed(0.0, True)
    machine.deliver_everything()
    machine.work(0, "")
    for _ in range(20):  # time goes on by a thousandth at each look
        machine.work(0, "")
    assert machine.status.is_true("DataReady") and machine.status.phase == "Queued"
    machine.clocks.close()
