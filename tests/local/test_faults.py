"""What breaks while real processes train here: stops, hangs, a full disk, other world sizes. Case numbers as in docs/faults.md."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.contract import ExitCode, StageResult, read_stage_result
from finetune_api.status import Plan
from finetune_cli.local import LocalRun
from finetune_trainer.job.context import Context
from finetune_trainer.stages.prepare import prepare
from tests.cluster.control_plane import free_port
from tests.local.test_local import FULL, GANG, build, tuning

#: code that runs first in every process: steps that take long enough to be caught in the act
SLOWLY = """
import sys
if "worker" in sys.orig_argv:
    import time
    import transformers
    step = transformers.Trainer.training_step
    def slow(self, *words, **more):
        time.sleep(0.1)
        return step(self, *words, **more)
    transformers.Trainer.training_step = slow
"""
QUIET: dict[str, Any] = {"tuning": tuning(), "checkpoint": {"everySteps": 7, "keep": 10}, "distribution": {**GANG, "strategy": "ddp"}}


class Gang:
    """The processes of one job's train stage, started one by one."""

    def __init__(self, local: LocalRun) -> None:
        self.local = local
        self.attempt = 0
        self.processes: list[subprocess.Popen[bytes]] = []
        self.words: list[Path] = []

    def start(self, *, inject: str = SLOWLY) -> None:
        """Start every pod's process; `inject` is code that runs in all of them first."""
        port, nodes = free_port(), json.loads(self.local.job_json.read_text())["spec"]["distribution"].get("nodes", 1)
        folder = self.local.workspace / "inject"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(inject)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FINETUNE_ATTEMPT", str(self.attempt))
            patch.syspath_prepend(folder)
            started = [self.local._start("train", rank, port) for rank in range(nodes)]
        self.processes, self.words = [p for p, _ in started], [w for _, w in started]

    def wait(self, seconds: float = 120) -> tuple[list[int], list[StageResult]]:
        """Exit codes and last words."""
        deadline = time.monotonic() + seconds
        codes = [process.wait(timeout=max(1.0, deadline - time.monotonic())) for process in self.processes]
        self.attempt += 1
        return codes, [
            (read_stage_result(path.read_text()) if path.exists() else None) or StageResult(reason="Nothing") for path in self.words
        ]

    def steps(self) -> list[dict[str, Any]]:
        """The history of all attempts."""
        path = Path(self.local.layout.history)
        lines = path.read_text().splitlines() if path.exists() else []
        return [e for e in map(json.loads, lines) if e.get("loss") is not None]

    def until(self, what: str, check: Callable[[], Any], seconds: float = 90) -> None:
        """Wait while they train."""
        deadline = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.log(0)}"
            assert all(p.poll() is None for p in self.processes), self.log(0)
            time.sleep(0.02)

    def kill_workers(self, rank: int) -> None:
        """SIGKILL to what a pod's first process has started."""
        subprocess.run(["pkill", "-9", "-P", str(self.processes[rank].pid)], check=True)

    def kill(self) -> None:
        """What a node's sudden end does: everything is gone at once."""
        for rank, process in enumerate(self.processes):
            process.send_signal(signal.SIGSTOP)
            self.kill_workers(rank)
            process.kill()
        self.wait()

    def log(self, rank: int) -> str:
        return (self.local.logs / f"train-{rank}.log").read_text()[-5000:]

    def reshape(self, nodes: int) -> None:
        """Another number of pods for the next attempt, with the same global batch: what the operator does."""
        path = Path(self.local.layout.plan)
        plan = Plan.model_validate_json(path.read_text()).spread_over(nodes)
        path.write_text(json.dumps(plan.to_wire()))
        self.change("distribution", nodes=nodes)

    def change(self, block: str, **values: Any) -> None:
        """Other values in a block of the spec for the next attempt."""
        job = json.loads(self.local.job_json.read_text())
        job["spec"][block].update(values)
        self.local.job_json.write_text(json.dumps(job))


@pytest.fixture
def gang(tmp_path: Path, tiny_model: Path) -> Iterator[Callable[..., Gang]]:
    made: list[Gang] = []

    def make(name: str = "job", **spec: Any) -> Gang:
        made.append(prepared(tmp_path / name, tiny_model, name, **spec))
        return made[-1]

    yield make
    for one in made:
        for process in one.processes:
            if process.poll() is None:
                process.kill()


def losses(entries: list[dict[str, Any]]) -> dict[int, float]:
    """By step; of a step that was done twice the later one."""
    return {entry["step"]: entry["loss"] for entry in entries}


def checkpoints(gang: Gang) -> list[str]:
    """Those that count."""
    return sorted(p.parent.name for p in Path(gang.local.layout.checkpoints).glob("checkpoint-*/finetune-manifest.json"))


def prepared(folder: Path, model: Path, name: str, **spec: Any) -> Gang:
    """A prepared job; prepare itself is not what breaks here, and takes no process of its own."""
    local = build(folder, model, name, **spec)
    prepare(Context.load(str(local.job_json), str(local.workspace)))
    return Gang(local)


def undisturbed(folder: Path, model: Path, **spec: Any) -> dict[int, float]:
    """The losses of a run that nothing happens to."""
    gang = prepared(folder, model, "calm", **spec)
    gang.start()
    codes, words = gang.wait()
    assert codes == [0, 0], gang.log(0)
    found = losses(gang.steps())
    assert set(found) == set(range(1, 25)) and words[0].result["steps"] == 24
    return found


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[int, float]:
    """Of QUIET."""
    return undisturbed(tmp_path_factory.mktemp("calm"), tiny_model, **QUIET)


@pytest.fixture(scope="module")
def calm_full(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[int, float]:
    """Of all weights."""
    return undisturbed(tmp_path_factory.mktemp("calm-full"), tiny_model, **{**QUIET, "tuning": FULL})


def goes_on(job: Gang, step: int, calm: dict[int, float]) -> None:
    """The next attempt begins at that step, and ends as if nothing had been."""
    job.start()
    codes, words = job.wait()
    assert codes == [0, 0] and words[0].result["resumedFrom"] == step
    assert losses(job.steps()) == pytest.approx(calm, rel=1e-4)


def test_f11_a_stop_of_one_pod_stops_all_at_the_same_step_with_a_checkpoint(gang: Callable[..., Gang], calm: dict[int, float]) -> None:
    """And the next attempt goes on as if nothing had been (F12, F25)."""
    job = gang(**QUIET)
    job.start()
    job.until("step 9", lambda: len(job.steps()) >= 9)
    job.processes[1].send_signal(signal.SIGTERM)
    began = time.monotonic()
    codes, words = job.wait()
    assert codes == [ExitCode.STOPPED] * 2, job.log(0)
    step = words[0].result["checkpointStep"]
    assert [w.reason for w in words] == ["Stopped"] * 2 and words[1].result["checkpointStep"] == step
    assert 9 <= step < 24 and f"checkpoint-{step}" in checkpoints(job)
    assert time.monotonic() - began < 20, "within the grace period"
    goes_on(job, step, calm)


def test_a_stop_before_training_ends_at_once(gang: Callable[..., Gang]) -> None:
    job = gang(**QUIET)
    job.start(inject="import sys, time\nif 'worker' in sys.orig_argv: time.sleep(3600)\n")
    job.until("the workers", lambda: "rank 0 of 2 nodes" in job.log(0) and "rank 1 of 2" in job.log(1))
    time.sleep(1)
    for process in job.processes:
        process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    codes, words = job.wait()
    assert codes == [ExitCode.STOPPED] * 2 and "training had not begun" in words[0].message
    assert time.monotonic() - began < 5


HANG = """
import os, sys
if "worker" in sys.orig_argv and os.environ["FINETUNE_NODE_RANK"] == "1":
    import time
    import transformers
    step = transformers.Trainer.training_step
    def read_from_dead_storage():
        time.sleep(3600)
    def hang(self, *words, **more):
        if self.state.global_step == 9:
            read_from_dead_storage()
        return step(self, *words, **more)
    transformers.Trainer.training_step = hang
"""


def test_f13_a_hang_is_noticed_and_the_rank_behind_is_named(gang: Callable[..., Gang], calm: dict[int, float]) -> None:
    job = gang(**QUIET, runPolicy={"hangTimeout": "10s"})
    job.start(inject=HANG)
    codes, words = job.wait()
    assert codes == [ExitCode.HANG] * 2, job.log(0)
    assert words[1].reason == "Hang" and "rank 1 gave no sign of life" in words[1].message
    assert "after step 9 (step)" in words[1].message and "read_from_dead_storage" in words[1].message
    assert words[0].reason == "PeerLost", "rank 0 waits for the others"
    assert "in read_from_dead_storage" in job.log(1) and "stacks of rank 0" in job.log(0)
    assert words[0].result["checkpointStep"] == 7
    job.change("runPolicy", hangTimeout="10m")  # a busy machine takes longer than that for what is no hang
    goes_on(job, 7, calm)


def test_f8_a_worker_that_is_killed_takes_the_others_along_at_once(gang: Callable[..., Gang], calm: dict[int, float]) -> None:
    job = gang(**QUIET)
    job.start()
    job.until("step 9", lambda: len(job.steps()) >= 9)
    job.kill_workers(1)
    codes, words = job.wait(60)
    assert codes == [ExitCode.INFRASTRUCTURE] * 2
    assert [w.reason for w in words] == ["PeerLost", "ProcessDied"], words
    goes_on(job, 7, calm)


def test_f18_a_damaged_checkpoint_is_passed_over_and_said(gang: Callable[..., Gang], calm: dict[int, float]) -> None:
    job = gang(**QUIET)
    job.start()
    job.until("step 16", lambda: len(job.steps()) >= 16)
    job.kill()
    folder = Path(job.local.layout.checkpoints)
    newest = sorted(checkpoints(job), key=lambda n: int(n.rpartition("-")[2]))[-1]
    with next((folder / newest).glob("adapter_model.safetensors")).open("r+b") as weights:
        weights.seek(-8, 2)
        weights.write(b"\xff" * 8)
    job.start()
    codes, words = job.wait()
    assert codes == [0, 0] and words[0].result["resumedFrom"] == 7
    last = json.loads(Path(job.local.layout.history).read_text().splitlines()[-1])
    assert last["skippedCheckpoints"][-1] == 14 and last["resumedFrom"] == 7
    assert losses(job.steps()) == pytest.approx(calm, rel=1e-4)


def test_f17_a_full_volume_leaves_the_last_checkpoint_whole(tmp_path: Path, gang: Callable[..., Gang], calm: dict[int, float]) -> None:
    job = gang(**QUIET)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", job.local.layout.checkpoints], check=True)
    try:
        job.start()
        job.until("step 8", lambda: len(job.steps()) >= 8)
        job.until("its checkpoint", lambda: checkpoints(job) == ["checkpoint-7"])
        filler = Path(job.local.layout.checkpoints, "filler")
        with filler.open("wb") as sink:
            left = shutil.disk_usage(job.local.layout.checkpoints).free - 200_000
            sink.write(b"\0" * max(0, left))
        codes, words = job.wait()
        assert codes == [ExitCode.INFRASTRUCTURE] * 2
        told = next((w for w in words if w.reason == "NoSpaceLeft"), None)
        assert told is not None, words
        assert "the workspace is full" in told.message and told.result["checkpointStep"] == 7
        assert checkpoints(job) == ["checkpoint-7"]
        filler.unlink()
        job.start()
        codes, words = job.wait()
        assert codes == [0, 0] and words[0].result["resumedFrom"] == 7, "and no half of a checkpoint was taken for one"
        assert losses(job.steps()) == pytest.approx(calm, rel=1e-4)
    finally:
        subprocess.run(["umount", "-l", job.local.layout.checkpoints], check=True)


@pytest.mark.parametrize(
    ("strategy", "spec", "first", "then"),
    [
        ("ddp", {}, 2, 1),
        ("ddp", {}, 1, 2),
        ("deepspeed-zero2", {}, 2, 1),
        ("deepspeed-zero2", {"tuning": FULL}, 1, 2),
        ("deepspeed-zero3", {}, 2, 1),
        ("fsdp", {"tuning": FULL}, 2, 1),
    ],
)
def test_f20_another_number_of_pods_goes_on_with_the_same_steps(
    gang: Callable[..., Gang],
    calm: dict[int, float],
    calm_full: dict[int, float],
    strategy: str,
    spec: dict[str, Any],
    first: int,
    then: int,
) -> None:
    """Global batch, data order, schedule and optimizer state are those of two pods with DDP that were not disturbed."""
    job = gang(**{**QUIET, **spec, "distribution": {"gpusPerNode": 0, "nodes": first, "strategy": strategy}})
    job.start()
    job.until("step 9", lambda: len(job.steps()) >= 9)
    job.processes[0].send_signal(signal.SIGTERM)
    codes, words = job.wait()
    assert set(codes) == {ExitCode.STOPPED}, job.log(0)
    job.reshape(then)
    job.start()
    codes, words = job.wait()
    assert codes == [0] * then, job.log(0)
    assert words[0].result["resumedFrom"] >= 9
    assert losses(job.steps()) == pytest.approx(calm_full if spec else calm, rel=2e-2)
