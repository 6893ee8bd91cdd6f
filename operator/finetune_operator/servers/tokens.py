"""Whose token it is: a projected service-account token that is bound to a pod, and good for one audience alone.

TokenReview tells which pod holds it. Labels and names that a tenant can choose decide nothing. Knows nothing of what it is shown for.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass

from aiohttp import web

from ..cluster.errors import APIError
from ..cluster.transport import Cluster

CACHE_SIZE = 10_000
_CACHE_SECONDS = 120.0
_REVIEWS_AT_ONCE = 8
_LONGEST_TOKEN = 8192


@dataclass(frozen=True)
class _Review:
    pod_uid: str
    """Empty: the token was refused."""
    until: float


class Tokens:
    """Asks the API server, and remembers what it said for two minutes."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._reviewed: dict[str, _Review] = {}
        self._reviews = asyncio.Semaphore(_REVIEWS_AT_ONCE)

    async def pod_of(self, request: web.Request, audience: str, whose: str) -> str:
        """UID of the pod that sent a request. Raises HTTPUnauthorized, HTTPServiceUnavailable; `whose`: for the message."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token or len(token) > _LONGEST_TOKEN:
            raise web.HTTPUnauthorized(text="a bearer token is required")
        pod_uid = await self._pod_of(token, audience)
        if not pod_uid:
            raise web.HTTPUnauthorized(text=f"the token is not valid for this {whose}")
        return pod_uid

    async def _pod_of(self, token: str, audience: str) -> str:
        """UID of the pod that the token is bound to, or empty when the API server refuses the token."""
        key = hashlib.sha256(f"{audience}\0{token}".encode()).hexdigest()
        now = time.monotonic()
        known = self._reviewed.get(key)
        if known is not None and known.until > now:
            return known.pod_uid
        async with self._reviews:
            try:
                status = await self._cluster.review_token(token, audience)
            except APIError as failure:
                raise web.HTTPServiceUnavailable(text="tokens cannot be checked now") from failure
        extra = (status.get("user") or {}).get("extra") or {}
        uids = extra.get("authentication.kubernetes.io/pod-uid") or []
        good = status.get("authenticated") is True and audience in (status.get("audiences") or ()) and len(uids) == 1
        if len(self._reviewed) >= CACHE_SIZE:
            self._reviewed = {k: v for k, v in self._reviewed.items() if v.until > now}
            if len(self._reviewed) >= CACHE_SIZE:
                self._reviewed.clear()
        self._reviewed[key] = _Review(str(uids[0]) if good else "", now + _CACHE_SECONDS)
        return str(uids[0]) if good else ""
