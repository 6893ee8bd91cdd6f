"""prepare as a process of its own, of a hub that breaks: what a pod ends with, and what the next one goes on from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from finetune_api.contract import ExitCode, StageResult, read_stage_result
from tests.cluster.shell import REPO
from tests.trainer.conftest import ROWS, Bench
from tests.trainer.hub import Hub, hub


def prepare(bench: Bench, hub: Hub) -> tuple[int, StageResult]:
    """Exit code and last words."""
    context = bench.context(ROWS["messages"], model={"uri": "hf://org/model@main"})
    job, words = bench.folder / "job.json", bench.folder / "words"
    job.write_text(context.job.dumps())
    words.unlink(missing_ok=True)
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "FINETUNE_TERMINATION_LOG": str(words),
        "PYTHONPATH": os.pathsep.join([f"{REPO}/trainer_image", f"{REPO}/operator", os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "finetune_trainer", "prepare", "--job", str(job), "--workspace", context.workspace]
    ended = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    found = read_stage_result(words.read_text()) if words.exists() else None
    assert found is not None, ended.stdout[-3000:]
    return ended.returncode, found


def test_a_hub_that_breaks_in_the_middle_of_a_model(bench: Bench, tiny_model: Path) -> None:
    with hub(tiny_model) as served:
        served.broken = ("/resolve/", 503)  # it lists the files, and does not give them
        code, words = prepare(bench, served)
        assert code == ExitCode.SOURCE_UNAVAILABLE
        assert (words.reason, words.result) == ("WaitingForSource", {"host": "127.0.0.1", "retryAfterSeconds": 77.0})
        assert "127.0.0.1 answers 503 Service Unavailable" in words.message
        served.broken = None
        code, words = prepare(bench, served)
        assert (code, words.reason) == (ExitCode.DONE, "DataReady"), words
