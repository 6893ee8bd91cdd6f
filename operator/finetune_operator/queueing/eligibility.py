"""Which queue a job belongs to, and which of its flavors suit it. Knows nothing of room."""

from __future__ import annotations

from finetune_api.queue import DEFAULT_QUEUE, Flavor

from ..model.queueing import IMPLICIT, Queue, Snapshot, Workload, may_use, name_of_queue
from .quota import Ledger


class Eligibility:
    """Of one snapshot: what was looked up once is kept."""

    def __init__(self, snapshot: Snapshot, ledger: Ledger) -> None:
        self._snapshot, self._ledger = snapshot, ledger
        self._matching: dict[tuple[object, ...], list[Flavor]] = {}
        self._queues: dict[tuple[str, str | None], tuple[str | None, tuple[str, str]]] = {}

    def queue_of(self, workload: Workload) -> tuple[str | None, tuple[str, str]]:
        """The name of a job's queue; or None, and (reason, message)."""
        key = workload.namespace, workload.queue
        if key not in self._queues:
            self._queues[key] = self._find(workload)
        return self._queues[key]

    def _find(self, workload: Workload) -> tuple[str | None, tuple[str, str]]:
        if not self._snapshot.queues:
            if workload.queue is None:
                return IMPLICIT, ("", "")
            return None, ("QueueNotFound", f"scheduling.queue: there is no FineTuneQueue {workload.queue!r}, nor any other; remove it")
        name = name_of_queue(workload.queue, self._snapshot.namespaces.get(workload.namespace))
        if name in self._ledger.queues and self.may_use(self._ledger.queues[name], workload.namespace):
            return name, ("", "")
        allowed = [name for name, queue in sorted(self._ledger.queues.items()) if self.may_use(queue, workload.namespace)]
        known = f"this namespace may use: {', '.join(allowed[:8]) or 'none'}"
        if name not in self._ledger.queues:
            if workload.queue is None and name == DEFAULT_QUEUE:
                return None, ("QueueNotFound", f"no queue is named, and there is none called {DEFAULT_QUEUE}; {known}")
            return None, ("QueueNotFound", f"there is no FineTuneQueue {name!r}; {known}")
        return None, ("QueueNotAllowed", f"namespace {workload.namespace} may not use queue {name}; {known}")

    def may_use(self, queue: Queue, namespace: str) -> bool:
        """Whether jobs of a namespace may wait there."""
        return may_use(queue, self._snapshot.namespaces.get(namespace))

    def flavor(self, queue: str, flavor: str) -> Flavor | None:
        """A queue's flavor by name."""
        known = self._ledger.queues.get(queue)
        return next((f for f in known.spec.flavors if f.name == flavor), None) if known is not None else None

    def flavors(self, queue: str, workload: Workload) -> list[Flavor]:
        """Those with the job's resource whose nodes its selector does not rule out."""
        key = queue, workload.request.resource, workload.request.selector, workload.request.flavor
        if key not in self._matching:
            selector = dict(workload.request.selector)
            self._matching[key] = [
                flavor
                for flavor in self._ledger.queues[queue].spec.flavors
                if flavor.resource_name == workload.request.resource
                and workload.request.flavor in ("", flavor.name)
                and all(selector.get(k, v) == v for k, v in flavor.node_labels.items())
            ]
        return self._matching[key]

    def autoscaled(self, queue: str, workload: Workload) -> bool:
        """Whether nodes come when a job's pods wait."""
        return any(flavor.nodes == "Autoscaled" for flavor in self.flavors(queue, workload))
