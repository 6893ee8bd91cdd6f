"""FineTuneJobs as the generic loop sees them: how one is observed, decided about, and whose turn it is.

Knows nothing of queues, nor of how anything is written.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from finetune_api import names
from finetune_api.contract import JobFile
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_api.tuned_model import MODEL_KIND

from .. import metrics
from ..cache.assumptions import Assumptions
from ..cache.progress import ProgressBoard
from ..cache.store import Store
from ..cluster.errors import APIError
from ..cluster.transport import Cluster
from ..model.children import owner_uid
from ..model.job import Observed
from ..model.nodes import is_ready
from ..model.objects import Key, Object, as_object, key_of
from ..model.tuned_model import TunedModel, models_named, tuned_model, version_named
from ..model.workload import has_ended, priority_class_of
from ..reconcile.job import reconcile, refused, unreadable
from ..reconcile.job.failures import suspects
from ..reconcile.job.immutability import may_have_changed
from ..reconcile.plan import Plan, WriteUrgency
from ..settings import Settings
from .controller import Kind
from .external_queue import ExternalQueue
from .telemetry import Telemetry

log = logging.getLogger("finetune.controller")
_SUSPECTS_SECONDS = 5.0


class Jobs:
    """`priority`: the value of a PriorityClass by its name. `poke`: what is known of a job's spec is different now."""

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        assumptions: Assumptions,
        board: ProgressBoard,
        external_queue: ExternalQueue,
        telemetry: Telemetry,
        settings: Settings,
        *,
        priority: Callable[[str | None], int],
        poke: Callable[[], None],
    ) -> None:
        self.cluster, self.store, self.assumptions, self.board = cluster, store, assumptions, board
        self.external_queue, self.telemetry, self.settings = external_queue, telemetry, settings
        self._priority, self._poke = priority, poke
        self._suspects: tuple[str, ...] = ()
        self._suspects_at = float("-inf")
        self._models: dict[Key, tuple[Object, TunedModel]] = {}
        """As it was read from that state"""

    def kind(self) -> Kind[Observed]:
        """Their row."""
        return Kind(
            "FineTuneJob",
            self.observe,
            self.reconcile,
            self.refused,
            self.unreadable,
            self.rank,
            self.recorded,
            self.not_recorded,
            self.touched,
        )

    async def observe(self, key: Key) -> Observed | None:
        """What a decision about a job may depend on. Raises APIError."""
        job = self.store.job(key)
        if job is None:
            return None
        uid = job["metadata"]["uid"]
        observed = self.store.observe(key, self.cluster.now(), self.board.latest(uid))
        assert observed is not None
        accepted = None
        if may_have_changed(job):
            accepted = await self._accepted(job)
            if self.store.begun_with(uid, accepted):
                self._poke()
        return dataclasses.replace(
            observed,
            **await self._models_of(job, observed),
            accepted=accepted,
            lost_nodes=await self._lost_nodes(observed),
            suspect_nodes=self._suspect_nodes(),
            **await self._external(job, observed),
            decision=self.assumptions.decision(uid),
        )

    def reconcile(self, observed: Observed) -> Plan[FineTuneJobStatus]:
        """What to do about it."""
        plan = reconcile(observed, self.settings)
        if plan.due is WriteUrgency.SOON and plan.status is not None and plan.status.phase == "Queued":
            # the admission loop answers in a moment, however late this pass is: one write tells both
            return dataclasses.replace(plan, waits_anew=self.assumptions.wait(observed.job["metadata"]["uid"]))
        return plan

    def refused(self, observed: Observed, why: str) -> Plan[FineTuneJobStatus]:
        """What to say when the API server refuses what was to be done."""
        return refused(observed, self.settings, why)

    def unreadable(self, key: Key, why: str) -> tuple[Object, Plan[FineTuneJobStatus]] | None:
        """What to say of one whose pass failed for no reason that is known."""
        job = self.store.job(key)
        return None if job is None else (job, unreadable(Observed(job=job, now=self.cluster.now()), self.settings, why))

    def recorded(self, raw: Object, plan: Plan[FineTuneJobStatus]) -> None:
        """Its status was written."""
        if plan.status is not None:
            self.telemetry.wrote(raw, plan.before or FineTuneJobStatus(), plan.status)
        self.assumptions.recorded(raw["metadata"]["uid"])

    def not_recorded(self, observed: Observed, why: str) -> None:
        """What was decided did not come on record."""
        self.assumptions.not_recorded(observed.job["metadata"]["uid"], why)

    def rank(self, key: Key) -> tuple[int, ...]:
        """Jobs that others wait for to give way go first, then those that have GPUs or are about to. Then by priority."""
        job = self.store.job(key)
        if job is None:
            return 0, 0
        status, decision = job.get("status") or {}, self.assumptions.decision(job["metadata"]["uid"])
        holds = decision is not None and decision.action in ("admit", "preempt", "resize")
        if not holds and not status.get("finishedAt"):
            holds = any(c.get("type") == "Admitted" and c.get("status") == "True" for c in status.get("conditions") or ())
        gives_way = decision is not None and decision.action == "preempt"
        return int(holds) + int(gives_way), self._priority(priority_class_of(job))

    def touched(self, kind: str, raw: Object) -> Iterable[Key]:
        """Jobs that have not ended and name a FineTunedModel."""
        return [key_of(job) for job in self.store.jobs_naming(key_of(raw)) if not has_ended(job)] if kind == MODEL_KIND else ()

    async def _models_of(self, job: Object, observed: Observed) -> dict[str, Any]:
        """The FineTunedModels that a job names; of a job whose status was lost, which version it began with."""
        named = models_named(job) if not has_ended(job) else []
        if not named:
            return {}
        namespace, name = key_of(job)
        found = {model: view for model in named if (view := self._model((namespace, model))) is not None}
        begun = None
        if not as_object(job.get("status")).get("models") and ("ConfigMap", names.config_map_name(name)) in observed.applied:
            spec = await self._accepted(job)
            continued = version_named(spec.tuning.continue_from) if spec is not None else None
            begun = continued[1] if continued is not None else None
        return {"models": found, "continues_from": begun}

    def _model(self, key: Key) -> TunedModel | None:
        """A FineTunedModel, read once for each of its states."""
        raw = self.store.models.get(key)
        if raw is None:
            self._models.pop(key, None)
            return None
        known = self._models.get(key)
        if known is None or known[0] is not raw:
            known = self._models[key] = raw, tuned_model(raw)
        return known[1]

    async def _accepted(self, job: Object) -> FineTuneJobSpec | None:
        """The spec that the job began with, from its ConfigMap."""
        meta = job["metadata"]
        try:
            found = await self.cluster.get("ConfigMap", meta["namespace"], names.config_map_name(meta["name"]))
            if owner_uid(found) == meta["uid"]:
                return JobFile.model_validate(json.loads(found["data"]["job.json"])).spec
        except APIError as failure:
            if not failure.not_found:
                raise
        except (ValueError, KeyError, TypeError):
            log.warning("%s/%s: its job.json cannot be read", meta["namespace"], meta["name"])
        return None

    async def _external(self, job: Object, observed: Observed) -> dict[str, Any]:
        """What another scheduler says of the job. Asked for only while something waits for it."""
        if self.settings.admits_itself:
            return {}
        return await self.external_queue.look(job, observed)

    def _suspect_nodes(self) -> tuple[str, ...]:
        """Nodes that any jobs kept failing on; looked through at most every few seconds."""
        if time.monotonic() - self._suspects_at > _SUSPECTS_SECONDS:
            self._suspects, self._suspects_at = suspects(self.store.restarts(), self.cluster.now()), time.monotonic()
            metrics.SUSPECT_NODES.clear()
            for node in self._suspects:
                metrics.SUSPECT_NODES.labels(node=node).set(1)
        return self._suspects

    async def _lost_nodes(self, observed: Observed) -> frozenset[str]:
        """Nodes of lingering pods that are gone or not ready. Asked for only while a pod lingers."""
        lost = set()
        for node in sorted({p.node for p in (*observed.pods, *observed.left) if p.deleting and p.node and not p.ended}):
            try:
                found = await self.cluster.get("Node", "", node)
            except APIError as failure:
                if failure.transient:
                    raise
                if failure.not_found:
                    lost.add(node)
                continue  # not allowed to look: its pods are waited for
            if not is_ready(found):
                lost.add(node)
        return frozenset(lost)
