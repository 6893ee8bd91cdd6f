"""Whether a gang fits on the nodes: all of its pods or none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from finetune_api.queue import Flavour

from .model import Ask, Held, Node, Taint

Place = tuple[tuple[str, int], ...]
"""(node, pods) of a gang."""


def tolerates(tolerations: Iterable[tuple[str, str, str, str]], taint: Taint) -> bool:
    """Whether one of (key, operator, value, effect) tolerates the taint, by the rules of the Kubernetes API."""
    return any(
        (not effect or effect == taint.effect)
        and ((operator == "Exists" and key in ("", taint.key)) or (operator != "Exists" and key == taint.key and value == taint.value))
        for key, operator, value, effect in tolerations
    )


class Fleet:
    """Free resources of all nodes, in the making while a pass admits, frees and reserves."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes = {node.name: node for node in nodes}
        self._free = {
            node.name: {resource: amount - node.used.get(resource, 0) for resource, amount in node.allocatable.items()}
            for node in self.nodes.values()
        }
        self._eligible: dict[tuple[object, ...], tuple[Node, ...]] = {}

    def take(self, place: Place, per_pod: Iterable[tuple[str, int]], sign: int = 1) -> None:
        """Take what so many pods need. A node may go below zero: then nothing more fits there."""
        amounts = tuple(per_pod)
        for name, pods in place:
            free = self._free.get(name)
            if free is not None:
                for resource, amount in amounts:
                    free[resource] = free.get(resource, 0) - sign * pods * amount

    def give(self, place: Place, per_pod: Iterable[tuple[str, int]]) -> None:
        """Undo a take."""
        self.take(place, per_pod, -1)

    @contextmanager
    def given(self, held: Iterable[tuple[Held, Ask]]) -> Iterator[None]:
        """As if these gangs were gone."""
        gone = [(h.bound, a.per_pod) for h, a in held]
        for place, amounts in gone:
            self.give(place, amounts)
        try:
            yield
        finally:
            for place, amounts in gone:
                self.take(place, amounts)

    def eligible(self, ask: Ask, flavour: Flavour | None) -> tuple[Node, ...]:
        """Nodes whose labels and taints let the pods on."""
        key = (ask.selector, ask.tolerations, flavour.name if flavour else None, id(flavour))
        found = self._eligible.get(key)
        if found is None:
            wanted = {**dict(ask.selector), **(flavour.node_labels if flavour else {})}
            allowed = [*ask.tolerations, *((t.key, t.operator, t.value, t.effect) for t in (flavour.tolerations if flavour else ()))]
            found = self._eligible[key] = tuple(
                node
                for node in self.nodes.values()
                if node.usable
                and all(node.labels.get(label) == value for label, value in wanted.items())
                and all(tolerates(allowed, taint) for taint in node.taints)
            )
        return found

    def room(self, node: Node, per_pod: Iterable[tuple[str, int]]) -> int:
        """Pods that fit on a node now."""
        free = self._free[node.name]
        return max(0, min((free.get(resource, 0) // amount for resource, amount in per_pod if amount > 0), default=1_000_000))

    def place(self, ask: Ask, pods: int, flavour: Flavour | None) -> Place | None:
        """Nodes for so many pods: the fullest first, so that whole nodes stay whole; within one domain where that is asked for."""
        rooms = [(node, room) for node in self.eligible(ask, flavour) if (room := self.room(node, ask.per_pod))]
        if not ask.topology_key:
            return _fill(rooms, pods)
        domains: dict[str, list[tuple[Node, int]]] = {}
        for node, room in rooms:
            if (value := node.labels.get(ask.topology_key)) is not None:
                domains.setdefault(value, []).append((node, room))
        sizes = sorted((sum(room for _, room in members), value) for value, members in domains.items())
        return next((_fill(domains[value], pods) for size, value in sizes if size >= pods), None)

    def domain(self, ask: Ask, place: Place) -> tuple[str, str] | None:
        """The topology domain of a place."""
        if not ask.topology_key or not place:
            return None
        return ask.topology_key, self.nodes[place[0][0]].labels[ask.topology_key]

    def reserve(self, ask: Ask, pods: int, flavour: Flavour | None) -> None:
        """Keep the nodes that a gang would have soonest, for it alone."""
        rooms = sorted(
            ((self.room(node, ask.per_pod), node) for node in self.eligible(ask, flavour)),
            key=lambda item: (-item[0], item[1].name),
        )
        left = pods
        for room, node in rooms:
            most = min((node.allocatable.get(r, 0) // amount for r, amount in ask.per_pod if amount > 0), default=0)
            take = min(left, max(room, most))
            if take > 0:
                self.take(((node.name, take),), ask.per_pod)
                left -= take
            if left <= 0:
                return

    def free_units(self, ask: Ask, flavour: Flavour | None) -> int:
        """Free units of the ask's resource on the nodes that it may use."""
        return sum(max(0, self._free[node.name].get(ask.resource, 0)) for node in self.eligible(ask, flavour))


def _fill(rooms: list[tuple[Node, int]], pods: int) -> Place | None:
    if sum(room for _, room in rooms) < pods:
        return None
    place, left = [], pods
    for node, room in sorted(rooms, key=lambda item: (item[1], item[0].name)):
        take = min(room, left)
        place.append((node.name, take))
        left -= take
        if left == 0:
            break
    return tuple(place)


def never_fits(ask: Ask, nodes: Iterable[Node]) -> str | None:
    """Why no node of the cluster could ever hold one pod, or None. Nodes without the resource say nothing: others may come."""
    having = [node for node in nodes if node.allocatable.get(ask.resource, 0) > 0]
    if not ask.units or not having:
        return None
    largest = max(node.allocatable[ask.resource] for node in having)
    if largest >= ask.units:
        return None
    total = ask.pods[0] * ask.units
    shape = f"distribution.gpusPerNode {largest} with distribution.nodes {-(-total // largest)}"
    return (
        f"each worker pod asks for {ask.units} {ask.resource}, and no node has more than {largest}; "
        f"the largest shape that would fit: {shape}"
    )
