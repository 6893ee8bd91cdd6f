"""Signs of life, hangs and stops of a pod's processes; and nodes that jobs keep failing on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from finetune_api.status import Restart
from finetune_operator.reconcile.job.failures import suspects
from finetune_trainer.process.errors import Hang, Stopped
from finetune_trainer.process.ipc import Channel, Heartbeat, Phase
from finetune_trainer.process.supervise import HangDetector, Supervisor, waits_for_peers
from tests.factory import after, stamp


def beat(at: float, phase: Phase = "step", step: int = 1) -> Heartbeat:
    return Heartbeat(1, 0, step, phase, at)


def test_the_limit_follows_the_run_itself() -> None:
    detector = HangDetector(0.0)
    assert detector.limit == 1800, "the first step: models are loaded, kernels compiled"
    detector.observe(beat(400))
    assert detector.limit == 180 and not detector.hung(580) and detector.hung(581)
    detector.observe(beat(460))
    assert detector.limit == 600, "steps of a minute: ten of them"
    detector.observe(beat(470, "save"))
    assert detector.limit == 1800, "a first checkpoint may take long"
    detector.observe(beat(770))
    assert detector.limit == 600, "and says nothing about steps"
    detector.observe(beat(780, "save"))
    assert detector.limit == 3000
    detector.observe(beat(5))
    assert detector.last.at == 780, "what is older than the last changes nothing"


def test_a_limit_of_the_users() -> None:
    detector = HangDetector(0.0, 30)
    assert detector.limit == 1800, "not for the start"
    detector.observe(beat(100))
    assert detector.limit == 30
    detector.observe(beat(110, "save"))
    assert detector.limit == 30


WORKER = """
import faulthandler, pathlib, signal, sys, time
from finetune_trainer.process.ipc import Channel
channel = Channel.from_environment()
faulthandler.register(signal.SIGUSR1, file=channel.stack(0).open("w"), all_threads=True)
channel.send_heartbeat(0, 0, "start"); channel.send_heartbeat(0, 4, "step")
def mine():
    {body}
mine()
"""


def supervise(folder: Path, body: str, timeout: float | None = None) -> int:
    return Supervisor(Channel(folder), timeout).run([sys.executable, "-c", WORKER.format(body=body)], {"PYTHONPATH": ":".join(sys.path)})


def test_a_hang_ends_the_processes_and_names_the_place(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Hang) as found:
        supervise(tmp_path, "time.sleep(600)", 1.0)
    assert "rank 0 gave no sign of life" in found.value.message and "after step 4 (step)" in found.value.message
    assert "in mine" in found.value.message and found.value.reason == "Hang"
    assert "stacks of rank 0" in capfd.readouterr().err


def test_who_waits_for_the_others_is_not_the_one_to_blame() -> None:
    assert waits_for_peers("/x/site-packages/torch/distributed/distributed_c10d.py:2806 in all_reduce")
    assert waits_for_peers("/x/site-packages/torch/autograd/graph.py:841 in _engine_run_backward")
    assert not waits_for_peers("/x/site-packages/torch/utils/data/_utils/fetch.py:52 in fetch")
    assert not waits_for_peers("/x/site-packages/datasets/arrow_dataset.py:1 in __getitem__") and not waits_for_peers("")


def test_an_exit_code_is_passed_on(tmp_path: Path) -> None:
    assert supervise(tmp_path, "sys.exit(7)") == 7


def stop_after(folder: Path, body: str, seconds: float, **env: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run a supervisor of its own, and send it SIGTERM."""
    code = (
        "import sys; from pathlib import Path; from tests.unit.test_supervise import supervise\n"
        f"try: sys.exit(supervise(Path({str(folder)!r}), {body!r}))\n"
        "except Exception as failure: print(repr(failure)); sys.exit(99)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join([".", *sys.path]), **env}, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 30
    while not (folder / "beat-0").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(seconds)
    process.terminate()
    began = time.monotonic()
    out, _ = process.communicate(timeout=30)
    return time.monotonic() - began, subprocess.CompletedProcess([], process.returncode, out, "")


def test_a_stop_is_passed_on_and_waited_for(tmp_path: Path) -> None:
    waiting = "while not channel.stop_requested: time.sleep(0.05)\n    time.sleep(0.5); sys.exit(3)"
    _, done = stop_after(tmp_path, waiting, 1.0)
    assert done.returncode == 3, done.stdout


def test_a_stop_that_is_not_heard_ends_with_the_grace_period(tmp_path: Path) -> None:
    seconds, done = stop_after(tmp_path, "time.sleep(600)", 1.0, FINETUNE_GRACE_SECONDS="12")
    assert "rank 0 was at step 4" in done.stdout and Stopped.__name__ in done.stdout
    assert seconds < 10


def test_nothing_outlives_a_parent_that_was_killed(tmp_path: Path) -> None:
    child = "from finetune_trainer.process import parent_watch; parent_watch.start(); print('up', flush=True); import time; time.sleep(60)"
    parent = f"""
import os, subprocess, sys
env = {{**os.environ, "FINETUNE_PARENT_PID": str(os.getpid())}}
print(subprocess.Popen([sys.executable, "-c", {child!r}], env=env).wait())
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.kill()
    began = time.monotonic()
    assert process.stdout.read() == "", "the pipe is closed when the last process that holds it has ended"
    assert time.monotonic() - began < 30
    gone = subprocess.run(
        [sys.executable, "-c", child], env={**os.environ, "FINETUNE_PARENT_PID": str(process.pid)}, timeout=30, check=False
    )
    assert process.wait() == -9 and gone.returncode == 12, "a parent that is gone before it is looked for"


def restart(node: str, at: float, **more: Any) -> Restart:
    return Restart(**{"attempt": 0, "cause": "Infrastructure", "reason": "PodFailed", "node": node, "time": stamp(after(at)), **more})


def test_nodes_that_jobs_keep_failing_on() -> None:
    def found(*restarts: Restart) -> tuple[str, ...]:
        return suspects(restarts, after(4000))

    assert found() == found(restart("a", 3900)) == ()
    assert found(restart("a", 3900), restart("a", 3950)) == ("a",)
    assert found(restart("a", 3900), restart("b", 3950)) == ()
    assert found(restart("a", 100), restart("a", 3950)) == (), "an hour ago"
    assert found(restart("a", 3900, reason="GPUError")) == ("a",), "hardware says so itself"
    assert found(restart("a", 3900, cause="Disruption"), restart("a", 3900, cause="OutOfMemory")) == ()
    assert found(restart("a", 3900, reason="PeerLost"), restart("a", 3950)) == (), "who lost the others is not to blame"
    assert found(restart("b", 3900, cause="Hang"), restart("b", 3950), restart("a", 3900, reason="GPUError")) == ("a", "b")
