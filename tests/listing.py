"""LIST and WATCH of servers in memory: what they have in pages, and a watch in which nothing happens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any


class InMemory:
    """Mixed into a server that has `list`."""

    def list(self, kind: str, namespace: str = "", selector: str = "") -> AsyncIterator[dict[str, Any]]:
        raise NotImplementedError

    async def list_page(self, kind: str, namespace: str, query: Mapping[str, str]) -> bytes:
        found = [raw async for raw in self.list(kind, namespace)]
        if kind == "Pod":  # the field selector's part
            ended = ("Succeeded", "Failed")
            found = [p for p in found if p.get("spec", {}).get("nodeName") and p.get("status", {}).get("phase") not in ended]
        begin = int(query.get("continue") or 0)
        end = begin + int(query.get("limit") or len(found))
        more = {"continue": str(end)} if end < len(found) else {}
        return json.dumps({"metadata": {"resourceVersion": "1", **more}, "items": found[begin:end]}).encode()

    async def watch(self, kind: str, namespace: str, query: Mapping[str, str]) -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""
