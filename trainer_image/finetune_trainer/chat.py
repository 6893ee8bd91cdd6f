"""A client of OpenAI-compatible chat completions: the judge and the teacher behind an endpoint."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request

from finetune_api.spec import Endpoint

from .data.formats import Shape
from .errors import InfrastructureError, UserError

_TRIES, _TIMEOUT = 5, 120


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:  # the key must not travel on
        return None


def complete(endpoint: Endpoint, messages: list[Shape], *, key: str | None, max_tokens: int) -> str:
    """The server's answer, sampled at temperature 0. Raises UserError when it refuses, InfrastructureError when it stays away."""
    body = json.dumps({"model": endpoint.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(f"{endpoint.url.rstrip('/')}/chat/completions", data=body, headers=headers, method="POST")
    opener = urllib.request.build_opener(_NoRedirect)
    problem = ""
    for attempt in range(_TRIES):
        try:
            with opener.open(request, timeout=_TIMEOUT) as answer:
                return str(json.loads(answer.read(16 << 20))["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as failure:
            problem = f"{failure.code}"
            if failure.code not in (408, 429) and failure.code < 500:
                raise UserError(
                    "EndpointRefused", f"{endpoint.url} answers {failure.code}; check the address, the model's name and secretRef"
                ) from None
        except (OSError, ValueError, KeyError, IndexError, TypeError) as failure:
            problem = f"{type(failure).__name__}: {failure}"
        if attempt < _TRIES - 1:
            time.sleep(min(30.0, 0.5 * 2**attempt))
    raise InfrastructureError("EndpointUnreachable", f"{endpoint.url}: {problem[:300]}")
