"""What answers a request: which version of which endpoint, and which of its replicas. Pure, but for what it remembers of replicas."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from .catalog import Asked, Canary, Endpoint, Key

FIRST_PAUSE, MOST_PAUSE = 2.0, 30.0
"""Seconds that a replica which failed is left alone: doubled with each failure that follows."""


@dataclass(frozen=True)
class Target:
    """A version of a model on an endpoint."""

    endpoint: Key
    model: str
    """Of the FineTunedModel, or of the endpoint where its base is asked."""
    version: int | None
    """None: the base."""
    replicas: tuple[str, ...]
    canary: Canary | None = None
    """Set where the request was given to one of two versions: it counts."""

    @property
    def upstream(self) -> str:
        """The name that replicas know it by."""
        return self.model if self.version is None else f"{self.model}@{self.version}"

    @property
    def is_new(self) -> bool:
        """Whether it is the new one of the two."""
        return self.canary is not None and self.version == self.canary.version


def choose(model: Asked, endpoints: Sequence[Endpoint], random: Callable[[], float]) -> Target | None:
    """One of the endpoints of one namespace, by how many replicas each has, and a version of it. None where nothing answers.

    `random`: evenly from 0 to 1.
    """
    found = [target for endpoint in endpoints if (target := _of(endpoint, model, random)) is not None]
    if len(found) < 2:
        return found[0] if found else None
    left = random() * sum(len(target.replicas) for target in found)
    for target in found:
        left -= len(target.replicas)
        if left < 0:
            return target
    return found[-1]


def _of(endpoint: Endpoint, model: Asked, random: Callable[[], float]) -> Target | None:
    served = endpoint.models.get(model.name)
    if served is None:
        return Target(endpoint.key, model.name, None, endpoint.base) if endpoint.base and model.version is None else None
    version, canary = model.version or served.champion, None
    if model.version is None and served.canary is not None and served.canary.version in served.versions:
        canary = served.canary
        if random() * 100 < canary.percent:
            version = canary.version
    replicas = served.versions.get(version or 0)
    return Target(endpoint.key, model.name, version, replicas, canary) if replicas else None


class _Replica:
    """What is remembered of one address."""

    __slots__ = ("failures", "outstanding", "until")

    def __init__(self) -> None:
        self.outstanding = self.failures = 0
        self.until = 0.0


class Replicas:
    """How busy each replica is, and which failed lately (a circuit breaker each)."""

    def __init__(self, monotonic: Callable[[], float], random: Callable[[], float]) -> None:
        self._monotonic, self._random = monotonic, random
        self._known: dict[str, _Replica] = {}

    def pick(self, addresses: Collection[str], tried: Collection[str] = ()) -> str | None:
        """The one with the fewest requests of this gateway; it has one more until `done`. None when all were tried.

        One that failed is left alone for a while; then one request shows whether it is well. Where all failed lately, the one
        whose pause ends first is asked anyway.
        """
        now = self._monotonic()
        known = [(address, self._known.setdefault(address, _Replica())) for address in addresses if address not in tried]
        if not known:
            return None
        well = [(replica.outstanding, self._random(), address) for address, replica in known if replica.until <= now]
        address = min(well)[2] if well else min((replica.until, address) for address, replica in known)[1]
        replica = self._known[address]
        replica.outstanding += 1
        if replica.failures:
            replica.until = now + _pause(replica.failures)
        return address

    def done(self, address: str, *, failed: bool | None) -> None:
        """A request has ended. `failed`: None where that says nothing of the replica."""
        replica = self._known[address]
        replica.outstanding -= 1
        if failed:
            replica.failures += 1
            replica.until = self._monotonic() + _pause(replica.failures)
        elif failed is False:
            replica.failures, replica.until = 0, 0.0

    def outstanding(self, address: str) -> int:
        """Requests that it has of this gateway."""
        return self._known[address].outstanding if address in self._known else 0

    def forget(self, present: Collection[str]) -> None:
        """Keep only these, and those that still answer."""
        self._known = {address: replica for address, replica in self._known.items() if replica.outstanding or address in present}

    @property
    def paused(self) -> int:
        """Replicas that are left alone now."""
        now = self._monotonic()
        return sum(replica.until > now for replica in self._known.values())


def _pause(failures: int) -> float:
    return float(min(MOST_PAUSE, FIRST_PAUSE * 2 ** min(failures - 1, 10)))
