"""A client of OpenAI-compatible chat completions: the judge and the teacher behind an endpoint."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from finetune_api.spec import Endpoint

from ..process.errors import InfrastructureError, SourceUnavailable, UserError
from .retry import error_for_status, with_retries

_TIMEOUT = 120


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:  # the key must not travel on
        return None


def complete(
    endpoint: Endpoint, messages: list[dict[str, Any]], *, key: str | None, max_tokens: int, tools: list[dict[str, Any]] | None = None
) -> str:
    """The server's answer, sampled at temperature 0. Raises UserError when it refuses, SourceUnavailable when it stays away."""
    asked = {
        "model": endpoint.model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        **({"tools": tools} if tools else {}),
    }
    body = json.dumps(asked).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(f"{endpoint.url.rstrip('/')}/chat/completions", data=body, headers=headers, method="POST")
    opener, host = urllib.request.build_opener(_NoRedirect), str(urlsplit(endpoint.url).hostname)

    def refused(why: str) -> UserError:
        return UserError("EndpointRefused", f"{endpoint.url}: {why}; check the address, the model's name and secretRef")

    def ask() -> str:
        try:
            with opener.open(request, timeout=_TIMEOUT) as answer:
                return str(json.loads(answer.read(16 << 20))["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as failure:
            raise error_for_status(host, failure.code, dict(failure.headers.items()), refused) or refused(
                f"{host} answers {failure.code}"
            ) from None
        except (ValueError, KeyError, IndexError, TypeError) as failure:
            raise InfrastructureError(
                "EndpointUnreachable", f"{endpoint.url} answers something that is no chat completion: {type(failure).__name__}"
            ) from None

    return with_retries(ask, host, refused)


def check_reachable(endpoint: Endpoint) -> None:
    """Raise SourceUnavailable when the server is not there: before a GPU computes what it is asked about later."""
    host = str(urlsplit(endpoint.url).hostname)

    def knock() -> None:
        try:
            urllib.request.build_opener(_NoRedirect).open(f"{endpoint.url.rstrip('/')}/models", timeout=_TIMEOUT).close()
        except urllib.error.HTTPError as failure:  # not every server lists its models: any word of it will do
            error = error_for_status(host, failure.code, dict(failure.headers.items()), lambda why: UserError("EndpointRefused", why))
            if isinstance(error, SourceUnavailable):
                raise error from None

    with_retries(knock, host, lambda why: UserError("EndpointRefused", why))
