"""One replica for all tests here: a real vLLM, the real agent beside it, and the storage of a FineTunedModel on a volume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.endpoint import EndpointBase
from finetune_api.probing import Probes
from finetune_api.serving import OrderedModel, ReplicaFile, ReplicaOrder, ReplicaReport
from tests.cluster.control_plane import free_port

from .engine import BASE, MOST_RANK, Vllm, make_base, running
from .versions import MODEL, Shelf, make_adapter

WHOLE = ("whole", "whole@40", "whole@41")
"""Further names of the engine's base: of a FineTunedModel with two versions (test_base.py)."""


def asked(url: str, body: Any = None, method: str | None = None, timeout: float = 300) -> Any:
    """An answer's JSON. Raises urllib.error.HTTPError."""
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), {"content-type": "application/json"})
    request.method = method or ("GET" if body is None else "POST")
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)


class Replica:
    """The engine and its agent, as the operator and users see them."""

    def __init__(self, engine: Vllm, agent: str, shelf: Shelf, adapters: dict[str, tuple[Path, Probes]]) -> None:
        self.engine, self.agent, self.shelf, self.adapters = engine, agent, shelf, adapters
        self.generation = 0

    def order(self, *models: OrderedModel, **more: Any) -> ReplicaReport:
        """Put an order."""
        self.generation += 1
        order = ReplicaOrder(generation=self.generation, models=list(models), **more)
        return ReplicaReport.model_validate(asked(f"{self.agent}/models", order.to_wire(), "PUT"))

    def report(self) -> ReplicaReport:
        """What it says now."""
        return ReplicaReport.model_validate(asked(f"{self.agent}/models"))

    def until(self, wanted: Callable[[ReplicaReport], bool], seconds: float = 300) -> ReplicaReport:
        """Its report, as soon as it is as wanted."""
        ends = time.monotonic() + seconds
        while True:
            report = self.report()
            if wanted(report):
                return report
            assert time.monotonic() < ends, report
            time.sleep(0.1)

    def settled(self, seconds: float = 300) -> dict[str, tuple[str, str]]:
        """State and message of each version, once all are decided about."""
        report = self.until(lambda r: r.ready and all(m.state not in ("Pending", "Loaded") for m in r.models), seconds)
        return {model.name: (model.state, model.message) for model in report.models}

    def says(self, model: str, prompt: tuple[int, ...] = (20, 30, 40, 50)) -> str:
        """Greedy words of a model."""
        body = {"model": model, "prompt": list(prompt), "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        return str(asked(f"{self.engine.address}/v1/completions", body)["choices"][0]["text"])

    def names(self) -> set[str]:
        """What the engine says that it serves, beside its base's further names."""
        return {card["id"] for card in asked(f"{self.engine.address}/v1/models")["data"]} - set(WHOLE)


@pytest.fixture(scope="session")
def replica(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """Started once; the engine gets ready while the adapters are made."""
    folder = tmp_path_factory.mktemp("replica")
    base, other = folder / "claim" / "base", folder / "claim" / "other"
    make_base(base, tiny_model)
    engine = Vllm(base, folder, also=WHOLE)
    engine.start()
    try:
        file = ReplicaFile(
            name=BASE,
            namespace="team",
            uid="0f0f0f0f-1",
            base=EndpointBase(uri="pvc://models/base"),
            max_lora_rank=MOST_RANK,
            sources={"pvc://models": str(folder / "claim"), "pvc://claim": str(folder / "claim")},
        )
        (folder / "replica.json").write_text(file.dumps())
        trainer = [sys.executable, "-m", "finetune_trainer"]
        where = ["--replica", folder / "replica.json"]
        words = folder / "last-words"
        env = {**os.environ, "FINETUNE_TERMINATION_LOG": str(words)}
        subprocess.run([*trainer, "fetch", *where, "--to", folder / "models"], env=env, check=True, capture_output=True)
        assert json.loads(words.read_text())["reason"] == "Fetched"
        fingerprint = json.loads((folder / "models" / "base.json").read_text())["fingerprint"]
        make_base(other, tiny_model, hidden=192, layers=3)
        plans: dict[str, dict[str, Any]] = {"good": {}, "better": {}, "none": {"strength": 0.0}, "large": {"rank": 32}, "other": {}}
        adapters = {}
        for seed, (name, plan) in enumerate(plans.items()):
            probes = make_adapter(other if name == "other" else base, folder / name, seed, **plan)
            adapters[name] = folder / name, probes
        port = free_port()
        address = f"http://127.0.0.1:{port}"
        command = [*trainer, "agent", *where, "--models", folder / "models", "--port", port, "--engine", engine.address]
        with running(command, folder):
            shelf = Shelf(folder / "claim" / MODEL, base, fingerprint)
            found = Replica(engine, address, shelf, adapters)
            until_it_listens(address)
            engine.wait()
            yield found
    finally:
        engine.kill()


def until_it_listens(address: str) -> None:
    """Wait for an agent."""
    for _ in range(200):
        try:
            asked(f"{address}/models")
            return
        except urllib.error.URLError:
            time.sleep(0.1)
    raise AssertionError(f"the agent does not listen on {address}")
