"""Tokens a second of a real vLLM on this machine's CPU, asked directly and through the gateway, in turns.

`python -m tests.bench.engine [--seconds N] [--rounds N] [--clients N]` prints one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai

from tests.bench.gateway import ALONE, KEY, answering
from tests.cluster.control_plane import free_port
from tests.cluster.environment import site_packages
from tests.cluster.quickstart import model
from tests.cluster.shell import REPO
from tests.serving.engine import Vllm

NAME, TOKENS = "support-bot@3", 48


async def _client(ask: openai.AsyncOpenAI, name: str, until: float, counted: list[int]) -> None:
    while time.monotonic() < until:
        stream = await ask.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": "Tell me of the sea."}],
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for _ in stream:
            counted.append(1)


async def _load(port: int, token: str, name: str, clients: int, seconds: float) -> float:
    counted: list[int] = []
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=token, max_retries=0) as ask:
        begun = time.monotonic()
        await asyncio.gather(*(_client(ask, name, begun + seconds, counted) for _ in range(clients)))
        return len(counted) / (time.monotonic() - begun)


def bench(seconds: float = 20.0, rounds: int = 5, clients: int = 8) -> dict[str, Any]:
    """Medians of rounds in which both ways take turns, and the ratio of each round."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, port, metrics = Path(scratch), free_port(), free_port()
        engine = Vllm(model("smollm2.py", "SmolLM2-135M-Instruct"), folder, name=NAME)
        engine.start()
        try:
            engine.wait()
            image = {"PYTHONPATH": f"{REPO / 'operator'}:{site_packages('operator')}", "MALLOC_ARENA_MAX": "1"}
            python = getattr(sys, "_base_executable", sys.executable)
            words = [python, "-c", ALONE, str(port), str(metrics), f"127.0.0.1:{engine.port}", KEY]
            with answering(words, port, image, folder / "gateway.log"):
                ways = {"direct": (engine.port, "none", NAME), "gateway": (port, KEY, "support-bot")}
                told: dict[str, list[float]] = {name: [] for name in ways}
                for turn in range(rounds + 1):  # the first one warms up
                    for name in (sorted(ways), sorted(ways, reverse=True))[turn % 2]:
                        found = asyncio.run(_load(*ways[name], clients, seconds))
                        if turn:
                            told[name].append(round(found, 1))
                    print(json.dumps(told), file=sys.stderr, flush=True)
        finally:
            engine.kill()
    ratios = [gateway / direct for gateway, direct in zip(told["gateway"], told["direct"], strict=True)]
    medians = {f"{name} tokens/s": statistics.median(each) for name, each in told.items()}
    return {
        "load average": round(os.getloadavg()[0], 1),
        **medians,
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(r, 3) for r in ratios],
    }


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(prog="tests.bench.engine", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=8)
    given = parser.parse_args()
    print(json.dumps(bench(given.seconds, given.rounds, given.clients), indent=1))


if __name__ == "__main__":
    main()
