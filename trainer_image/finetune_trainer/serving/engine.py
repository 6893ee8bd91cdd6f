"""An engine, asked over the pod's loopback or where somebody else runs it: vLLM's OpenAI-compatible server with runtime LoRA updating."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from finetune_api.probing import Probe

_QUICK = aiohttp.ClientTimeout(total=30, sock_connect=5)
_ANSWER = aiohttp.ClientTimeout(total=600, sock_connect=5)
"""A first answer compiles kernels, and others' requests go first."""
_AT_ONCE = 8
_NOT_NUMBERS = "Out of range float values"
"""What its JSON says of NaN."""


class EngineAway(Exception):
    """It does not answer, or not as it should: asked again later."""


class EngineRefused(Exception):
    """It does not take an adapter; in its own words. `missing`: it sees no files there."""

    def __init__(self, why: str, *, missing: bool = False) -> None:
        super().__init__(why)
        self.missing = missing


@dataclass(frozen=True)
class Served:
    """A name that the engine answers under."""

    root: str
    """Folder of its files."""
    adapter: bool
    most_tokens: int | None = None
    """Longest prompt and answer; the base's alone say so."""


class Engine:
    """One vLLM server."""

    def __init__(self, address: str, base: str) -> None:
        self.address, self.base = address, base
        self._session: aiohttp.ClientSession | None = None
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def close(self) -> None:
        """End its connections."""
        if self._session is not None:
            await self._session.close()

    async def alive(self) -> None:
        """Raises EngineAway where its process or the one that computes has gone."""
        status, body = await self._ask("GET", "/health", None, _QUICK)
        if status != 200:
            raise EngineAway(f"/health answers {status} {_said(body)}")

    async def version(self) -> str:
        """Its name and version."""
        _, body = await self._ask("GET", "/version", None, _QUICK)
        return f"vllm {body.get('version', '')}".strip()

    async def served(self) -> dict[str, Served]:
        """All names that it answers under."""
        status, body = await self._ask("GET", "/v1/models", None, _QUICK)
        try:
            return {
                str(card["id"]): Served(str(card["root"]), card.get("parent") is not None, card.get("max_model_len"))
                for card in body["data"]
            }
        except (KeyError, TypeError):
            raise EngineAway(f"/v1/models answers {status} {_said(body)}") from None

    async def load(self, name: str, path: str) -> None:
        """Load an adapter under a name, in place of what it had: no request finds the name empty."""
        status, body = await self._ask(
            "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, "load_inplace": True}, _QUICK
        )
        if status != 200:
            raise EngineRefused(_said(body) or f"status {status}", missing=status == 404)

    async def unload(self, name: str) -> None:
        """Take a name away; one that is not there is done."""
        status, body = await self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}, _QUICK)
        if status not in (200, 404):
            raise EngineAway(f"unloading {name} answers {status} {_said(body)}")

    async def speaks(self) -> bool:
        """Whether the base answers with numbers. Damaged weights anywhere in the engine's memory make it answer with none."""
        asked = {"model": self.base, "prompt": [1, 2, 3, 4], "max_tokens": 4, "temperature": 0, "logprobs": 0, "ignore_eos": True}
        numbers = await self._numbers(asked)
        return bool(numbers) and all(math.isfinite(number) for number in numbers)

    async def log_probabilities(self, name: str, probes: Sequence[Probe]) -> list[list[list[float]]]:
        """How likely a model finds the telling tokens of each probe's answers: [probe][answer][token]; NaN where it does not say.

        Each is what the engine would say next, held to that one token. It could tell all of a prompt at once (`prompt_logprobs`),
        but with adapters that is wrong, or ends the engine where others' requests run beside it (vllm-project/vllm#16668).
        """
        return list(await asyncio.gather(*(self._of_probe(name, probe) for probe in probes)))

    async def _of_probe(self, name: str, probe: Probe) -> list[list[float]]:
        found = []
        for answer in probe.answers:
            asked = (self._of_token(name, [*probe.prompt_ids, *answer.token_ids[:i]], answer.token_ids[i]) for i in answer.telling())
            found.append(list(await asyncio.gather(*asked)))
        return found

    async def _of_token(self, name: str, before: list[int], token: int) -> float:
        asked = {"model": name, "prompt": before, "max_tokens": 1, "temperature": 0, "logprobs": 0, "allowed_token_ids": [token]}
        async with self._turns:
            numbers = await self._numbers({**asked, "ignore_eos": True})
        return numbers[0] if numbers else math.nan

    async def rendered_alike(self, name: str, probes: Sequence[Probe]) -> int:
        """On how many probes a chat request becomes the very tokens that were evaluated; one that is no chat counts."""
        return sum([not probe.messages or await self._of_chat(name, probe) == probe.prompt_ids for probe in probes])

    async def _of_chat(self, name: str, probe: Probe) -> Any:
        asked = {"model": name, "messages": probe.messages, "add_generation_prompt": True}
        _, body = await self._ask("POST", "/tokenize", asked, _QUICK)
        return body.get("tokens")

    async def _numbers(self, asked: dict[str, Any]) -> list[float]:
        """Log-probabilities of the tokens that are answered; none where they are no numbers."""
        status, body = await self._ask("POST", "/v1/completions", asked, _ANSWER)
        if status != 200:
            if _NOT_NUMBERS in _said(body):
                return []
            raise EngineAway(f"/v1/completions answers {status} {_said(body)}")
        try:
            return [float(number) for number in body["choices"][0]["logprobs"]["token_logprobs"]]
        except (KeyError, TypeError, IndexError, ValueError):
            return []

    async def _ask(self, method: str, path: str, body: Any, limits: aiohttp.ClientTimeout) -> tuple[int, dict[str, Any]]:
        if self._session is None:
            self._session = aiohttp.ClientSession(trust_env=False)
        try:
            async with self._session.request(method, self.address + path, json=body, timeout=limits) as response:
                document = await response.json(content_type=None) if response.content_type == "application/json" else None
                return response.status, document if isinstance(document, dict) else {"message": await response.text()}
        except (aiohttp.ClientError, TimeoutError, ValueError) as failure:
            raise EngineAway(f"the engine does not answer: {type(failure).__name__}") from failure


def _said(body: dict[str, Any]) -> str:
    """The message of an error, in one line."""
    error = body.get("error")
    text = error.get("message") if isinstance(error, dict) else body.get("message")
    return " ".join(str(text or "").split())[:300]
