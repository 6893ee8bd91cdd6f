"""Endpoints as queues see them: what the admission loop counts and decides about, and what an endpoint's own pass is told of it.

Knows nothing of quota, nor of how anything comes on record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime

from finetune_api.endpoint import FineTuneEndpointSpec, FineTuneEndpointStatus
from finetune_api.lenient import read
from finetune_api.validation import InvalidDocument, parse_endpoint

from ..cache.assumptions import Assumptions
from ..cache.inventory import Inventory
from ..cache.store import Store
from ..model.endpoint import Room
from ..model.endpoint_demand import Demand, demand_of, wanted_uid
from ..model.objects import Object
from ..model.queueing import IMPLICIT, Workload


class EndpointDemands:
    """Those that the store knows. `forget`: nothing is to be known of that UID any more."""

    def __init__(
        self,
        store: Store,
        inventory: Inventory,
        assumptions: Assumptions,
        priority: Callable[[str | None], int],
        forget: Callable[[str], None],
    ) -> None:
        self._store, self._inventory, self._assumptions, self._priority, self._forget = store, inventory, assumptions, priority, forget
        self._parsed: dict[str, tuple[Object, FineTuneEndpointSpec | None, FineTuneEndpointStatus]] = {}
        """By UID: as it stands in the store, and parsed"""
        self._decided: set[str] = set()
        """By which decisions about what they want are kept"""

    def workloads(self, now: datetime) -> Iterator[Workload]:
        """What they hold, and what they want and have said to wait for."""
        asked = set[str]()
        for raw in self._store.endpoints:
            demand = self._of(raw, now)
            if demand.held is not None:
                yield demand.held
            if demand.wanted is not None and demand.asks:
                asked.add(demand.wanted.uid)
                yield demand.wanted
        for uid in self._decided - asked:  # granted and on record, or not wanted any more
            self._assumptions.forget(uid)
            self._forget(uid)
        self._decided = asked
        known = {raw["metadata"]["uid"] for raw in self._store.endpoints}
        self._parsed = {uid: parsed for uid, parsed in self._parsed.items() if uid in known}

    def room(self, raw: Object, now: datetime) -> Room | None:
        """What is decided about one; None where no queue is asked."""
        spec, _ = self._read(raw)
        if spec is None:
            return None
        demand = self._of(raw, now)
        return Room(
            held=self._assumptions.decision(raw["metadata"]["uid"]) if demand.held is not None else None,
            wanted=self._assumptions.decision(wanted_uid(raw)) if demand.wanted is not None and demand.asks else None,
            wants=demand.wanted.request.pods[0] if demand.wanted is not None else 0,
            moves=demand.moves,
            holding=demand.holding,
        )

    def recorded(self, raw: Object) -> None:
        """Its status was written: what was granted is used up."""
        self._assumptions.recorded(wanted_uid(raw))

    def not_recorded(self, raw: Object, why: str) -> None:
        """It could not be written."""
        self._assumptions.not_recorded(wanted_uid(raw), why)

    def _of(self, raw: Object, now: datetime) -> Demand:
        (spec, status), meta = self._read(raw), raw["metadata"]
        if spec is None:
            return Demand()
        pods = [pod for pod in self._store.labelled_pods(meta["uid"]) if pod.namespace == meta["namespace"] and not pod.ended]
        pods = [pod for pod in pods if not (pod.deleting and pod.node and self._inventory.is_lost(pod.node))]
        return demand_of(
            raw,
            spec,
            status,
            pods=len(pods),
            bound=tuple(sorted(Counter(pod.node for pod in pods if pod.node).items())),
            queue=self._inventory.queue_of(meta["namespace"], spec.scheduling.queue),
            known=self._known,
            priority=self._priority(spec.scheduling.priority_class_name),
            now=now,
        )

    def _read(self, raw: Object) -> tuple[FineTuneEndpointSpec | None, FineTuneEndpointStatus]:
        """The spec: None where it cannot be read, or asks no queue: it has no GPUs, or none of its own."""
        uid = raw["metadata"]["uid"]
        parsed = self._parsed.get(uid)
        if parsed is None or parsed[0] is not raw:
            try:
                spec = parse_endpoint(raw, strict=False)
            except InvalidDocument:
                spec = None
            if spec is not None and (spec.external is not None or not spec.gpus_per_replica):
                spec = None
            parsed = self._parsed[uid] = raw, spec, read(FineTuneEndpointStatus, raw.get("status"))
        return parsed[1:]

    def _known(self, queue: str, flavor: str) -> bool:
        queues = self._inventory.queues.parsed
        if not (self._inventory.queues.listed and self._inventory.namespaces.listed):
            return False  # nor which queue it belongs to
        if not queues:
            return queue == IMPLICIT
        return queue in queues and any(known.name == flavor for known in queues[queue].spec.flavors)
