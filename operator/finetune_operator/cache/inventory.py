"""What is known of the cluster besides the jobs: queues, nodes, what pods hold of them, namespaces, priorities.

Kept up by events; of each object only what decisions need. Knows nothing of where the events come from.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from ..model.nodes import NOT_READY, namespace_of, node_of, pod_requests, queue_of
from ..model.objects import Object, version_of
from ..model.queueing import IMPLICIT, Amounts, Namespace, Node, Queue, Taint, may_use, name_of_queue

T = TypeVar("T")
_NOTHING: Amounts = {}
_READABLE: Mapping[str, str] = {}
_KEPT = 1024
"""Shapes that are kept once for all who have them"""


class Labels(Mapping[str, str]):
    """Labels of a node: the keys are kept once for all nodes that have the same ones."""

    __slots__ = ("_places", "_values")

    def __init__(self, labels: Mapping[str, str]) -> None:
        keys = sorted(labels)
        self._places = _places(tuple(map(sys.intern, keys)))
        self._values = tuple(sys.intern(labels[key]) for key in keys)

    def __getitem__(self, key: str) -> str:
        return self._values[self._places[key]]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a label."""
        place = self._places.get(key)
        return default if place is None else self._values[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Labels):
            return self._values == other._values and self._places == other._places
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]


@functools.lru_cache(_KEPT)
def _places(keys: tuple[str, ...]) -> dict[str, int]:
    return {key: place for place, key in enumerate(keys)}


@functools.lru_cache(_KEPT)
def _amounts(items: tuple[tuple[str, int], ...]) -> Amounts:
    """Shared by all who have the same: never changed."""
    return {sys.intern(name): amount for name, amount in items}


@functools.lru_cache(_KEPT)
def _taints(taints: tuple[Taint, ...]) -> tuple[Taint, ...]:
    return taints


@dataclass(frozen=True, slots=True)
class Holding:
    """What a pod holds of a node."""

    uid: str
    node: str
    amounts: Amounts


@dataclass(frozen=True, slots=True)
class PriorityClass:
    """The value of a PriorityClass."""

    name: str
    value: int
    default: bool


def read_node(raw: Object) -> Node:
    """A node as decisions need it; what many nodes share is kept once."""
    node = node_of(raw)
    return replace(
        node,
        name=sys.intern(node.name),
        labels=Labels(node.labels),
        taints=_taints(node.taints),
        allocatable=_amounts(tuple(sorted(node.allocatable.items()))),
        unreadable=node.unreadable or _READABLE,
        used=_NOTHING,
    )


def read_pod(raw: Object) -> Holding:
    """What a pod holds, of the node that it is bound to."""
    requests = pod_requests(raw["spec"])
    return Holding(raw["metadata"]["uid"], sys.intern(raw["spec"]["nodeName"]), _amounts(tuple(sorted(requests.items()))))


def read_namespace(raw: Object) -> tuple[str, Namespace]:
    """Name, and what of a namespace matters to queues."""
    return raw["metadata"]["name"], namespace_of(raw)


def read_priority(raw: Object) -> PriorityClass:
    """A PriorityClass."""
    return PriorityClass(raw["metadata"]["name"], int(raw.get("value", 0)), bool(raw.get("globalDefault")))


class Kept(Generic[T]):
    """The objects of one kind, by name or UID: where a reflector puts them."""

    def __init__(self, key: Callable[[T], str], changed: Callable[[], None]) -> None:
        self._key, self._changed = key, changed
        self.items: dict[str, T] = {}
        self.refused: tuple[int, str] | None = None
        """(status, why): the operator may not look (403), or the kind is not served (404)"""
        self.listed = False
        """It is known what is there"""

    def replace(self, values: Iterable[T]) -> None:
        """These, and no others, are there."""
        self.refused, self.listed = None, True
        new = {self._key(value): value for value in values}
        for key in self.items.keys() - new.keys():
            self.drop(self.items[key])
        for value in new.values():
            self.put(value)

    def put(self, value: T) -> None:
        """One has come, or is different now."""
        key = self._key(value)
        old = self.items.get(key)
        if old != value:
            self.items[key] = value
            self._differs(old, value)

    def drop(self, value: T) -> None:
        """One is gone."""
        old = self.items.pop(self._key(value), None)
        if old is not None:
            self._differs(old, None)

    def refuse(self, status: int, why: str) -> None:
        """Nothing can be known of the kind."""
        self.replace(())
        self.refused = (status, why)

    def _differs(self, old: T | None, new: T | None) -> None:
        self._changed()


class Priorities(Kept[PriorityClass]):
    """PriorityClasses."""

    def __init__(self, changed: Callable[[], None]) -> None:
        super().__init__(lambda known: known.name, changed)
        self.values: Mapping[str, int] = {}
        """By name; another object whenever one has changed"""
        self.default = 0

    def _differs(self, old: PriorityClass | None, new: PriorityClass | None) -> None:
        self.values = {known.name: known.value for known in self.items.values()}
        self.default = next((known.value for known in self.items.values() if known.default), 0)
        self._changed()


class Queues(Kept[Object]):
    """FineTuneQueues: as they are, for writes of their status, and parsed."""

    def __init__(self, changed: Callable[[], None]) -> None:
        super().__init__(lambda raw: str(raw["metadata"]["name"]), changed)
        self.parsed: dict[str, Queue] = {}

    def put(self, value: Object) -> None:
        """One has come, or is different now; or the answer to a write of its status, of which the watch will tell late."""
        old = self.items.get(self._key(value))
        if old is None or version_of(value) > version_of(old) or value["metadata"].get("uid") != old["metadata"].get("uid"):
            meta = {field: known for field, known in value["metadata"].items() if field != "managedFields"}
            super().put({**value, "metadata": meta})

    def replace(self, values: Iterable[Object]) -> None:
        """These, and no others, are there; whatever was known of them: a server that was restored from a backup counts anew."""
        new = {self._key(raw): raw for raw in values}
        for name, old in list(self.items.items()):
            if name not in new or version_of(new[name]) < version_of(old):
                self.drop(old)
        super().replace(new.values())

    def _differs(self, old: Object | None, new: Object | None) -> None:
        name = self._key(new or old or {})
        if new is None:
            self.parsed.pop(name, None)
        else:
            self.parsed[name] = queue_of(new)
        if old is None or new is None or old.get("spec") != new.get("spec"):  # its status is this operator's own
            self._changed()


class Holdings(Kept[Holding]):
    """What pods hold of nodes, by the UID of the pod: of all namespaces, or of one."""

    def __init__(self, use: NodeUse, changed: Callable[[], None]) -> None:
        super().__init__(lambda holding: holding.uid, changed)
        self._use = use

    def replace(self, values: Iterable[Holding]) -> None:
        """These, and no others, are there."""
        self.refused, self.listed = None, True
        old, self.items = self.items, {holding.uid: holding for holding in values}
        gone = [(holding, -1) for uid, holding in old.items() if self.items.get(uid) != holding]
        self._count([*gone, *((holding, 1) for uid, holding in self.items.items() if old.get(uid) != holding)])

    def _differs(self, old: Holding | None, new: Holding | None) -> None:
        self._count([(holding, sign) for holding, sign in ((old, -1), (new, 1)) if holding is not None])

    def _count(self, changes: list[tuple[Holding, int]]) -> None:
        self._use.count((holding, sign) for holding, sign in changes if holding.uid not in self._use.ours)
        if ended := {holding.uid for holding, _ in changes if holding.uid in self._use.left and holding.uid not in self.items}:
            self._use.left -= ended
            self._changed()


class NodeUse:
    """What pods hold of each node, but for those that are counted with their job."""

    def __init__(self) -> None:
        self.ours: frozenset[str] = frozenset()
        """UIDs of the pods that are not counted here"""
        self.left: set[str] = set()
        """UIDs of pods that were ours and are not any more, of whose end nothing was heard yet: that of one is waited for"""
        self.used: dict[str, Amounts] = {}
        self.stale: set[str] = set()
        """Nodes whose use has changed"""

    def count(self, changes: Iterable[tuple[Holding, int]]) -> None:
        """Take (1) or give back (-1) what pods hold."""
        changed: dict[str, dict[str, int]] = {}
        for holding, sign in changes:
            used = changed.get(holding.node)
            if used is None:
                used = changed[holding.node] = dict(self.used.get(holding.node, _NOTHING))
            for name, amount in holding.amounts.items():
                used[name] = used.get(name, 0) + sign * amount
        for node, used in changed.items():
            left = tuple(sorted((name, amount) for name, amount in used.items() if amount))
            if left:
                self.used[node] = _amounts(left)
            else:
                self.used.pop(node, None)
        self.stale.update(changed)


class Nodes(Kept[Node]):
    """Nodes by name, and the view of them that a snapshot takes: made anew only where something has changed."""

    def __init__(self, use: NodeUse, changed: Callable[[], None]) -> None:
        super().__init__(lambda node: node.name, changed)
        self._use = use
        self._views: dict[str, Node] = {}
        self._all: tuple[Node, ...] | None = ()

    def _differs(self, old: Node | None, new: Node | None) -> None:
        self._use.stale.add((new or old).name)  # type: ignore[union-attr]
        self._changed()

    def view(self) -> tuple[Node, ...]:
        """All nodes with what is held of them."""
        for name in sorted(self._use.stale):
            self._all = None
            node = self.items.get(name)
            if node is None:
                self._views.pop(name, None)
            else:
                used = self._use.used.get(name, _NOTHING)
                self._views[name] = replace(node, used=used) if used else node
        self._use.stale.clear()
        if self._all is None:
            self._all = tuple(self._views.values())
        return self._all


class Inventory:
    """What is not the operator's own."""

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        """`changed`: something is different on which decisions depend; not told of pods of others that come and go."""
        self._use, self._changed = NodeUse(), changed
        self.queues = Queues(changed)
        self.nodes = Nodes(self._use, changed)
        self.namespaces: Kept[tuple[str, Namespace]] = Kept(lambda known: known[0], changed)
        self.priorities = Priorities(changed)
        self._pods: dict[str, Holdings] = {}
        """By namespace; all of them under an empty name"""

    def pods(self, namespace: str = "") -> Holdings:
        """Where the pods of a namespace, or of all, are put."""
        return self._pods.setdefault(namespace, Holdings(self._use, self._changed))

    def queue_problem(self, namespace: str, queue: str) -> str:
        """Why a queue is not for the namespace; nothing where it is, or where that is not known."""
        if not self.queues.listed or self.queues.refused is not None:
            return ""
        known = self.queues.parsed.get(queue)
        if known is None:
            return f"scheduling.queue: there is no FineTuneQueue {queue}"
        home = self.namespaces.items.get(namespace)
        if may_use(known, home[1] if home is not None else None):
            return ""
        return f"scheduling.queue: queue {queue} is not for namespace {namespace} (its namespaceSelector)"

    def queue_of(self, namespace: str, named: str | None) -> str:
        """The queue of those of a namespace that name this one, or none: by the rule of jobs; empty where there are no queues."""
        if not self.queues.parsed:
            return named or IMPLICIT
        home = self.namespaces.items.get(namespace)
        return name_of_queue(named, home[1] if home is not None else None)

    def requests_of(self, uids: Iterable[str]) -> dict[str, Amounts]:
        """What those of these pods that are bound to a node hold of it."""
        wanted = set(uids)
        return {uid: pods.items[uid].amounts for pods in self._pods.values() for uid in wanted & pods.items.keys()}

    def is_lost(self, node: str) -> bool:
        """Whether a node is gone or not ready, as far as is known: its kubelet will not confirm that a pod has ended."""
        known = self.nodes.items.get(node)
        return self.nodes.refused is None and self.nodes.listed and (known is None or known.away == NOT_READY)

    def nodes_but_for(self, ours: Iterable[str]) -> tuple[Node, ...] | None:
        """Nodes with what pods hold of them, other than those with these UIDs; None where nodes are not to be seen.

        Costs as much as has changed since it was asked last.
        """
        if self.nodes.refused is not None:
            return None
        now = frozenset(ours)
        different = now ^ self._use.ours
        found = [holding for pods in self._pods.values() for uid in different if (holding := pods.items.get(uid)) is not None]
        self._use.count((holding, -1 if holding.uid in now else 1) for holding in found)
        self._use.left = {holding.uid for holding in found if holding.uid not in now} | (self._use.left - now)
        self._use.ours = now
        return self.nodes.view()
