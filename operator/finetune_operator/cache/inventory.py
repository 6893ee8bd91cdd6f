"""What is known of the cluster besides the jobs: queues, nodes, what others hold of them, namespaces, priorities."""

from __future__ import annotations

import dataclasses

from ..model.objects import Object
from ..model.queueing import Queue


@dataclasses.dataclass
class Inventory:
    """What is not the operator's own: as of the last LIST."""

    queues: dict[str, Object] = dataclasses.field(default_factory=dict)
    queues_unknown: str = ""
    """Why they could not be listed"""
    parsed: dict[str, Queue] = dataclasses.field(default_factory=dict)
    nodes: list[Object] | None = None
    pods: list[tuple[str, str, dict[str, int]]] = dataclasses.field(default_factory=list)
    """(UID, node, requests) of every pod that holds something of a node, but for the jobs' workers: those are known as they are."""
    namespaces: dict[str, Object] = dataclasses.field(default_factory=dict)
    priorities: dict[str, int] = dataclasses.field(default_factory=dict)
    default_priority: int = 0
    at: float = float("-inf")
    took: float = 0.0
