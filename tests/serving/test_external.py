"""The agent of engines that somebody else runs, with a real vLLM that sees the storage at a place of its own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from finetune_api.serving import EngineReport, ExternalEngines, OrderedModel
from tests.cluster.control_plane import free_port

from .conftest import Replica, until_it_listens
from .engine import BASE, running
from .versions import MODEL


def test_an_engine_of_others_is_given_what_it_sees_itself(replica: Replica, tmp_path: Path) -> None:
    models, mount = tmp_path / "models", tmp_path / "mount"
    models.mkdir()
    (models / "base").symlink_to((replica.engine.folder / "models" / "base").resolve())
    shutil.copy(replica.engine.folder / "models" / "base.json", models)
    port = free_port()
    engine, address = replica.engine.address.removeprefix("http://"), f"http://127.0.0.1:{port}"
    where = ["--replica", replica.engine.folder / "replica.json", "--models", models, "--port", port]
    other = Replica(replica.engine, address, replica.shelf, replica.adapters)

    def order(*ordered: OrderedModel) -> None:
        other.order(*ordered, external=ExternalEngines(addresses=[engine], adapters_path=str(mount)))

    def told() -> EngineReport:
        return next(iter(other.report().engines), EngineReport(address=engine))

    with running([sys.executable, "-m", "finetune_trainer", "agent", "--external", *where], tmp_path):
        until_it_listens(address)
        version = replica.shelf.publish(30, *replica.adapters["good"])
        order(version)
        other.until(lambda _: any("sees no files at" in model.message for model in told().models))
        (mount / "team").mkdir(parents=True)
        (mount / "team" / MODEL).symlink_to(replica.shelf.root / "versions")
        other.until(lambda _: [model.state for model in told().models] == ["Verified"])
        assert told().ready and told().engine == "vllm 0.32.0"
        assert replica.names() == {BASE, f"{MODEL}@30"} and replica.says(f"{MODEL}@30") != replica.says(BASE)
        order(version.model_copy(update={"aliases": [MODEL]}))
        other.until(lambda _: MODEL in replica.names())
        order()
        other.until(lambda _: replica.names() == {BASE})
