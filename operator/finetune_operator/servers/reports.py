"""What every server of reports does: one operator takes them, the one that acts, and each is counted by its outcome.

Knows nothing of what is reported.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import Counter

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def taking(reports: Counter, acting: Callable[[], bool], take: Handler) -> Handler:
    """A handler that counts by the label `code`, and refuses while another operator acts: the next try may reach that one."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            if not acting():
                raise web.HTTPServiceUnavailable(text="this operator stands by", headers={"Retry-After": "1"})
            response = await take(request)
        except web.HTTPException as refused:
            reports.labels(code=refused.status).inc()
            raise
        reports.labels(code=response.status).inc()
        return response

    return handle
