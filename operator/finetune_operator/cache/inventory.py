"""What is known of the cluster besides the jobs: queues, nodes, what others hold of them, namespaces, priorities."""

from __future__ import annotations

import dataclasses
import functools

from ..model.nodes import is_ready
from ..model.objects import Object
from ..model.queueing import Queue


@dataclasses.dataclass
class Inventory:
    """What is not the operator's own: as of the last LIST."""

    queues: dict[str, Object] = dataclasses.field(default_factory=dict)
    parsed: dict[str, Queue] = dataclasses.field(default_factory=dict)
    nodes: list[Object] | None = None
    pods: list[tuple[str, str, dict[str, int]]] = dataclasses.field(default_factory=list)
    """(UID, node, requests) of every pod that holds something of a node, but for the jobs' workers: those are known as they are."""
    namespaces: dict[str, Object] = dataclasses.field(default_factory=dict)
    priorities: dict[str, int] = dataclasses.field(default_factory=dict)
    default_priority: int = 0
    forbidden: tuple[str, ...] = ()
    """What of all this the operator may not list."""
    at: float = float("-inf")
    took: float = 0.0

    @functools.cached_property
    def _ready(self) -> frozenset[str]:
        return frozenset(raw["metadata"]["name"] for raw in self.nodes or () if is_ready(raw))

    def is_lost(self, node: str) -> bool:
        """Whether a node is gone or not ready, as far as is known: its kubelet will not confirm that a pod has ended."""
        return self.nodes is not None and node not in self._ready
