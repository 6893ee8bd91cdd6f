"""What nodes were there in this process's life, and are no more. Knows nothing of where they are seen."""

from __future__ import annotations

import dataclasses

from ..model.queueing import Node

Shape = tuple[tuple[str, int], ...]
_SHAPES, _NODES_EACH = 64, 8
"""Deleted nodes that are remembered: so many shapes, and so many of each"""


class NodeHistory:
    """What nodes were at their best, so that a job waits for one that is away for repair. Begins anew with each process."""

    def __init__(self) -> None:
        self._best: dict[str, Node] = {}
        """Nodes that are there, with the most of each extended resource that they had: a driver that is restarted shows none"""
        self._seen: tuple[Node, ...] = ()
        self._missing: tuple[Node, ...] = ()
        self._deleted: dict[Shape, dict[str, Node]] = {}
        """By what they had: where nodes come and go all day, the one large node of last week is not forgotten for them"""

    def look(self, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
        """Note the nodes that are there; those that are missing, or have less now, as they were."""
        if nodes is not self._seen:
            self._seen, self._missing = nodes, self._compare(nodes)
        return self._missing

    def _compare(self, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
        present = {node.name: node for node in nodes}
        for name in self._best.keys() - present.keys():
            self._note_deleted(dataclasses.replace(self._best.pop(name), used={}, away="deleted"))
        for same in self._deleted.values():
            for name in [name for name in same if name in present]:
                del same[name]
        lessened = []
        for name, node in present.items():
            had = self._best.get(name)
            less = {r: a for r, a in had.allocatable.items() if "/" in r and a > node.allocatable.get(r, 0)} if had is not None else {}
            self._best[name] = dataclasses.replace(node, allocatable={**node.allocatable, **less}) if less else node
            if less:
                now = ", ".join(f"{node.allocatable.get(r, 0)} of {a} {r}" for r, a in sorted(less.items()))
                lessened.append(dataclasses.replace(self._best[name], away=node.away or f"has {now} now"))
        return (*lessened, *(node for same in self._deleted.values() for node in same.values()))

    def _note_deleted(self, node: Node) -> None:
        shape = tuple(sorted((name, amount) for name, amount in node.allocatable.items() if "/" in name or name == "cpu"))
        same = self._deleted.pop(shape, {})
        self._deleted[shape] = same  # the last to be forgotten
        same[node.name] = node
        if len(same) > _NODES_EACH:
            del same[next(iter(same))]
        if len(self._deleted) > _SHAPES:
            del self._deleted[next(iter(self._deleted))]
