"""Who asks, and which endpoints they may use: Kubernetes tokens by TokenReview and SubjectAccessReview, API keys by their hash.

Knows nothing of models. Answers are kept for a minute at most, by the token's hash; tokens and keys are never kept or told.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar

from finetune_api import GROUP, PLURAL
from finetune_api.api_keys import KEY_PREFIX, ApiKey, digest_of_key
from finetune_api.endpoint import ENDPOINT_PLURAL
from finetune_operator.cluster.errors import APIError

from .bodies import Refusal
from .catalog import Endpoint
from .keys import Keys, expired

log = logging.getLogger("finetune.gateway")
VERB = "use"
"""On a FineTuneEndpoint: asking its models. Reading the object is another right."""
KEPT_SECONDS, REFUSED_SECONDS = 60.0, 10.0
_MOST_KEPT = 20_000
_AT_ONCE = 16
_FEW = 4
"""So many endpoints are asked for one by one; of more, first whether all may be used."""
T = TypeVar("T")


class Reviews(Protocol):
    """The API server's word."""

    async def review_token(self, token: str, audience: str) -> dict[str, Any]:
        """The status of a TokenReview; an empty audience is the API server's own."""

    async def review_access(self, spec: dict[str, Any]) -> bool:
        """Whether a SubjectAccessReview allows it."""


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    identity: str
    """A digest of the token, or a key's id."""
    key: ApiKey | None = None
    subject: dict[str, Any] | None = None
    """User, groups, uid and extra of a token, as a SubjectAccessReview takes them."""

    @property
    def key_id(self) -> str:
        """Of an API key; empty for a token of Kubernetes."""
        return self.identity if self.key is not None else ""

    @property
    def user(self) -> str:
        """Name of the user of a token; empty for an API key."""
        return str(self.subject["user"]) if self.subject is not None else ""


class _Kept(Generic[T]):
    """Answers, each for its time. What several ask for at once is asked once."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._answers: dict[Hashable, tuple[T, float]] = {}
        self._asking: dict[Hashable, asyncio.Task[T]] = {}

    async def get(self, key: Hashable, ask: Callable[[], Awaitable[T]], seconds: Callable[[T], float]) -> T:
        known = self._answers.get(key)
        if known is not None and known[1] > self._monotonic():
            return known[0]
        task = self._asking.get(key)
        if task is None:
            task = self._asking[key] = asyncio.ensure_future(self._ask(key, ask, seconds))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)  # whoever hangs up does not take it from the others

    async def _ask(self, key: Hashable, ask: Callable[[], Awaitable[T]], seconds: Callable[[T], float]) -> T:
        try:
            answer = await ask()
        finally:
            del self._asking[key]
        if len(self._answers) >= _MOST_KEPT:
            now = self._monotonic()
            self._answers = {known: value for known, value in self._answers.items() if value[1] > now}
            while len(self._answers) >= _MOST_KEPT:
                del self._answers[next(iter(self._answers))]
        self._answers[key] = (answer, self._monotonic() + seconds(answer))
        return answer


class Access:
    """Checks callers."""

    def __init__(self, reviews: Reviews, keys: Keys, audience: str, monotonic: Callable[[], float], now: Callable[[], datetime]) -> None:
        self._reviews, self._keys, self._audience, self._now = reviews, keys, audience, now
        self._callers: _Kept[Caller | None] = _Kept(monotonic)
        self._rights: _Kept[bool] = _Kept(monotonic)
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def caller(self, authorization: bytes) -> Caller:
        """Who holds the token of an Authorization header. Raises Refusal: 401, or 503 where nobody can tell."""
        scheme, _, token = authorization.decode("latin-1").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise _unknown("send Authorization: Bearer with an API key or a Kubernetes token")
        if token.startswith(KEY_PREFIX):
            known = self._keys.known.get(digest_of_key(token))
            if known is None or expired(known[1], self._now()):
                raise _unknown("this API key is not known, revoked or expired")
            return Caller(known[0], key=known[1])
        digest = hashlib.sha256(token.encode()).hexdigest()
        try:
            found = await self._callers.get(
                digest, lambda: self._review(digest, token), lambda caller: KEPT_SECONDS if caller is not None else REFUSED_SECONDS
            )
        except APIError as failure:
            raise self._away(failure) from None
        if found is None:
            raise _unknown("this token is neither an API key nor a Kubernetes token that is valid now")
        return found

    async def _review(self, digest: str, token: str) -> Caller | None:
        for audience in (self._audience, ""):
            async with self._turns:
                status = await self._reviews.review_token(token, audience)
            audiences = status.get("audiences")
            if status.get("authenticated") is not True or (audience and audience not in (audiences or ())):
                continue
            user = status.get("user") or {}
            if not isinstance(user, dict) or not user.get("username"):
                continue
            subject = {"user": user["username"], **{field: user[field] for field in ("uid", "groups", "extra") if user.get(field)}}
            return Caller(digest, subject=subject)
        return None

    async def permitted(self, caller: Caller, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        """Those that the caller may use. Raises Refusal (503)."""
        if caller.key is not None:
            return [endpoint for endpoint in endpoints if endpoint.namespace == caller.key.namespace]
        if not endpoints:
            return []
        try:
            if len(endpoints) > _FEW:
                if await self._may(caller, "", ""):
                    return list(endpoints)
                namespaces = sorted({endpoint.namespace for endpoint in endpoints})
                whole = await asyncio.gather(*(self._may(caller, namespace, "") for namespace in namespaces))
                open_ = {namespace for namespace, may in zip(namespaces, whole, strict=True) if may}
            else:
                open_ = set()
            asked = [endpoint for endpoint in endpoints if endpoint.namespace not in open_]
            answers = await asyncio.gather(*(self._may(caller, *endpoint.key) for endpoint in asked))
        except APIError as failure:
            raise self._away(failure) from None
        named = {endpoint.key for endpoint, may in zip(asked, answers, strict=True) if may}
        return [endpoint for endpoint in endpoints if endpoint.namespace in open_ or endpoint.key in named]

    async def overseen(self, caller: Caller, namespaces: Iterable[str]) -> frozenset[str]:
        """The namespaces of which they may use all endpoints, there or not: not with an API key, which is for models. Raises Refusal (503)."""
        wanted = sorted(set(namespaces))
        if caller.key is not None or not wanted:
            return frozenset()
        try:
            if await self._may(caller, "", ""):
                return frozenset(wanted)
            answers = await asyncio.gather(*(self._may(caller, namespace, "") for namespace in wanted))
        except APIError as failure:
            raise self._away(failure) from None
        return frozenset(namespace for namespace, may in zip(wanted, answers, strict=True) if may)

    async def may_on_jobs(self, caller: Caller, verb: str, namespace: str) -> bool:
        """Whether the user of a token may do that to FineTuneJobs of a namespace. Raises Refusal (503)."""
        try:
            return await self._may(caller, namespace, "", resource=PLURAL, verb=verb)
        except APIError as failure:
            raise self._away(failure) from None

    async def _may(self, caller: Caller, namespace: str, name: str, *, resource: str = ENDPOINT_PLURAL, verb: str = VERB) -> bool:
        """On one object, or where its name is empty on all of a namespace, or of the cluster."""
        where = {"namespace": namespace, "name": name}
        attributes = {
            "group": GROUP,
            "resource": resource,
            "verb": verb,
            **{field: value for field, value in where.items() if value},
        }

        async def ask() -> bool:
            async with self._turns:
                return await self._reviews.review_access({**(caller.subject or {}), "resourceAttributes": attributes})

        about = (caller.identity, resource, verb, namespace, name)
        return await self._rights.get(about, ask, lambda may: KEPT_SECONDS if may else REFUSED_SECONDS)

    def _away(self, failure: APIError) -> Refusal:
        log.warning("callers cannot be checked: %s", failure)
        message = "Kubernetes tokens cannot be checked now; API keys can"
        return Refusal(503, message, code="authentication_unavailable", kind="server_error", retry_after="5")


def _unknown(message: str) -> Refusal:
    return Refusal(401, message, code="invalid_api_key", kind="authentication_error", www_authenticate="Bearer")
