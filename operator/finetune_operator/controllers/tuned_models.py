"""FineTunedModels as the generic loop sees them: how one is observed and decided about, and what wakes it.

Knows nothing of how anything is written.
"""

from __future__ import annotations

import logging

from finetune_api.contract import CatalogReport
from finetune_api.tuned_model import MODEL_KIND, FineTunedModelStatus

from ..cache.catalog import CatalogBoard
from ..cache.store import Store
from ..cluster.transport import Cluster
from ..model.objects import Key, Object, as_object, key_of
from ..model.tuned_model import ObservedModel, models_touched, pinned_by, serving_of
from ..reconcile.plan import Plan
from ..reconcile.tuned_model import reconcile, refused, unreadable
from ..settings import Settings
from .controller import Kind

audit = logging.getLogger("finetune.audit")


class TunedModels:
    """Those that the store knows."""

    def __init__(self, cluster: Cluster, store: Store, board: CatalogBoard, settings: Settings) -> None:
        self.cluster, self.store, self.board, self.settings = cluster, store, board, settings
        self._heard: dict[str, CatalogReport] = {}
        """By UID: the report that the status which is being written tells of"""

    def kind(self) -> Kind[ObservedModel]:
        """Their row."""
        return Kind(
            MODEL_KIND,
            self.observe,
            self.reconcile,
            lambda observed, why: refused(observed, self.settings, why),
            self.unreadable,
            recorded=self.recorded,
            touched=models_touched,
        )

    async def observe(self, key: Key) -> ObservedModel | None:
        """What a decision about one may depend on."""
        raw = self.store.models.get(key)
        if raw is None:
            return None
        uid, (namespace, name) = raw["metadata"]["uid"], key
        owned, reported = self.store.owned(uid), self.board.latest(uid)
        serving = (serving_of(endpoint, name) for endpoint in self.store.endpoints.of_namespace(namespace))
        return ObservedModel(
            raw=raw,
            jobs=tuple(self.store.jobs_naming(key)),
            serving=tuple(found for found in serving if found is not None),
            catalogs=owned.jobs,
            pods=owned.pods,
            applied=owned.applied,
            report=reported.report if reported is not None else None,
            reported_by=reported.by if reported is not None else "",
            now=self.cluster.now(),
        )

    def reconcile(self, observed: ObservedModel) -> Plan[FineTunedModelStatus]:
        """What to do about it."""
        plan = reconcile(observed, self.settings)
        uid = observed.raw["metadata"]["uid"]
        if plan.status is None:
            self.board.taken(uid, observed.report)
        elif observed.report is not None:
            self._heard[uid] = observed.report
        return plan

    def unreadable(self, key: Key, why: str) -> tuple[Object, Plan[FineTunedModelStatus]] | None:
        """What to say of one whose pass failed for no reason that is known."""
        raw = self.store.models.get(key)
        return None if raw is None else (raw, unreadable(ObservedModel(raw=raw, now=self.cluster.now()), self.settings, why))

    def recorded(self, raw: Object, plan: Plan[FineTunedModelStatus]) -> None:
        """Its status was written; who became the champion, and by whom, is told once more for whoever keeps logs."""
        uid = raw["metadata"]["uid"]
        self.board.taken(uid, self._heard.pop(uid, None))
        before, after = plan.before or FineTunedModelStatus(), plan.status
        if after is None or after.champion == before.champion:
            return
        spec = as_object(raw.get("spec"))
        pinned = spec.get("champion") is not None and spec.get("champion") == after.champion
        by = f"spec.champion, set by {pinned_by(raw) or 'somebody'}" if pinned else f"spec.promotion {spec.get('promotion')}"
        audit.info("FineTunedModel %s/%s: champion %s -> %s by %s", *key_of(raw), before.champion, after.champion, by)
