"""What a fault costs: training steps done again, and seconds until the run is where it was. Real processes, two of them.

The operator and the scheduler are not in it: what they add is in the operator's benchmark, and a second or two.
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cluster.quickstart import model
from tests.local.test_faults import HANG, QUIET, SLOWLY, Gang, prepared

ROUNDS = 3
STEP_SECONDS = 0.1
"""What SLOWLY makes a step last at least."""
JOB: dict[str, Any] = {**QUIET, "runPolicy": {"hangTimeout": "6s"}}
JOB["tuning"] = {**QUIET["tuning"], "hyperparameters": {**QUIET["tuning"]["hyperparameters"], "maxSteps": 60}}


def _drained(job: Gang) -> None:
    job.processes[1].send_signal(signal.SIGTERM)


def _damaged(job: Gang) -> None:
    job.kill()
    folders = [p.parent for p in Path(job.local.layout.checkpoints).glob("checkpoint-*/finetune-manifest.json")]
    newest = max(folders, key=lambda p: int(p.name.rpartition("-")[2]))
    (newest / "adapter_model.safetensors").write_bytes(b"")


FAULTS: dict[str, tuple[str, Callable[[Gang], None]]] = {
    "a pod is drained": (SLOWLY, _drained),
    "a process is killed": (SLOWLY, lambda job: job.kill_workers(1)),
    "all pods end at once": (SLOWLY, Gang.kill),
    "and the newest checkpoint is damaged": (SLOWLY, _damaged),
    "a rank hangs (hangTimeout 6s)": (HANG, lambda job: None),
}


def _step(job: Gang) -> int:
    steps = job.steps()
    return int(steps[-1]["step"]) if steps else 0


def _once(job: Gang, inject: str, strike: Callable[[Gang], None], at: int) -> tuple[int, float]:
    """(steps done again, seconds from the fault until the step that was reached is reached again)"""
    job.start(inject=inject)
    job.until("the step to strike at", lambda: _step(job) >= at)
    reached, struck = _step(job), time.monotonic()
    strike(job)
    if any(process.poll() is None for process in job.processes):
        job.wait()
    reached = max(reached, _step(job))
    lines = len(Path(job.local.layout.history).read_text().splitlines())
    job.start(inject="")
    entries: list[dict[str, Any]] = []

    def there() -> bool:
        entries[:] = [json.loads(line) for line in Path(job.local.layout.history).read_text().splitlines()[lines:]]
        return bool(entries) and int(entries[-1]["step"]) > reached

    job.until("it is where it was", there)
    took = time.monotonic() - struck
    job.kill()
    return reached - int(entries[-1].get("resumedFrom", 0)), took


def bench() -> dict[str, Any]:
    """By fault: median and worst."""
    rng, tiny = random.Random(5), model("tiny.py", "tiny")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (inject, strike)) in enumerate(FAULTS.items()):
            steps, times = [], []
            for turn in range(ROUNDS):
                job = prepared(Path(folder, f"{number}-{turn}"), tiny, "job", **JOB)
                again, took = _once(job, inject, strike, 9 if inject is HANG else rng.randint(15, 30))
                steps.append(again)
                times.append(took)
            found[name] = {
                "steps_again": {"median": statistics.median(steps), "worst": max(steps)},
                "lost_seconds": {"median": round(statistics.median(steps) * STEP_SECONDS, 1), "worst": round(max(steps) * STEP_SECONDS, 1)},
                "seconds_until_where_it_was": {"median": round(statistics.median(times), 1), "worst": round(max(times), 1)},
            }
    return found
