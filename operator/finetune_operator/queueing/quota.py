"""How much of each flavor a queue may still have, and whose share is least. Knows nothing of nodes.

The arithmetic of borrowing and lending is that of Kueue's cohorts (kueue.sigs.k8s.io/docs/concepts/cluster_queue): what a queue
does not lend is its alone, the rest of all nominal quotas is a pool. The share is dominant resource fairness (Ghodsi et
al., NSDI 2011), weighted, over use now plus decayed past use.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime

from finetune_api.queue import FineTuneQueueSpec, Flavor, UsageHistory
from finetune_api.scalars import quantity, seconds

from ..model.queueing import IMPLICIT, Allocation, Queue, Snapshot

UNLIMITED = 1_000_000_000


class Ledger:
    """Use of every flavor by every queue, in the making while a pass admits, frees and reserves."""

    def __init__(self, queues: Iterable[Queue], now: datetime) -> None:
        self._now = now
        self.queues = {queue.name: queue for queue in queues}
        self.used: dict[tuple[str, str], int] = defaultdict(int)
        """(queue, flavor) -> units"""
        self.by_owner: dict[tuple[str, str], int] = defaultdict(int)
        """(queue, `namespace n` or `user u`) -> units"""
        self.jobs: dict[tuple[str, str], int] = defaultdict(int)
        """The same -> jobs"""
        self.serving: dict[tuple[str, str], int] = defaultdict(int)
        """(queue, flavor) -> units of those in use that endpoints hold"""
        self._cohorts: dict[tuple[str, str], list[tuple[str, Flavor]]] = defaultdict(list)
        self._shares: dict[str, float] = {}
        self._past = {queue.name: average_use(queue.history, queue.spec, now) for queue in self.queues.values()}
        for queue in self.queues.values():
            for flavor in queue.spec.flavors:
                self._cohorts[_cohort(queue), flavor.name].append((queue.name, flavor))

    def take(self, queue: str, flavor: str, owners: Iterable[str], units: int, sign: int = 1, *, jobs: int = 1) -> None:
        """Count what a job holds; more of a job that is counted already is `jobs` 0."""
        self._shares.clear()
        self.used[queue, flavor] += sign * units
        for owner in owners:
            self.by_owner[queue, owner] += sign * units
            self.jobs[queue, owner] += sign * jobs

    def reserve(self, queue: str, flavor: str, units: int) -> None:
        """Keep units from being lent; they belong to nobody yet."""
        self._shares.clear()
        self.used[queue, flavor] += units

    @contextmanager
    def without(self, allocation: Allocation, owners: tuple[str, ...]) -> Iterator[None]:
        """As if this gang held nothing."""
        self.take(allocation.queue, allocation.flavor, owners, allocation.total, -1)
        try:
            yield
        finally:
            self.take(allocation.queue, allocation.flavor, owners, allocation.total)

    def copy(self) -> Ledger:
        """The same, to go another way from here."""
        other = Ledger((), self._now)
        other.queues, other._cohorts, other._past = self.queues, self._cohorts, self._past
        other.used, other.by_owner, other.jobs = self.used.copy(), self.by_owner.copy(), self.jobs.copy()
        other.serving = self.serving
        return other

    def available(self, queue: str, flavor: Flavor) -> int:
        """Units that the queue may take now, borrowed ones included."""
        own = self.queues[queue].spec
        used = self.used[queue, flavor.name]
        if own.cohort is None:
            return flavor.nominal_quota - used
        pool = 0
        for name, theirs in self._cohorts[_cohort(self.queues[queue]), flavor.name]:
            kept = theirs.nominal_quota - _lends(theirs)
            pool += _lends(theirs) - max(0, self.used[name, theirs.name] - kept)
        guaranteed = flavor.nominal_quota - _lends(flavor)
        free = max(0, guaranteed - used) + max(0, pool)
        limit = UNLIMITED if flavor.borrowing_limit is None else flavor.nominal_quota + flavor.borrowing_limit
        return min(free, limit - used)

    def served(self, queue: str, flavor: Flavor) -> int:
        """Units that endpoints hold of what the queue might have, in its whole cohort."""
        return sum(self.serving[name, theirs.name] for name, theirs in self._cohorts[_cohort(self.queues[queue]), flavor.name])

    def most(self, queue: str, flavor: Flavor) -> int:
        """Units that the queue could ever have."""
        if self.queues[queue].spec.cohort is None:
            return flavor.nominal_quota
        others = sum(_lends(theirs) for name, theirs in self._cohorts[_cohort(self.queues[queue]), flavor.name] if name != queue)
        extra = others if flavor.borrowing_limit is None else min(others, flavor.borrowing_limit)
        return flavor.nominal_quota + extra

    def borrows(self, queue: str, flavor: Flavor, units: int = 0) -> bool:
        """Whether the queue has, with so many units more, more than its own."""
        return self.used[queue, flavor.name] + units > flavor.nominal_quota

    def share(self, queue: str) -> float:
        """Weighted dominant share of the cohort's nominal quota, past use included."""
        known = self._shares.get(queue)
        if known is not None:
            return known
        own = self.queues[queue]
        shares = [
            self.used[queue, flavor.name] / total
            for flavor in own.spec.flavors
            if (total := sum(f.nominal_quota for _, f in self._cohorts[_cohort(own), flavor.name]))
        ]
        total = sum(f.nominal_quota for flavor in own.spec.flavors for _, f in self._cohorts[_cohort(own), flavor.name])
        past = self._past[queue] / total if total else 0.0
        found = self._shares[queue] = (max(shares, default=0.0) + past) / float(quantity(own.spec.weight))
        return found


def _cohort(queue: Queue) -> str:
    return f"c/{queue.spec.cohort}" if queue.spec.cohort is not None else f"q/{queue.name}"


def _lends(flavor: Flavor) -> int:
    return flavor.nominal_quota if flavor.lending_limit is None else min(flavor.lending_limit, flavor.nominal_quota)


def _decay(spec: FineTuneQueueSpec, since: datetime, now: datetime) -> float:
    half_life = max(1, seconds(spec.usage_half_life))
    passed = max(0.0, (now - since).total_seconds())
    return float(0.5 ** (passed / half_life))


def average_use(history: UsageHistory, spec: FineTuneQueueSpec, now: datetime) -> float:
    """Units in use on average over the past: constant use of n gives n."""
    return _average(history.gpu_seconds, history, spec, now)


def namespace_use(history: UsageHistory, spec: FineTuneQueueSpec, now: datetime) -> Mapping[str, float]:
    """The same by namespace."""
    return {entry.name: _average(entry.gpu_seconds, history, spec, now) for entry in history.namespaces}


def _average(total: float, history: UsageHistory, spec: FineTuneQueueSpec, now: datetime) -> float:
    at = datetime.fromisoformat(history.updated_at) if history.updated_at else now
    window = max(1, seconds(spec.usage_half_life)) / 0.6931471805599453  # the integral of the decay
    return total * _decay(spec, at, now) / window


def counted(
    history: UsageHistory, spec: FineTuneQueueSpec, using: Mapping[str, int], since: datetime, now: datetime, stamp: str
) -> UsageHistory:
    """The history with what each namespace has held since the last count."""
    decay, passed = _decay(spec, since, now), max(0.0, (now - since).total_seconds())
    past = {entry.name: entry.gpu_seconds * decay for entry in history.namespaces}
    for namespace, units in using.items():
        past[namespace] = past.get(namespace, 0.0) + units * passed
    kept = sorted(((round(total, 1), name) for name, total in past.items() if total >= 1), key=lambda item: (-item[0], item[1]))[:256]
    return UsageHistory.model_validate(
        {
            "gpuSeconds": round(history.gpu_seconds * decay + sum(using.values()) * passed, 1),
            "namespaces": [{"name": name, "gpuSeconds": total} for total, name in kept],
            "updatedAt": stamp,
        }
    )


def implicit_queue(snapshot: Snapshot) -> Queue:
    """One queue over everything there is, for clusters without a FineTuneQueue."""
    resources = sorted({w.request.resource for w in snapshot.workloads if w.request.resource != "cpu"})
    flavors = [
        Flavor.model_construct(
            name=re.sub(r"[^a-z0-9]+", "-", resource.lower()),
            resource_name=resource,
            node_labels={},
            tolerations=[],
            nominal_quota=UNLIMITED,
            borrowing_limit=None,
            lending_limit=None,
            nodes="Autoscaled" if snapshot.autoscaled else "Existing",
            price_per_hour=None,
            teraflops=None,
        )
        for resource in resources
    ]
    spec = FineTuneQueueSpec(flavors=[Flavor(name="none", nominal_quota=0)]).model_copy(update={"flavors": flavors})
    return Queue(name=IMPLICIT, spec=spec)
