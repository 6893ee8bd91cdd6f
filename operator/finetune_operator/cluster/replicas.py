"""Asks the replicas of endpoints what they serve, and gateways what canaries answered: in parallel, and within bounded time.

A pod's answer is input: bounded, parsed into types, and no more than a word in a message where it is none.
Knows nothing of what follows from it.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Mapping

import aiohttp
from pydantic import TypeAdapter

from finetune_api.base import shortened
from finetune_api.scalars import printable
from finetune_api.serving import AGENT_PORT, CANARY_PATH, MODELS_PATH, CanaryTraffic, ReplicaOrder, ReplicaReport

SECONDS = 4.0
"""For one answer. A replica does what it is told in the background, and answers at once."""
_LIMIT = 1024 * 1024
"""Bytes of an answer."""
_AT_ONCE = 64
_TRAFFIC = TypeAdapter(list[CanaryTraffic])


class Replicas:
    """One pool of connections for all endpoints."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def order(
        self, addresses: Mapping[str, str], order: ReplicaOrder, context: ssl.SSLContext, host: str
    ) -> dict[str, ReplicaReport | str]:
        """What each replica serves, or why it does not say so. `addresses`: by whatever it is called. `host`: that they have to show."""
        body = json.dumps(order.to_wire())
        told = await asyncio.gather(*(self._order(address, body, context, host) for address in addresses.values()))
        return dict(zip(addresses, told, strict=True))

    async def _order(self, address: str, body: str, context: ssl.SSLContext, host: str) -> ReplicaReport | str:
        url = f"https://{_host(address)}:{AGENT_PORT}{MODELS_PATH}"
        try:
            async with self._turns, asyncio.timeout(SECONDS):
                headers = {"Content-Type": "application/json"}
                async with self._pool.put(url, data=body, headers=headers, ssl=context, server_hostname=host) as response:
                    return ReplicaReport.model_validate_json(await _body(response))
        except TimeoutError:
            return f"no answer within {SECONDS:.0f} s"
        except ValueError as failure:
            return f"answers what cannot be read: {_plain(failure)}"
        except (OSError, aiohttp.ClientError) as failure:
            return f"cannot be asked: {_plain(failure)}"

    async def traffic(self, address: str) -> list[CanaryTraffic] | None:
        """What all gateways at HOST:PORT counted; None when one of them does not say."""
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(SECONDS):
                found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=1)  # SOCK_STREAM
                hosts = sorted({str(entry[4][0]) for entry in found})
                told = await asyncio.gather(*(self._traffic(f"http://{_host(one)}:{port}{CANARY_PATH}") for one in hosts))
        except (OSError, ValueError, TimeoutError, aiohttp.ClientError):
            return None
        return [one for many in told for one in many]

    async def _traffic(self, url: str) -> list[CanaryTraffic]:
        async with self._turns, self._pool.get(url) as response:
            return _TRAFFIC.validate_json(await _body(response))

    @property
    def _pool(self) -> aiohttp.ClientSession:
        if self._session is None:  # within the loop that uses it
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=_AT_ONCE, keepalive_timeout=60), auto_decompress=False
            )
        return self._session

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """Raises ValueError where it is none that was asked for."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > _LIMIT:
            raise ValueError(f"more than {_LIMIT} bytes")
    if response.status != 200:
        raise ValueError(f"status {response.status}: {body[:200].decode(errors='replace')}")
    return bytes(body)


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _plain(failure: Exception) -> str:
    return shortened(printable(str(failure) or type(failure).__name__).replace("\n", " "), 200)
