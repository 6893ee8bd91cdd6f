"""The API server behind a few verbs. One connection pool, explicit time-outs, Retry-After honoured. Knows nothing of what it carries."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Protocol, TypeVar
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import client as kubernetes_client
from multidict import CIMultiDict
from pydantic_core import from_json

from finetune_api import names

from .. import metrics, tracing
from ..model.legible import identified
from ..model.objects import Object
from .clock import ServerClock
from .errors import APIError, api_error, unreachable
from .limits import Priority, RateLimit
from .resources import RESOURCES, Resource

log = logging.getLogger("finetune.transport")
_Shape = TypeVar("_Shape", dict[str, Any], list[Any])
REQUEST_TIMEOUT = 30.0
LIST_CHUNK = 500
_TRANSIENT_TRIES = 4
_LONGEST_LINE = 32 * 2**20
"""Bytes. etcd takes objects of 1.5 MiB."""
_SILENT_SECONDS = 150.0
"""A watch that brings nothing for so long is given up, and the kind listed again: the server sends a bookmark about every minute."""
DEFAULT_QPS, DEFAULT_BURST = 50.0, 100
T = TypeVar("T")


class Cluster(Protocol):
    """What the controller needs of a cluster; tests put a fake in its place."""

    async def apply(self, manifest: Object) -> Object:
        """Server-side apply under one field manager."""

    async def create(self, manifest: Object) -> Object:
        """Create; APIError 409 when the name is taken."""

    async def get(self, kind: str, namespace: str, name: str) -> Object:
        """Read one object; APIError 404 when absent."""

    async def patch(self, kind: str, namespace: str, name: str, body: Object) -> Object:
        """JSON merge patch; APIError 404 when absent."""

    async def serves(self, kind: str) -> bool:
        """Whether the API server knows a kind in its version."""

    async def delete(self, kind: str, namespace: str, name: str, uid: str, grace_seconds: int | None = None) -> Object | None:
        """Delete in the background if the UID matches; the object while it lingers, None when it is gone."""

    async def replace(self, manifest: Object) -> Object:
        """Replace an object on condition of its resourceVersion; APIError 409 when stale."""

    async def replace_status(self, raw: Object, *, urgent: bool = True) -> Object:
        """Write the status on condition of the resourceVersion; APIError 409 when stale."""

    def list(self, kind: str, namespace: str = "", selector: str = "") -> AsyncIterator[Object]:
        """All objects of a kind, in chunks."""

    async def list_page(self, kind: str, namespace: str, query: Mapping[str, str]) -> bytes:
        """One page of a LIST, as it came; APIError 410 when its `continue` is too old."""

    def watch(self, kind: str, namespace: str, query: Mapping[str, str]) -> AsyncIterator[bytes]:
        """The events of a WATCH, one line each, until the server ends it; APIError when it refuses or the connection breaks."""

    async def review_token(self, token: str, audience: str) -> Object:
        """The status of a TokenReview; an empty audience is the API server's own."""

    def now(self) -> datetime:
        """The API server's time."""


class KubernetesCluster:
    """The real API server."""

    def __init__(self, api: kubernetes_client.ApiClient, limit: RateLimit | None = None) -> None:
        self._api = api
        self._clock = ServerClock()
        self._limit = limit if limit is not None else RateLimit(DEFAULT_QPS, DEFAULT_BURST)
        self.calls: Counter[tuple[str, str]] = Counter()
        """Requests by (verb, kind)."""
        self._acting_as: list[tuple[str, str]] = []

    def acting_as(self, user: str, groups: Iterable[str] = ()) -> KubernetesCluster:
        """The same connections, with the rights of that user alone: the API server has to allow the impersonation.

        A service account needs no groups: the server knows them.
        """
        other = copy.copy(self)
        other._acting_as = [("Impersonate-User", user), *(("Impersonate-Group", group) for group in groups)]
        return other

    async def request(
        self,
        method: str,
        path: str,
        *,
        kind: str,
        verb: str,
        body: Object | None = None,
        query: dict[str, str] | None = None,
        content_type: str = "application/json",
        priority: Priority = Priority.LOOK,
    ) -> Object:
        """One request; transient failures are retried with jitter. Raises APIError."""
        return await self._retried(lambda: self._once(method, path, kind, verb, body, query, content_type), kind, verb, priority)

    async def _retried(self, once: Callable[[], Awaitable[T]], kind: str, verb: str, priority: Priority) -> T:
        for attempt in range(_TRANSIENT_TRIES):
            if kind != "Lease":  # late, it would be lost
                await self._limit.acquire(priority)
            try:
                with tracing.span(f"{verb} {kind}"):
                    return await once()
            except APIError as failure:
                # a POST that may have been carried out is safe to repeat: its name is fixed, the second gets a 409
                if not failure.transient or attempt == _TRANSIENT_TRIES - 1:
                    raise
                await asyncio.sleep(failure.retry_after or (0.2 * 2**attempt * (0.5 + random.random())))
        raise AssertionError("unreachable")

    async def _once(
        self,
        method: str,
        path: str,
        kind: str,
        verb: str,
        body: Object | None,
        query: dict[str, str] | None,
        content_type: str,
    ) -> Object:
        data = await self._answer(method, path, kind, verb, body, query, content_type)
        return _decoded(data)

    async def _answer(
        self,
        method: str,
        path: str,
        kind: str,
        verb: str,
        body: Object | None,
        query: Mapping[str, str] | None,
        content_type: str,
    ) -> bytes:
        self.calls[verb, kind] += 1
        try:
            response = await self._send(method, path, body, query, content_type, REQUEST_TIMEOUT)
            data: bytes = await response.read()
        except (TimeoutError, OSError, aiohttp.ClientError) as failure:
            raise unreachable(failure) from failure
        self._clock.heard(response.headers.get("Date"))
        if response.status >= 400:
            raise api_error(response.status, data, response.headers)
        return data

    async def _send(
        self, method: str, path: str, body: Object | None, query: Mapping[str, str] | None, content_type: str, patience: Any
    ) -> Any:
        # not param_serialize: it walks and copies every part of a request, and finds nothing to change
        headers: Any = {"Accept": "application/json", "Content-Type": content_type, "User-Agent": names.MANAGER}
        if token := await self._api.configuration.get_api_key_with_prefix("BearerToken", alias="authorization"):
            headers["Authorization"] = token
        if self._acting_as:
            headers = CIMultiDict([*headers.items(), *self._acting_as])
        url = f"{self._api.configuration.host}{path}" + (f"?{urlencode(query)}" if query else "")
        return await self._api.call_api(method, url, headers, body, _request_timeout=patience)

    async def list_page(self, kind: str, namespace: str, query: Mapping[str, str]) -> bytes:
        path = RESOURCES[kind].path(namespace)
        once = lambda: self._answer("GET", path, kind, "list", None, query, "application/json")  # noqa: E731
        return await self._retried(once, kind, "list", Priority.LOOK)

    async def watch(self, kind: str, namespace: str, query: Mapping[str, str]) -> AsyncIterator[bytes]:
        await self._limit.acquire(Priority.LOOK)
        self.calls["watch", kind] += 1
        patience = aiohttp.ClientTimeout(total=None, sock_connect=REQUEST_TIMEOUT, sock_read=_SILENT_SECONDS)
        try:
            response = await self._send(
                "GET", RESOURCES[kind].path(namespace), None, {**query, "watch": "true"}, "application/json", patience
            )
            try:
                self._clock.heard(response.headers.get("Date"))
                if response.status >= 400:
                    raise api_error(response.status, await response.read(), response.headers)
                async for line in _lines(response.response.content):
                    yield line
            except TimeoutError:  # where an etcd was restored, a version that it has not come to yet is watched in vain
                raise APIError(410, "Silent", f"no event and no bookmark for {_SILENT_SECONDS:.0f} s") from None
            finally:
                response.response.close()
        except (TimeoutError, OSError, aiohttp.ClientError) as failure:
            raise unreachable(failure) from failure

    async def apply(self, manifest: Object) -> Object:
        kind, meta = manifest["kind"], manifest["metadata"]
        path = RESOURCES[kind].path(meta["namespace"], meta["name"])
        query = {"fieldManager": names.MANAGER, "force": "true"}
        return await self.request(
            "PATCH",
            path,
            kind=kind,
            verb="apply",
            body=manifest,
            query=query,
            content_type="application/apply-patch+yaml",
            priority=Priority.ACT,
        )

    async def create(self, manifest: Object) -> Object:
        kind, meta = manifest["kind"], manifest["metadata"]
        version = str(manifest.get("apiVersion", "")).rpartition("/")[2]
        path = RESOURCES.get(f"{kind}/{version}", RESOURCES[kind]).path(meta.get("namespace", ""))
        priority = Priority.LOOK if kind == "Event" else Priority.ACT
        query = {"fieldManager": names.MANAGER}
        return await self.request("POST", path, kind=kind, verb="create", body=manifest, query=query, priority=priority)

    async def get(self, kind: str, namespace: str, name: str) -> Object:
        return await self.request("GET", RESOURCES[kind].path(namespace, name), kind=kind, verb="get")

    async def patch(self, kind: str, namespace: str, name: str, body: Object) -> Object:
        path = RESOURCES[kind].path(namespace, name)
        query, priority = {"fieldManager": names.MANAGER}, Priority.ACT
        content = "application/merge-patch+json"
        return await self.request("PATCH", path, kind=kind, verb="patch", body=body, query=query, content_type=content, priority=priority)

    async def plurals(self, group: str, version: str) -> set[str]:
        """Names of the resources that the API server serves in a version of a group; none when it does not know it."""
        try:
            answer = await self.request("GET", f"/apis/{group}/{version}", kind="APIResourceList", verb="get")
        except APIError as failure:
            if failure.not_found:
                return set()
            raise
        return {str(known.get("name")) for known in answer.get("resources") or ()}

    async def served_schema(self, resource: Resource) -> Object | None:
        """The OpenAPI schema of a kind as it is served, which every service account may read; None where it may not, or there is none."""
        path = f"/openapi/v3/apis/{resource.group}/{resource.version}"
        try:
            answer = await self.request("GET", path, kind="OpenAPI", verb="get")
        except APIError as failure:
            if failure.transient:
                raise
            return None
        schemas = (answer.get("components") or {}).get("schemas") or {}
        kind = {"group": resource.group, "version": resource.version, "kind": resource.kind}
        found = [schema for schema in schemas.values() if kind in (schema.get("x-kubernetes-group-version-kind") or ())]
        return found[0] if found else None

    async def serves(self, kind: str) -> bool:
        resource = RESOURCES[kind]
        try:
            return resource.plural in await self.plurals(resource.group, resource.version)
        except APIError as failure:
            if failure.transient:
                raise
            return True  # not allowed to ask: the objects will tell

    async def delete(self, kind: str, namespace: str, name: str, uid: str, grace_seconds: int | None = None) -> Object | None:
        body: Object = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
            **({"gracePeriodSeconds": grace_seconds} if grace_seconds is not None else {}),
        }
        try:
            path = RESOURCES[kind].path(namespace, name)
            answer = await self.request("DELETE", path, kind=kind, verb="delete", body=body, priority=Priority.ACT)
        except APIError as failure:
            if not (failure.not_found or failure.conflict):
                raise
            return None
        return answer if answer.get("kind") == kind else None

    async def replace_status(self, raw: Object, *, urgent: bool = True) -> Object:
        kind, meta, body = raw["kind"], raw["metadata"], {name: value for name, value in raw.items() if name != "spec"}
        path = RESOURCES[kind].path(meta.get("namespace", ""), meta["name"], "status")
        query = {"fieldManager": names.MANAGER}
        priority = Priority.TELL if urgent else Priority.LOOK
        return await self.request("PUT", path, kind=kind, verb="replace_status", body=body, query=query, priority=priority)

    async def list(self, kind: str, namespace: str = "", selector: str = "") -> AsyncIterator[Object]:
        resource = RESOURCES[kind]
        query = {"limit": str(LIST_CHUNK), **({"labelSelector": selector} if selector else {})}
        while True:
            page = await self.request("GET", resource.path(namespace), kind=kind, verb="list", query=query)
            for item in _objects(page, "items", list):
                found = identified(kind, item)
                if found is not None:
                    yield found
                    continue
                metrics.UNREADABLE.labels(kind=kind).inc()
                log.warning("a %s is passed by: it has no metadata that can be read: %.200r", kind, item)
            more = _objects(page, "metadata", dict).get("continue")
            if not more:
                return
            query["continue"] = more

    async def review_token(self, token: str, audience: str) -> Object:
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience] if audience else []},
        }
        path = RESOURCES["TokenReview"].path()
        answer = await self.request("POST", path, kind="TokenReview", verb="create", body=body)
        return _objects(answer, "status", dict)

    async def review_access(self, spec: Object) -> bool:
        """Whether a SubjectAccessReview allows it."""
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        path = RESOURCES["SubjectAccessReview"].path()
        answer = await self.request("POST", path, kind="SubjectAccessReview", verb="create", body=body)
        return _objects(answer, "status", dict).get("allowed") is True

    async def replace(self, manifest: Object) -> Object:
        """Replace an object on condition of its resourceVersion."""
        kind, meta = manifest["kind"], manifest["metadata"]
        path = RESOURCES[kind].path(meta.get("namespace", ""), meta["name"])
        return await self.request("PUT", path, kind=kind, verb="replace", body=manifest, query={"fieldManager": names.MANAGER})

    def now(self) -> datetime:
        return self._clock.now()

    async def close(self) -> None:
        """Close the connection pool."""
        await self._api.close()


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Whole lines, however long: a reader of lines gives up at its buffer's size. What comes after the last one is half an event."""
    rest = bytearray()
    async for chunk in content.iter_any():
        start = len(rest)
        rest += chunk
        begin = 0
        while (end := rest.find(b"\n", max(start, begin))) >= 0:
            yield bytes(rest[begin:end])
            begin = end + 1
        del rest[:begin]
        if len(rest) > _LONGEST_LINE:
            raise aiohttp.ClientPayloadError(f"an event of more than {_LONGEST_LINE} bytes")


def _decoded(data: bytes) -> Object:
    """An answer's object. Raises APIError, transient, where it is none: it was broken on its way, and the next may be whole."""
    try:
        try:
            answer = from_json(data)
        except ValueError:
            answer = json.loads(data)  # nests deeper, and takes what is no Unicode
    except (ValueError, RecursionError) as failure:
        raise APIError(0, "BrokenAnswer", f"the API server's answer of {len(data)} bytes cannot be read: {failure}") from failure
    if not isinstance(answer, dict):
        raise APIError(0, "BrokenAnswer", f"the API server answered with {type(answer).__name__}, not with an object")
    return answer


def _objects(page: Object, field: str, shape: type[_Shape]) -> _Shape:
    """A part of a LIST's answer. Raises APIError where it is of another shape: taken for empty, everything would seem gone."""
    found = page.get(field)
    if found is not None and not isinstance(found, shape):
        raise APIError(0, "BrokenAnswer", f"the API server's LIST has {field} of type {type(found).__name__}")
    return found if found is not None else shape()
