"""The objects of one reconciled kind, as last seen or written. Knows nothing of what is in them, nor of what they own.

A state is taken up once, and an older one never again; an object that was deleted is not brought back by a late event.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from ..model.objects import Key, Object, key_of, version_of

_MOST_GRAVES, _GRAVE_SECONDS = 20_000, 600


class Graves:
    """UIDs of deleted objects, of all kinds."""

    def __init__(self) -> None:
        self._gone: dict[str, float] = {}

    def bury(self, uid: str) -> None:
        """It was deleted."""
        now = time.monotonic()
        self._gone[uid] = now
        if len(self._gone) > _MOST_GRAVES:
            self._gone = {u: t for u, t in self._gone.items() if now - t < _GRAVE_SECONDS}

    def hides(self, uid: str, asked_at: float | None) -> bool:
        """Whether it was deleted, so that a late event must not bring it back. An answer of the server does: etcd was restored."""
        if uid in self._gone and is_older(self._gone[uid], asked_at):
            del self._gone[uid]
        return uid in self._gone

    def __contains__(self, uid: str) -> bool:
        return uid in self._gone


def is_older(heard_at: float | None, asked_at: float | None) -> bool:
    """Whether something was heard before the server was asked."""
    return heard_at is not None and asked_at is not None and heard_at < asked_at


class Objects:
    """By key. `keep`: what is remembered of an object. `is_ours`: whether it is taken up at all. `changed`: told of each new state,
    and of each end. `forgotten`: told the UID of each object that is gone, whatever told of its end: a watch, a LIST, another of its name.
    """

    def __init__(
        self,
        graves: Graves,
        *,
        keep: Callable[[Object], Object] = lambda raw: raw,
        is_ours: Callable[[Object], bool] = lambda raw: True,
        changed: Callable[[Object, bool], None],
        forgotten: Callable[[str], None],
    ) -> None:
        self._graves, self._keep, self._is_ours = graves, keep, is_ours
        self._changed, self._forgotten = changed, forgotten
        self._objects: dict[Key, Object] = {}
        self._keys: dict[str, Key] = {}
        self._seen: dict[str, float] = {}
        """By UID: when the present state came"""

    def put(self, raw: Object, asked_at: float | None = None) -> Key:
        """Remember an object, unless a newer state of it is known.

        `asked_at` (monotonic): when the server was asked for it. Whatever was heard before that is older, or of a history that a
        restored etcd does not know: then the answer counts, whatever its resourceVersion.
        """
        key, uid = key_of(raw), raw["metadata"]["uid"]
        known = self._objects.get(key)
        if self._graves.hides(uid, asked_at):
            return key
        if not self._is_ours(raw):
            if known is not None and known["metadata"]["uid"] != uid:
                self.drop(known)
            return key
        if not self.is_known(raw) or (is_older(self._seen.get(uid), asked_at) and version_of(raw) != version_of(known or raw)):
            if known is not None and known["metadata"]["uid"] != uid:
                self._forget(known["metadata"]["uid"])
            kept = self._objects[key] = self._keep(raw)
            self._keys[uid], self._seen[uid] = key, time.monotonic()
            self._changed(kept, False)
        return key

    def is_known(self, raw: Object) -> bool:
        """Whether this very state of the object, or a newer one, is remembered."""
        known = self._objects.get(key_of(raw))
        return known is not None and known["metadata"]["uid"] == raw["metadata"]["uid"] and 0 < version_of(raw) <= version_of(known)

    def drop(self, raw: Object) -> Key:
        """Forget a deleted object."""
        key, uid = key_of(raw), raw["metadata"]["uid"]
        known = self._objects.get(key)
        if known is not None and known["metadata"]["uid"] == uid:
            del self._objects[key]
            raw = known
        self._forget(uid)
        self._graves.bury(uid)
        self._changed(raw, True)
        return key

    def prune(self, listed: set[str], listed_at: float) -> None:
        """Forget objects that a LIST did not show and that were not seen since it began: one may have been created meanwhile."""
        for raw in list(self._objects.values()):
            uid = raw["metadata"]["uid"]
            if uid not in listed and self._seen[uid] < listed_at:
                self.drop(raw)

    def _forget(self, uid: str) -> None:
        self._keys.pop(uid, None)
        self._seen.pop(uid, None)
        self._forgotten(uid)

    def get(self, key: Key) -> Object | None:
        """The object of that key."""
        return self._objects.get(key)

    def key_of_uid(self, uid: str) -> Key | None:
        """The key of the object of that UID."""
        return self._keys.get(uid)

    def of_uid(self, uid: str) -> Object | None:
        """The object of that UID."""
        key = self._keys.get(uid)
        return self._objects.get(key) if key is not None else None

    @property
    def keys(self) -> list[Key]:
        """Keys of all of them."""
        return list(self._objects)

    def of_namespace(self, namespace: str) -> list[Object]:
        """Those of a namespace. Looks through all of them."""
        return [raw for key, raw in self._objects.items() if key[0] == namespace]

    def __iter__(self) -> Iterator[Object]:
        return iter(self._objects.values())

    def __len__(self) -> int:
        return len(self._objects)
