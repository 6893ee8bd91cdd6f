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


Shape = tuple[tuple[str, int], ...]
"""What one pod needs of each resource."""


class Fleet:
    """Free resources of all nodes, in the making while a pass admits, frees and reserves."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes = {node.name: node for node in nodes}
        self._free = {
            node.name: {resource: amount - node.used.get(resource, 0) for resource, amount in node.allocatable.items()}
            for node in self.nodes.values()
        }
        self._eligible: dict[tuple[object, ...], tuple[Node, ...]] = {}
        self._rooms: dict[tuple[object, ...], tuple[Shape, dict[str, int]]] = {}
        """By what decides about it: pods that fit on each eligible node, kept up to date"""
        self._largest: dict[str, int] = {}
        self._offers: dict[int, tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str, str, str], ...]]] = {}

    def copy(self) -> Fleet:
        """The same, to go another way from here."""
        other = Fleet(())
        other.nodes, other._eligible, other._largest = self.nodes, self._eligible, self._largest
        other._free = {name: dict(free) for name, free in self._free.items()}
        return other

    def take(self, place: Place, per_pod: Shape, sign: int = 1) -> None:
        """Take what so many pods need. A node may go below zero: then nothing more fits there."""
        for name, pods in place:
            free = self._free.get(name)
            if free is None:
                continue
            for resource, amount in per_pod:
                free[resource] = free.get(resource, 0) - sign * pods * amount
            for shape, rooms in self._rooms.values():
                if name in rooms:
                    rooms[name] = _room(free, shape)

    def give(self, place: Place, per_pod: Shape) -> None:
        """Undo a take."""
        self.take(place, per_pod, -1)

    @contextmanager
    def given(self, held: Held, ask: Ask) -> Iterator[None]:
        """As if this gang were gone."""
        self.give(held.bound, ask.per_pod)
        try:
            yield
        finally:
            self.take(held.bound, ask.per_pod)

    def largest(self, resource: str) -> int:
        """The most that one node has of a resource."""
        if resource not in self._largest:
            self._largest[resource] = max((node.allocatable.get(resource, 0) for node in self.nodes.values()), default=0)
        return self._largest[resource]

    def _demands(self, flavour: Flavour | None) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str, str, str], ...]]:
        """A flavour's labels and tolerations: queues that offer the same nodes share what is known of them."""
        if flavour is None:
            return (), ()
        found = self._offers.get(id(flavour))
        if found is None:
            tolerations = tuple((t.key, t.operator, t.value, t.effect) for t in flavour.tolerations)
            found = self._offers[id(flavour)] = tuple(sorted(flavour.node_labels.items())), tolerations
        return found

    def eligible(self, ask: Ask, flavour: Flavour | None) -> tuple[Node, ...]:
        """Nodes whose labels and taints let the pods on."""
        labels, tolerations = self._demands(flavour)
        key = (ask.selector, ask.tolerations, labels, tolerations)
        found = self._eligible.get(key)
        if found is None:
            wanted = {**dict(ask.selector), **dict(labels)}
            allowed = [*ask.tolerations, *tolerations]
            found = self._eligible[key] = tuple(
                node
                for node in self.nodes.values()
                if node.usable
                and all(node.labels.get(label) == value for label, value in wanted.items())
                and all(tolerates(allowed, taint) for taint in node.taints)
            )
        return found

    def rooms(self, ask: Ask, flavour: Flavour | None) -> dict[str, int]:
        """Pods that fit on each eligible node now."""
        key = (ask.selector, ask.tolerations, *self._demands(flavour), ask.per_pod)
        found = self._rooms.get(key)
        if found is None:
            rooms = {node.name: _room(self._free[node.name], ask.per_pod) for node in self.eligible(ask, flavour)}
            found = self._rooms[key] = ask.per_pod, rooms
        return found[1]

    def place(self, ask: Ask, pods: int, flavour: Flavour | None) -> Place | None:
        """Nodes for so many pods: the fullest first, so that whole nodes stay whole; within one domain where that is asked for."""
        rooms = [(room, name) for name, room in self.rooms(ask, flavour).items() if room]
        if not ask.topology_key:
            return _fill(rooms, pods)
        domains: dict[str, list[tuple[int, str]]] = {}
        for room, name in rooms:
            if (value := self.nodes[name].labels.get(ask.topology_key)) is not None:
                domains.setdefault(value, []).append((room, name))
        sizes = sorted((sum(room for room, _ in members), value) for value, members in domains.items())
        return next((_fill(domains[value], pods) for size, value in sizes if size >= pods), None)

    def domain(self, ask: Ask, place: Place) -> tuple[str, str] | None:
        """The topology domain of a place."""
        if not ask.topology_key or not place:
            return None
        return ask.topology_key, self.nodes[place[0][0]].labels[ask.topology_key]

    def soonest(self, ask: Ask, pods: int, flavour: Flavour | None) -> Place:
        """The nodes that a gang would have soonest, whatever runs there now: they are to be kept for it."""
        found = self.rooms(ask, flavour)
        place, left = [], pods
        for node in sorted(self.eligible(ask, flavour), key=lambda node: (-found[node.name], node.name)):
            take = min(left, max(found[node.name], _room(dict(node.allocatable), ask.per_pod)))
            if take > 0:
                place.append((node.name, take))
                left -= take
            if left <= 0:
                break
        return tuple(place)

    def free_units(self, ask: Ask, flavour: Flavour | None) -> int:
        """Free units of the ask's resource on the nodes that it may use."""
        return sum(max(0, self._free[node.name].get(ask.resource, 0)) for node in self.eligible(ask, flavour))


def _room(free: dict[str, int], shape: Shape) -> int:
    most = 1_000_000
    for resource, amount in shape:
        if amount > 0:
            most = min(most, free.get(resource, 0) // amount)
    return max(0, most)


def _fill(rooms: list[tuple[int, str]], pods: int) -> Place | None:
    if sum(room for room, _ in rooms) < pods:
        return None
    place, left = [], pods
    for room, name in sorted(rooms):
        take = min(room, left)
        place.append((name, take))
        left -= take
        if left == 0:
            break
    return tuple(place)


def never_fits(ask: Ask, fleet: Fleet) -> str | None:
    """Why no node of the cluster could ever hold one pod, or None. Nodes without the resource say nothing: others may come."""
    largest = fleet.largest(ask.resource)
    if not ask.units or not largest or largest >= ask.units:
        return None
    shape = f"distribution.gpusPerNode {largest} with distribution.nodes {-(-ask.pods[0] * ask.units // largest)}"
    return (
        f"each worker pod asks for {ask.units} {ask.resource}, and no node has more than {largest}; "
        f"the largest shape that would fit: {shape}"
    )
