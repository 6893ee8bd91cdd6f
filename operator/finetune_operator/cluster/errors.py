"""What the API server answers when it does not do what it was asked for. Knows nothing of what is done about it."""

from __future__ import annotations

import json
from typing import Any

from finetune_api.base import shortened


class APIError(Exception):
    """The API server refused a request, or could not be reached (status 0)."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{status} {reason}: {message}" if status else message)
        self.status, self.reason, self.message, self.retry_after = status, reason, message, retry_after

    @property
    def not_found(self) -> bool:
        """The object is not there."""
        return self.status == 404

    @property
    def conflict(self) -> bool:
        """The object changed meanwhile, exists already, or is another one of the same name."""
        return self.status == 409

    @property
    def transient(self) -> bool:
        """Worth the same request again: overload, a restart of the server, a broken connection."""
        return self.status in (0, 429, 500, 502, 503, 504)


def unreachable(failure: Exception) -> APIError:
    """No answer came."""
    return APIError(0, "Unreachable", f"the API server cannot be reached: {failure or type(failure).__name__}")


def api_error(status: int, body: Any, headers: Any) -> APIError:
    """The answer's own words, where it has some."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    reason, message = "Error", shortened(text, 1000)
    try:
        answer = json.loads(text)
        reason, message = str(answer.get("reason", reason)), str(answer.get("message", message))
    except (ValueError, AttributeError, RecursionError):
        pass
    after = (headers or {}).get("Retry-After") if headers is not None else None
    return APIError(status, reason, message, float(after) if after and str(after).isdigit() else None)
