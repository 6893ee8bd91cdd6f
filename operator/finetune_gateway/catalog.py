"""Which models there are, and which replicas may answer for them, by the status of the FineTuneEndpoints. Pure."""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from finetune_api.serving import USER_PORT

MOST_NEAR = 8
_LABEL = r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_MODEL = re.compile(rf"(?:({_LABEL})/)?({_LABEL}(?:\.{_LABEL}){{0,100}})(?:@([1-9][0-9]{{0,6}}))?")
_VERSIONED = re.compile(r"(.+)@([1-9][0-9]{0,6})")
Key = tuple[str, str]
"""Namespace and name of a FineTuneEndpoint."""


class _Meta(msgspec.Struct):
    name: str
    namespace: str
    creationTimestamp: str = ""


class _ReplicaModel(msgspec.Struct):
    name: str
    state: str = "Pending"


class _Pod(msgspec.Struct):
    address: str = ""
    ready: bool = False
    models: list[_ReplicaModel] | None = None


class _Canary(msgspec.Struct):
    version: int
    percent: int = 0
    since: str | None = None


class _Model(msgspec.Struct):
    name: str
    version: int | None = None
    canary: _Canary | None = None


class _Status(msgspec.Struct):
    pods: list[_Pod] | None = None
    models: list[_Model] | None = None


class _Endpoint(msgspec.Struct):
    metadata: _Meta
    status: _Status | None = None


_DECODE = msgspec.json.Decoder(_Endpoint).decode


@dataclass(frozen=True)
class Canary:
    """A new champion on its way."""

    version: int
    percent: int
    since: str
    """When its step began; empty: it is not counted."""


@dataclass(frozen=True)
class Served:
    """A tuned model of an endpoint."""

    champion: int | None
    """Version that answers under its name."""
    canary: Canary | None
    versions: dict[int, tuple[str, ...]]
    """By version: the addresses that may answer for it. Only versions for which there is one."""


@dataclass(frozen=True)
class Endpoint:
    """What the gateway knows of a FineTuneEndpoint."""

    namespace: str
    name: str
    created: str = ""
    base: tuple[str, ...] = ()
    """Addresses of the replicas that answer."""
    models: dict[str, Served] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """Namespace and name."""
        return self.namespace, self.name

    def names(self) -> Iterator[str]:
        """All names that it answers under now, without the namespace."""
        for model, served in self.models.items():
            if served.champion in served.versions:
                yield model
            yield from (f"{model}@{version}" for version in sorted(served.versions))
        if self.base and self.name not in self.models:
            yield self.name


@dataclass(frozen=True)
class Asked:
    """The `model` of a request."""

    namespace: str
    """Empty: any."""
    name: str
    version: int | None

    def __str__(self) -> str:
        return f"{self.namespace}/" * bool(self.namespace) + self.name + (f"@{self.version}" if self.version is not None else "")


def asked(model: str) -> Asked | None:
    """NAME, NAME@VERSION, or either with NAMESPACE/ before it; None for what cannot be a model's name."""
    match = _MODEL.fullmatch(model) if len(model) <= 400 else None
    return Asked(match[1] or "", match[2], int(match[3]) if match[3] else None) if match else None


def read_endpoint(raw: bytes) -> Endpoint:
    """A FineTuneEndpoint's JSON to what is kept of it. Raises ValueError where it is none."""
    found = _DECODE(raw)
    status = found.status or _Status()
    ready = [(address, pod) for pod in status.pods or () if pod.ready and (address := _address(pod.address))]
    states: dict[str, dict[str, str]] = {}
    for address, pod in ready:
        for model in pod.models or ():
            states.setdefault(model.name, {})[address] = model.state
    versions: dict[str, dict[int, tuple[str, ...]]] = {}
    for name, by_address in states.items():
        match, usable = _VERSIONED.fullmatch(name), _usable(by_address)
        if match and usable:
            versions.setdefault(match[1], {})[int(match[2])] = usable
    models = {
        model.name: Served(
            model.version,
            Canary(model.canary.version, model.canary.percent, model.canary.since or "") if model.canary is not None else None,
            versions.get(model.name, {}),
        )
        for model in status.models or ()
    }
    meta = found.metadata
    return Endpoint(meta.namespace, meta.name, meta.creationTimestamp, tuple(address for address, _ in ready), models)


def _usable(states: dict[str, str]) -> tuple[str, ...]:
    """Replicas that were found to serve it. Where nothing can be told of any that has it, those of which nothing can be told."""
    verified = tuple(address for address, state in states.items() if state == "Verified")
    if verified or set(states.values()) != {"Unverifiable"}:
        return verified
    return tuple(states)


def _address(text: str) -> str:
    """HOST:PORT of a replica, by an IP address; empty for what a request must not be sent to."""
    host, port = text, str(USER_PORT)
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":") or port
    elif text.count(":") == 1:
        host, port = text.split(":")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""
    if address.is_link_local or address.is_multicast or address.is_unspecified or not (port.isdecimal() and 0 < int(port) < 65536):
        return ""
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


class Catalog:
    """All endpoints. A reflector's sink."""

    def __init__(self) -> None:
        self.endpoints: dict[Key, Endpoint] = {}
        self._by_name: dict[str, list[Endpoint]] | None = None

    def replace(self, values: Iterable[Endpoint], namespace: str = "") -> None:
        """These, and no others, are there (of a namespace, or of all)."""
        kept = {key: value for key, value in self.endpoints.items() if namespace and key[0] != namespace}
        self.endpoints = {**kept, **{value.key: value for value in values}}
        self._by_name = None

    def put(self, value: Endpoint) -> None:
        """One has come, or is different now."""
        self.endpoints[value.key] = value
        self._by_name = None

    def drop(self, value: Endpoint) -> None:
        """One is gone."""
        self.endpoints.pop(value.key, None)
        self._by_name = None

    def refuse(self, status: int, why: str) -> None:
        """Nothing new can be known: what was known stays, and the gateway is not ready."""

    def addresses(self) -> set[str]:
        """Of all replicas."""
        return {address for endpoint in self.endpoints.values() for address in endpoint.base}

    def candidates(self, model: Asked) -> list[Endpoint]:
        """Endpoints that serve a name, whatever of it answers now."""
        if self._by_name is None:
            self._by_name = {}
            for endpoint in self.endpoints.values():
                for name in {endpoint.name, *endpoint.models}:
                    self._by_name.setdefault(name, []).append(endpoint)
        found = self._by_name.get(model.name, ())
        return [endpoint for endpoint in found if model.namespace in ("", endpoint.namespace) and _serves(endpoint, model)]


def _serves(endpoint: Endpoint, model: Asked) -> bool:
    served = endpoint.models.get(model.name)
    return model.version is None if served is None else model.version is None or model.version in served.versions


def listed(endpoints: Iterable[Endpoint]) -> dict[str, Endpoint]:
    """What a caller who may use these endpoints can ask for: the short name where only one namespace has it."""
    found: dict[str, dict[str, Endpoint]] = {}
    for endpoint in endpoints:
        for name in endpoint.names():
            found.setdefault(name, {}).setdefault(endpoint.namespace, endpoint)
    return {
        name if len(by_namespace) == 1 else f"{namespace}/{name}": endpoint
        for name, by_namespace in sorted(found.items())
        for namespace, endpoint in sorted(by_namespace.items())
    }


def near(model: str, names: Iterable[str]) -> list[str]:
    """The names that are most like it."""
    known = list(names)
    return difflib.get_close_matches(model, known, n=MOST_NEAR, cutoff=0.4) or known[:MOST_NEAR]
