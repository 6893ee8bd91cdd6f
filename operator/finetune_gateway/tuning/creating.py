"""Writing FineTuneJobs in a caller's name. A retried create makes one job, two wanted ones make two.

The SDKs send no idempotency key, and number their tries (`x-stainless-retry-count`). A job's name follows from who asked, for what,
and how many such wishes there were before: so two tries of one wish meet at one name, whichever gateway they come to, and whatever
the first one heard of its own write.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from finetune_api import KIND
from finetune_operator.cluster.errors import APIError
from finetune_operator.cluster.resources import RESOURCES

from ..bodies import Refusal
from .actor import Acting, Actor, Kubernetes, refusal_of
from .answers import unix
from .jobs import Job, Jobs, Twin, job_of
from .manifest import digest_of, manifest_of, name_of, twins_of
from .requests import CreateJob

MANAGER = "finetune-gateway"
WINDOW = timedelta(minutes=10)
"""How long a retry is matched with its twin."""
_SLOTS = 20
_SKEW = 2
"""Seconds: the API server's times are whole, and its clock is another."""


@dataclass(frozen=True)
class Wish:
    """A create, as it came."""

    asked: CreateJob
    spec: dict[str, Any]
    body: str
    """Digest of the body."""
    retry: bool
    """Whether it says that it is another try."""
    key: str = ""
    """Idempotency-Key; empty: none."""

    def digest(self, actor: Actor) -> str:
        """What all tries of it, and all wishes in the same words, share."""
        return digest_of(actor.namespace, actor.name, "key", self.key) if self.key else digest_of(actor.namespace, actor.name, self.body)


class Creator:
    """Makes jobs, and changes them."""

    def __init__(self, jobs: Jobs, kubernetes: Kubernetes, now: Callable[[], datetime]) -> None:
        self._jobs, self._kubernetes, self._now = jobs, kubernetes, now

    async def create(self, actor: Actor, wish: Wish) -> Job:
        """The job, new or that of another try. Raises Refusal."""
        acting, digest = actor.within(self._kubernetes), wish.digest(actor)
        arrived, attempt = self._now(), uuid.uuid4().hex
        known = twins_of(self._jobs.of(actor.namespace), digest)
        newest = known[0] if known else None
        if newest is not None and wish.key:
            return _same(newest, wish)
        slot = newest.twin.slot + 1 if newest is not None and newest.twin is not None else 0
        if newest is not None and wish.retry and self._is_recent(newest):
            later = await self._find(acting, actor.namespace, name_of(Twin(digest, slot, "", "", False), wish.asked.suffix))
            return later if later is not None and later.twin is not None and self._is_recent(later) else newest
        for taken in range(_SLOTS):
            twin = Twin(digest, slot + (0 if wish.key else taken), wish.body, attempt, wish.retry)
            found = await self._try(acting, actor, wish, twin)
            if self._is_it(found, wish, twin, arrived):
                self._jobs.learn(found)
                return found
        raise Refusal(503, "many such jobs are made at once: try again", code="try_again", kind="server_error", retry_after="1")

    async def _try(self, acting: Acting, actor: Actor, wish: Wish, twin: Twin) -> Job:
        """What has the name now: made by this, or before."""
        manifest = manifest_of(actor.namespace, twin, wish.asked, wish.spec)
        path = RESOURCES[KIND].path(actor.namespace)
        for _ in range(2):
            try:
                return job_of(await acting.request("POST", path, kind=KIND, verb="create", body=manifest, query={"fieldManager": MANAGER}))
            except APIError as failure:
                if not failure.conflict:
                    raise refusal_of(failure) from None
            found = await self._find(acting, actor.namespace, manifest["metadata"]["name"])
            if found is not None:
                return found
        raise Refusal(503, "the job's name is taken and given back: try again", code="try_again", kind="server_error", retry_after="1")

    def _is_it(self, found: Job, wish: Wish, twin: Twin, arrived: datetime) -> bool:
        """Whether the job that has the name is what was wished for: by this try, or by another one of it. Raises Refusal."""
        theirs = found.twin
        if theirs is None or theirs.digest != twin.digest:
            return False
        if theirs.attempt == twin.attempt:
            return True
        if wish.key:
            _same(found, wish)
            return True
        if wish.retry:
            return self._is_recent(found)
        # a retry that overtook the try that it repeats
        return theirs.retry and (unix(found.created) or 0) >= arrived.timestamp() - _SKEW

    def _is_recent(self, job: Job) -> bool:
        return self._now().timestamp() - (unix(job.created) or 0) <= WINDOW.total_seconds()

    async def _find(self, acting: Acting, namespace: str, name: str) -> Job | None:
        try:
            return job_of(await acting.request("GET", RESOURCES[KIND].path(namespace, name), kind=KIND, verb="get"))
        except APIError as failure:
            if failure.not_found:
                return None
            raise refusal_of(failure) from None

    async def set_policy(self, actor: Actor, job: Job, **policy: bool) -> Job:
        """Change `spec.runPolicy` of this very job. Raises Refusal."""
        body = {"metadata": {"uid": job.uid}, "spec": {"runPolicy": policy}}
        path = RESOURCES[KIND].path(job.namespace, job.name)
        query, content = {"fieldManager": MANAGER}, "application/merge-patch+json"
        try:
            answer = await actor.within(self._kubernetes).request(
                "PATCH", path, kind=KIND, verb="patch", body=body, query=query, content_type=content
            )
        except APIError as failure:
            raise refusal_of(failure) from None
        return job_of(answer)


def _same(job: Job, wish: Wish) -> Job:
    """The job of an Idempotency-Key. Raises Refusal where the key was used for something else."""
    if job.twin is not None and job.twin.body != wish.body:
        told = "this Idempotency-Key was used for another request: take a new one"
        raise Refusal(400, told, code="idempotency_key_reused", param="Idempotency-Key")
    return job
