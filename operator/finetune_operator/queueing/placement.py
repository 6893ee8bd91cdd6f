"""Whether a gang fits on the nodes: all of its pods or none. Knows nothing of quota."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from finetune_api.queue import Flavor

from ..model.queueing import Allocation, Amounts, Node, Request, Taint

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

    def __init__(self, nodes: Iterable[Node], missing: tuple[Node, ...] = ()) -> None:
        self.nodes, self.missing = {node.name: node for node in nodes}, missing
        self._free = {
            node.name: {resource: amount - node.used.get(resource, 0) for resource, amount in node.allocatable.items()}
            for node in self.nodes.values()
        }
        self._eligible: dict[tuple[object, ...], tuple[Node, ...]] = {}
        self._fitting: dict[tuple[object, ...], tuple[Shape, dict[str, int]]] = {}
        """By what decides about it: pods that fit on each eligible node, kept up to date"""
        self._not_now: dict[tuple[object, ...], list[tuple[Node, str]]] = {}
        """By the same: nodes with the labels that let no pod on now, and why; or of which something cannot be read"""
        self._machines: dict[tuple[object, ...], list[tuple[Amounts, int]]] = {}
        """By the same: what eligible nodes have, and how many have it"""
        self._largest: dict[str, int] = {}
        self._of_flavor: dict[int, tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str, str, str], ...]]] = {}

    def copy(self) -> Fleet:
        """The same, to go another way from here."""
        other = Fleet(())
        other.nodes, other.missing, other._eligible, other._largest = self.nodes, self.missing, self._eligible, self._largest
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
            for shape, fitting in self._fitting.values():
                if name in fitting:
                    fitting[name] = _pods_that_fit(free, shape)

    def give(self, place: Place, per_pod: Shape) -> None:
        """Undo a take."""
        self.take(place, per_pod, -1)

    @contextmanager
    def without(self, allocation: Allocation, request: Request) -> Iterator[None]:
        """As if this gang were gone."""
        self.give(allocation.bound, request.per_pod)
        try:
            yield
        finally:
            self.take(allocation.bound, request.per_pod)

    def largest(self, resource: str) -> int:
        """The most that one node has, or was seen to have, of a resource."""
        if resource not in self._largest:
            every = (*self.nodes.values(), *self.missing)
            self._largest[resource] = max((node.allocatable.get(resource, 0) for node in every), default=0)
        return self._largest[resource]

    def _demands(self, flavor: Flavor | None) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str, str, str], ...]]:
        """A flavor's labels and tolerations: queues that offer the same nodes share what is known of them."""
        if flavor is None:
            return (), ()
        found = self._of_flavor.get(id(flavor))
        if found is None:
            tolerations = tuple((t.key, t.operator, t.value, t.effect) for t in flavor.tolerations)
            found = self._of_flavor[id(flavor)] = tuple(sorted(flavor.node_labels.items())), tolerations
        return found

    def eligible(self, request: Request, flavor: Flavor | None) -> tuple[Node, ...]:
        """Nodes whose labels and taints let the pods on."""
        labels, tolerations = self._demands(flavor)
        key = (request.selector, request.tolerations, labels, tolerations)
        found = self._eligible.get(key)
        if found is None:
            wanted = {**dict(request.selector), **dict(labels)}
            allowed = [*request.tolerations, *tolerations]
            found = self._eligible[key] = tuple(
                node for node in self.nodes.values() if _bears(node, wanted) and not _keeps_off(node, allowed)
            )
        return found

    def away(self, request: Request, flavor: Flavor | None) -> dict[str, str]:
        """Nodes that could hold one of the pods but let none on now, or are not there; and why."""
        labels, tolerations = self._demands(flavor)
        key = (request.selector, request.tolerations, labels, tolerations)
        if key not in self._not_now:
            wanted = {**dict(request.selector), **dict(labels)}
            allowed = [*request.tolerations, *tolerations]
            bearing = (node for node in (*self.nodes.values(), *self.missing) if _bears(node, wanted))
            self._not_now[key] = [(node, why) for node in bearing if (why := _keeps_off(node, allowed)) or node.unreadable]
        found = {}
        for node, why in self._not_now[key]:
            if (why := why or _cannot_be_read(node, request.per_pod)) and _could_hold(node, request.per_pod):
                found[node.name] = why
        return found

    def capacity(self, request: Request, flavor: Flavor | None) -> int:
        """Pods that would fit on the eligible nodes if nothing else ran there."""
        key = (request.selector, request.tolerations, *self._demands(flavor))
        if key not in self._machines:
            kinds = Counter(tuple(sorted(node.allocatable.items())) for node in self.eligible(request, flavor))
            self._machines[key] = [(dict(allocatable), count) for allocatable, count in kinds.items()]
        return sum(count * _pods_that_fit(allocatable, request.per_pod) for allocatable, count in self._machines[key])

    def fitting(self, request: Request, flavor: Flavor | None) -> dict[str, int]:
        """Pods that fit on each eligible node now."""
        key = (request.selector, request.tolerations, *self._demands(flavor), request.per_pod)
        found = self._fitting.get(key)
        if found is None:
            fitting = {node.name: _pods_that_fit(self._free[node.name], request.per_pod) for node in self.eligible(request, flavor)}
            found = self._fitting[key] = request.per_pod, fitting
        return found[1]

    def place(self, request: Request, pods: int, flavor: Flavor | None) -> Place | None:
        """Nodes for so many pods: the fullest first, so that whole nodes stay whole; within one domain where that is asked for."""
        nodes = [(fit, name) for name, fit in self.fitting(request, flavor).items() if fit]
        if not request.topology_key:
            return _fill(nodes, pods)
        domains: dict[str, list[tuple[int, str]]] = {}
        for fit, name in nodes:
            if (value := self.nodes[name].labels.get(request.topology_key)) is not None:
                domains.setdefault(value, []).append((fit, name))
        sizes = sorted((sum(fit for fit, _ in members), value) for value, members in domains.items())
        return next((_fill(domains[value], pods) for size, value in sizes if size >= pods), None)

    def domain(self, request: Request, place: Place) -> tuple[str, str] | None:
        """The topology domain of a place."""
        if not request.topology_key or not place:
            return None
        return request.topology_key, self.nodes[place[0][0]].labels[request.topology_key]

    def soonest(self, request: Request, pods: int, flavor: Flavor | None) -> Place:
        """The nodes that a gang would have soonest, whatever runs there now: they are to be kept for it."""
        fitting = self.fitting(request, flavor)
        place, left = [], pods
        for node in sorted(self.eligible(request, flavor), key=lambda node: (-fitting[node.name], node.name)):
            take = min(left, max(fitting[node.name], _pods_that_fit(node.allocatable, request.per_pod)))
            if take > 0:
                place.append((node.name, take))
                left -= take
            if left <= 0:
                break
        return tuple(place)

    def free_units(self, request: Request, flavor: Flavor | None) -> int:
        """Free units of the requested resource on the nodes that it may use."""
        return sum(max(0, self._free[node.name].get(request.resource, 0)) for node in self.eligible(request, flavor))


def _bears(node: Node, labels: Mapping[str, str]) -> bool:
    return all(node.labels.get(label) == value for label, value in labels.items())


def _keeps_off(node: Node, tolerations: list[tuple[str, str, str, str]]) -> str:
    """Why no pod with these tolerations may come now; empty where one may."""
    if node.away:
        return node.away
    taint = next((taint for taint in node.taints if not tolerates(tolerations, taint)), None)
    return f"taint {taint.key}{f'={taint.value}' if taint.value else ''}:{taint.effect}" if taint is not None else ""


def _cannot_be_read(node: Node, shape: Shape) -> str:
    return next((f"allocatable {name}: {node.unreadable[name]!r} is not a quantity" for name, _ in shape if name in node.unreadable), "")


def _could_hold(node: Node, shape: Shape) -> bool:
    """Whether a pod would fit on it if nothing else ran there, by what is known of it."""
    return all(name in node.unreadable or node.allocatable.get(name, 0) >= amount for name, amount in shape)


def _pods_that_fit(free: Amounts, shape: Shape) -> int:
    most = 1_000_000
    for resource, amount in shape:
        if amount > 0:
            most = min(most, free.get(resource, 0) // amount)
    return max(0, most)


def _fill(nodes: list[tuple[int, str]], pods: int) -> Place | None:
    if sum(fit for fit, _ in nodes) < pods:
        return None
    place, left = [], pods
    for fit, name in sorted(nodes):
        take = min(fit, left)
        place.append((name, take))
        left -= take
        if left == 0:
            break
    return tuple(place)


def never_fits(request: Request, fleet: Fleet) -> str | None:
    """Why no node that was ever seen could hold one pod, or None. Nodes without the resource say nothing: others may come."""
    largest = fleet.largest(request.resource)
    if not request.units or not largest or largest >= request.units:
        return None
    shape = f"distribution.gpusPerNode {largest} with distribution.nodes {-(-request.pods[0] * request.units // largest)}"
    return (
        f"each worker pod asks for {request.units} {request.resource}, and no node has more than {largest}; "
        f"the largest shape that would fit: {shape}"
    )
