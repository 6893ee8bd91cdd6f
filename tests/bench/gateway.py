"""What the gateway adds to a replica's own time, and what it costs, beside LiteLLM's proxy on the same replica.

`python -m tests.bench.gateway [--without-litellm] [--seconds N] [--rounds N]` prints one JSON document. All run on this machine's processors,
as does whatever else it does: `cpu ms/request`, and the numbers beside `direct` and `bare hop` (one process of Python that only passes
bytes on), say more than the others alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.control_plane import free_port
from tests.cluster.environment import site_packages, tool
from tests.cluster.shell import REPO

KEY = "ftk_" + "k" * 43
LOADS = (1, 8, 32)
ALONE = """
import asyncio, sys, uvloop
import finetune_gateway.__main__ as start
from finetune_api.api_keys import ApiKey, digest_of_key
from finetune_gateway.catalog import Endpoint, Served
from finetune_gateway.gateway import Gateway
from finetune_gateway.settings import Settings
port, metrics, replica, key = sys.argv[1:]

async def run():
    gateway = Gateway(Settings(host="127.0.0.1", port=int(port), metrics_port=int(metrics)), None, lambda: "")
    gateway.catalog.put(Endpoint("team-a", "chat", "", (replica,), {"support-bot": Served(3, None, {3: (replica,)})}))
    gateway.keys.put({digest_of_key(key): ("bench", ApiKey(hash=digest_of_key(key), namespace="team-a"))})
    await asyncio.gather(*(server.serve() for server in gateway.servers()))

start.prepare()
uvloop.run(run())
"""
"""The gateway, with all that it imports, but for the API server that it would watch."""


@contextlib.contextmanager
def answering(words: Sequence[str], port: int, env: dict[str, str], log: Path, seconds: float = 90) -> Iterator[subprocess.Popen[bytes]]:
    """Runs until the block ends; answers at the port when it begins."""
    with log.open("wb") as sink:
        process = subprocess.Popen(words, env={**os.environ, **env}, stdout=sink, stderr=sink)
    try:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{words[:3]} does not answer: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def _load(port: int, token: str, model: str, clients: int, seconds: float, how: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "tests.bench.paced", "load", str(port), token, model, str(clients), str(seconds), how]
    found: dict[str, Any] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True, cwd=REPO).stdout)
    return found


def _cpu(process: subprocess.Popen[bytes] | None) -> float:
    if process is None:
        return 0.0
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident(process: subprocess.Popen[bytes]) -> float:
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS"))) / 1024


def _medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: round(statistics.median(found[name] for found in rounds), 2) for name in rounds[0]}


def _once(
    port: int, token: str, model: str, process: subprocess.Popen[bytes] | None, clients: int, seconds: float, how: str
) -> dict[str, Any]:
    before = _cpu(process)
    found = _load(port, token, model, clients, seconds, how)
    if process is not None:
        found["cpu ms/request"] = round(1000 * (_cpu(process) - before) / max(1, found["requests"]), 3)
    return found


def _memory(port: int, token: str, model: str, process: subprocess.Popen[bytes]) -> dict[str, float]:
    """With nobody, and the most while 200 streams run, in MB."""
    idle = _resident(process)
    words = [sys.executable, "-m", "tests.bench.paced", "load", str(port), token, model, "200", "3", "stream"]
    streams = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPO)
    most = idle
    while streams.poll() is None:
        most = max(most, _resident(process))
        time.sleep(0.05)
    return {"idle MB": round(idle, 1), "200 streams MB": round(most, 1)}


@contextlib.contextmanager
def _ways(folder: Path, *, with_litellm: bool) -> Iterator[dict[str, tuple[int, str, str, subprocess.Popen[bytes] | None]]]:
    """Port, token, model and process of each way to the replica."""
    replica, port, metrics, other, hop = (free_port() for _ in range(5))
    here = {"PYTHONPATH": str(REPO)}
    image = {"PYTHONPATH": f"{REPO / 'operator'}:{site_packages('operator')}", "MALLOC_ARENA_MAX": "1"}
    with contextlib.ExitStack() as stack:
        words = [sys.executable, "-m", "tests.bench.paced", "replica", str(replica)]
        stack.enter_context(answering(words, replica, here, folder / "replica.log"))
        words = [sys.executable, "-m", "tests.bench.paced", "hop", str(hop), str(replica)]
        between = stack.enter_context(answering(words, hop, here, folder / "hop.log"))
        python = getattr(sys, "_base_executable", sys.executable)  # without this environment: the packages that the image has
        words = [python, "-c", ALONE, str(port), str(metrics), f"127.0.0.1:{replica}", KEY]
        gateway = stack.enter_context(answering(words, port, image, folder / "gateway.log"))
        found: dict[str, tuple[int, str, str, subprocess.Popen[bytes] | None]] = {
            "direct": (replica, "none", "support-bot@3", None),
            "bare hop": (hop, "none", "support-bot@3", between),
            "gateway": (port, KEY, "support-bot", gateway),
        }
        if with_litellm:
            packages = tool("litellm[proxy]")
            (folder / "litellm.yaml").write_text(
                json.dumps(
                    {
                        "model_list": [
                            {
                                "model_name": "support-bot",
                                "litellm_params": {
                                    "model": "openai/support-bot@3",
                                    "api_base": f"http://127.0.0.1:{replica}/v1",
                                    "api_key": "none",
                                },
                            }
                        ],
                        "general_settings": {"master_key": "sk-bench"},
                        "litellm_settings": {"set_verbose": False, "request_timeout": 600, "telemetry": False},
                    }
                )
            )
            env = {
                "PYTHONPATH": str(packages),
                "LITELLM_MODE": "PRODUCTION",
                "LITELLM_LOG": "ERROR",
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                "NO_PROXY": "127.0.0.1",
            }
            words = [python, str(packages / "bin" / "litellm"), "--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1"]
            process = answering([*words, "--port", str(other), "--num_workers", "1"], other, env, folder / "litellm.log", 180)
            found["litellm"] = (other, "sk-bench", "support-bot", stack.enter_context(process))
        yield found


def bench(seconds: float = 6.0, rounds: int = 3, *, with_litellm: bool = True) -> dict[str, Any]:
    """Medians of rounds in which all ways take turns."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, _ways(Path(folder), with_litellm=with_litellm) as ways:
        found["load average"] = round(os.getloadavg()[0], 1)
        for way in ways.values():  # whatever is made at first use
            _once(*way, 4, 1.0, "stream")
            _once(*way, 4, 0.5, "whole")
        for clients, how in (*((clients, "stream") for clients in LOADS), (32, "whole")):
            told: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, way in ways.items():
                    told[name].append(_once(*way, clients, seconds, how))
            title = f"{clients} streams" if how == "stream" else f"{clients} clients, answers at once"
            found[title] = {name: _medians(each) for name, each in told.items()}
            print(title, json.dumps(found[title]), file=sys.stderr, flush=True)
        found["memory"] = {name: _memory(*way[:3], way[3]) for name, way in ways.items() if way[3] is not None}
    return found


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(prog="tests.bench.gateway", description=__doc__)
    parser.add_argument("--without-litellm", action="store_true")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(json.dumps(bench(given.seconds, given.rounds, with_litellm=not given.without_litellm), indent=1))


if __name__ == "__main__":
    main()
