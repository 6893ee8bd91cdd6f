"""A whole model as a replica's base: fetched by the real `fetch`, and asked its probes by an agent beside the real vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from finetune_api.probing import Probes
from finetune_api.serving import OrderedModel
from tests.cluster.control_plane import free_port

from .conftest import Replica, asked, until_it_listens
from .engine import running
from .versions import MODEL, Shelf, log_probabilities, make_probes

_TRAINER = [sys.executable, "-m", "finetune_trainer"]


def test_a_whole_model_serves_when_it_is_found_to_be_its_version_and_else_never(replica: Replica, tmp_path: Path) -> None:
    """Another process is the agent: nothing was ordered from the first one by now, so that it unloads nothing."""
    from transformers import AutoModelForCausalLM

    base = replica.shelf.base
    tuned, origin = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, base.with_name("other")))
    probes = make_probes(base, 5, lambda *asks: log_probabilities(tuned, *asks), lambda *asks: log_probabilities(origin, *asks))
    probes = Probes(fingerprint="sha256:of-what-it-was-tuned-from", probes=probes.probes)
    turned = [
        p.model_copy(update={"answers": [a.model_copy(update={"tuned": a.base, "base": a.tuned}) for a in p.answers]})
        for p in probes.probes
    ]
    shelf = Shelf(replica.shelf.root.with_name("whole"), base, replica.shelf.fingerprint)
    right = shelf.publish(40, base, probes)
    wrong = shelf.publish(41, base, probes.model_copy(update={"probes": turned}))

    where = ["--replica", replica.engine.folder / "replica.json"]

    def fetched(version: OrderedModel) -> tuple[list[object], Replica]:
        """What starts an agent of that version, and how it is asked."""
        models, port = tmp_path / str(version.number), free_port()
        command = [*_TRAINER, "fetch", *where, "--to", models, "--version", version.model_dump_json(by_alias=True)]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        assert (models / "base").resolve() == shelf.root / "versions" / str(version.number)
        assert json.loads((models / "base.json").read_text())["fingerprint"] == shelf.fingerprint
        agent = [*_TRAINER, "agent", *where, "--models", models, "--port", port, "--engine", replica.engine.address]
        return agent, Replica(replica.engine, f"http://127.0.0.1:{port}", shelf, replica.adapters)

    command, other = fetched(right)
    with running(command, tmp_path):
        until_it_listens(other.agent)
        report = other.until(lambda r: r.ready)  # without an order
        assert [(model.name, model.state) for model in report.models] == [("whole@40", "Verified")]
        assert report.models[0].distance is not None and report.models[0].distance > 0.02 and report.models[0].message.startswith("nearer")
        with urllib.request.urlopen(f"{other.agent}/health") as health:
            assert health.status == 200
        assert other.says("whole") == other.says("whole@40")
        other.order(replica.shelf.publish(42, *replica.adapters["good"]))
        settled = other.settled()
        assert [state for state, _ in settled.values()] == ["Verified"] * 2 and f"{MODEL}@42" in settled, "an adapter of it beside it"
        other.order()
        other.until(lambda r: len(r.models) == 1 and f"{MODEL}@42" not in replica.names())

    command, other = fetched(wrong)
    with running(command, tmp_path):
        until_it_listens(other.agent)
        report = other.until(lambda r: [model.state for model in r.models] == ["Mismatch"])
        assert not report.ready and report.message.startswith("whole@41: Mismatch: nearer to the tuned model than to its base on 0 of 8")
        with pytest.raises(urllib.error.HTTPError, match="503"):
            asked(f"{other.agent}/health")
