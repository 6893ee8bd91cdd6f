"""In whose name the fine-tuning API acts, and in which namespace: that of the key, or the one that a token's user names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from finetune_api.scalars import DNS_LABEL
from finetune_operator.cluster.errors import APIError

from ..access import Access, Caller
from ..bodies import Refusal

ORGANIZATION = "OpenAI-Organization"
"""Header that the SDKs send for `organization=`: here a namespace."""
_ACCOUNT = re.compile(r"system:serviceaccount:([a-z0-9-]{1,63}):([a-z0-9.-]{1,253})")
_LONGEST_WAIT = 60.0


class Acting(Protocol):
    """A cluster as somebody else sees it."""

    async def request(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        """One request. Raises APIError."""


class Kubernetes(Protocol):
    """The API server."""

    def acting_as(self, user: str, groups: Iterable[str] = ()) -> Acting:
        """With the rights of that user alone."""


@dataclass(frozen=True)
class Actor:
    """Who asks, and where."""

    namespace: str
    name: str
    """What requests of the same caller are known by: a key's id, or a user's name."""
    user: str
    """Who it is to Kubernetes; empty: nobody that the gateway may act as."""
    groups: tuple[str, ...] = ()

    def within(self, kubernetes: Kubernetes) -> Acting:
        """The cluster, with their rights. Raises Refusal (403)."""
        if not self.user:
            told = "the gateway may not act for holders of Kubernetes tokens here: take an API key (gateway.fineTuning.impersonateUsers)"
            raise Refusal(403, told, code="permission_denied", kind="permission_error")
        return kubernetes.acting_as(self.user, self.groups)


class Actors:
    """Finds out who a caller acts as."""

    def __init__(self, access: Access, key_account: str, *, users: bool) -> None:
        """`key_account`: service account of each namespace that its API keys act as. `users`: whether it acts for holders of tokens, too."""
        self._access, self._key_account, self._users = access, key_account, users

    async def actor(self, caller: Caller, organization: str, verb: str) -> Actor:
        """Raises Refusal: 400, 403, 404 and 503. `verb`: what they have to be allowed on the FineTuneJobs there."""
        if caller.key is not None:
            namespace = caller.key.namespace
            if organization and organization != namespace:
                raise _unknown(organization)
            if not caller.key.fine_tuning:
                told = "this API key is for models alone; finetune keys create --fine-tuning makes one for this, too"
                raise Refusal(403, told, code="permission_denied", kind="permission_error")
            return Actor(namespace, f"key:{caller.key_id}", f"system:serviceaccount:{namespace}:{self._key_account}")
        account = _ACCOUNT.fullmatch(caller.user)
        namespace = organization or (account[1] if account else "")
        if not namespace:
            told = f"say which namespace: OpenAI(organization=...), which sends the header {ORGANIZATION}"
            raise Refusal(400, told, code="missing_organization", param=ORGANIZATION)
        if not re.fullmatch(DNS_LABEL.pattern, namespace) or len(namespace) > 63:
            raise _unknown(namespace)
        if not await self._access.may_on_jobs(caller, "list", namespace):
            raise _unknown(namespace)
        if verb != "list" and not await self._access.may_on_jobs(caller, verb, namespace):
            told = f"you may not {verb} FineTuneJobs in {namespace}"
            raise Refusal(403, told, code="permission_denied", kind="permission_error")
        groups = () if account else tuple(map(str, (caller.subject or {}).get("groups") or ()))
        return Actor(namespace, caller.user, caller.user if self._users else "", groups)


def _unknown(organization: str) -> Refusal:
    told = f"there is no organization {organization[:63]!r}, or you may not use it"
    return Refusal(404, told, code="organization_not_found", param=ORGANIZATION)


def refusal_of(failure: APIError) -> Refusal:
    """What the API server did not do, in OpenAI's words."""
    if failure.transient:
        wait = str(int(min(failure.retry_after or 1.0, _LONGEST_WAIT)))
        status = 429 if failure.status == 429 else 503
        return Refusal(status, "the API server does not take this now", code="try_again", kind="server_error", retry_after=wait)
    if failure.status == 403:
        if "exceeded quota" in failure.message:
            return Refusal(403, failure.message, code="insufficient_quota", kind="insufficient_quota")
        return Refusal(403, failure.message, code="permission_denied", kind="permission_error")
    if failure.not_found:
        return Refusal(404, "it is not there any more", code="not_found")
    if failure.conflict:
        return Refusal(409, "it was changed by somebody else meanwhile", code="conflict")
    return Refusal(400, failure.message, code="invalid_value")
