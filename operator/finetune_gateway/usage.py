"""Reading what was used: what is asked for, and what of it the caller may see."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING

from finetune_api.usage import UsageReport

from .access import Access, Caller
from .bodies import Refusal
from .catalog import asked
from .ledger import user_name

if TYPE_CHECKING:  # SQLAlchemy, where there is no store
    from .store.keeper import Store
    from .store.usage import Query

MOST_DAYS = 3660
_KNOWN = ("days", "namespace", "model", "key", "user")


class Reports:
    """Answers /finetune/v1/usage."""

    def __init__(self, store: Store | None, access: Access) -> None:
        """`store`: None where use is not kept."""
        self._store, self._access = store, access

    async def usage(self, caller: Caller, parameters: Iterable[tuple[str, str]]) -> UsageReport:
        """Everybody's in namespaces of which the caller may use all endpoints, elsewhere their own. Raises Refusal."""
        if self._store is None:
            message = "usage is not kept: an administrator sets gateway.database; metrics tell it by finetune_gateway_tokens_total"
            raise Refusal(404, message, code="no_store")
        from .store.keeper import StoreAway
        from .store.usage import MOST_ROWS, Seen

        query = read_query(parameters, datetime.now(UTC).date())
        try:
            spaces: list[str] = []
            if caller.key is None:
                spaces = [query.namespace] if query.namespace else await self._store.namespaces(query.since)
            overseen = await self._access.overseen(caller, spaces)
            of = caller.key.namespace if caller.key is not None else ""
            rows = await self._store.rows(query, Seen(overseen, caller.key_id, user_name(caller.user), of))
        except StoreAway:
            message = "the store of the gateway does not answer now"
            raise Refusal(503, message, code="store_unavailable", kind="server_error", retry_after="5") from None
        if len(rows) > MOST_ROWS:
            message = f"there are more than {MOST_ROWS} rows: ask for fewer days, or for one namespace, model or key"
            raise Refusal(400, message, code="too_many_rows", param="days")
        return UsageReport(since=query.since.isoformat(), rows=rows)


def read_query(parameters: Iterable[tuple[str, str]], today: date) -> Query:
    """What a URL asks for. Raises Refusal (400) with the parameter that is wrong."""
    from .store.usage import Query

    found: dict[str, str] = {}
    for name, value in parameters:
        if name not in _KNOWN or name in found:
            what = "is there twice" if name in found else f"is not known; there are {', '.join(_KNOWN)}"
            raise Refusal(400, f"{name[:80]} {what}", code="unknown_parameter", param=name[:80])
        if not value or len(value) > 400 or "\0" in value:
            raise Refusal(400, f"{name} is empty, too long or no text", code="invalid_value", param=name)
        found[name] = value
    days = found.get("days", "30")
    if not (days.isascii() and days.isdigit() and len(days) < 6 and 1 <= int(days) <= MOST_DAYS):
        raise Refusal(400, f"days is a whole number from 1 to {MOST_DAYS}", code="invalid_value", param="days")
    namespace, model, version = found.get("namespace", ""), "", None
    if "model" in found:
        wanted = asked(found["model"])
        if wanted is None or (wanted.namespace and namespace and wanted.namespace != namespace):
            message = "model is NAME, NAME@VERSION, or either with NAMESPACE/ before it"
            raise Refusal(400, message, code="invalid_value", param="model")
        namespace, model, version = wanted.namespace or namespace, wanted.name, wanted.version
    since = today - timedelta(days=int(days) - 1)
    return Query(since, namespace, model, version, found.get("key", ""), found.get("user", ""))
