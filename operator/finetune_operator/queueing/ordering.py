"""The order in which the jobs of one queue are looked at. Knows nothing of room."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping

from ..model.queueing import Workload
from .preemption import effective_priority


class Ordering:
    """By priority, then the namespace that has had least, then who has waited longest."""

    def __init__(self, waiting: Iterable[Workload], use: Mapping[str, float], limit: int | None) -> None:
        self._use = dict(use)
        grouped: dict[int, dict[str, list[Workload]]] = defaultdict(lambda: defaultdict(list))
        for workload in waiting:
            grouped[-effective_priority(workload, limit)][workload.namespace].append(workload)
        self._levels: list[tuple[dict[str, deque[Workload]], list[tuple[float, str]]]] = []
        for _, spaces in sorted(grouped.items(), reverse=True):  # the highest priority last, where it is taken off
            namespaces = {name: deque(sorted(members, key=lambda w: (w.since, w.uid))) for name, members in spaces.items()}
            self._levels.append((namespaces, []))
        self._fill()

    def _fill(self) -> None:
        if self._levels:
            namespaces, heap = self._levels[-1]
            heap.extend((self._use.get(name, 0.0), name) for name in namespaces)
            heapq.heapify(heap)

    def peek(self) -> Workload | None:
        """Whose turn it is."""
        while self._levels:
            namespaces, heap = self._levels[-1]
            while heap:
                use, name = heap[0]
                if name not in namespaces or use != self._use.get(name, 0.0):  # an old entry
                    heapq.heappop(heap)
                    continue
                ties = [other for other in heap if other[0] == use]
                if len(ties) > 1:  # equal shares: who has waited longest, over all of them
                    name = min((namespaces[other][0].since, other) for _, other in ties if other in namespaces)[1]
                return namespaces[name][0]
            self._levels.pop()
            self._fill()
        return None

    def drop(self, workload: Workload, units: int = 0) -> None:
        """It had its turn, and was given so many units."""
        namespaces, heap = self._levels[-1]
        name = workload.namespace
        namespaces[name].popleft()
        if not namespaces[name]:
            del namespaces[name]
        if units:
            self._use[name] = self._use.get(name, 0.0) + units
            if name in namespaces:
                heapq.heappush(heap, (self._use[name], name))

    def rest(self) -> list[Workload]:
        """Everybody who has not had a turn, in order."""
        found = []
        while (workload := self.peek()) is not None:
            found.append(workload)
            self.drop(workload)
        return found
