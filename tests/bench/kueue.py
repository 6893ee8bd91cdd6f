"""The real Kueue on its own workload, by its own runner and minimal manager, on an API server as ours has in kueue_workload.py.

Its manager has no webhooks and no integrations, its Workloads no pods: the runner marks them as finished after their run time.
"""

from __future__ import annotations

import csv
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from tests.bench.api_server import api_server
from tests.cluster import binaries, processes
from tests.cluster.shell import CommandFailed

NAME = "bench-real-kueue"
_LIMIT = 1800.0


def bench(share: float = 1.0, config: str = "baseline") -> dict[str, Any]:
    """Wall time, time to admission per class, core-seconds and memory. `share`: the part of each class's jobs."""
    built = binaries.ensure("kueue-bench")
    with api_server(NAME) as server:
        server.apply(built / "crds")
        out = server.state / "out"
        out.mkdir()
        workload = yaml.safe_load((built / "configs" / config / "generator.yaml").read_text())
        _cut(workload, share)
        (out / "generator.yaml").write_text(yaml.safe_dump(workload))
        env = {**os.environ, "KUBECONFIG": str(server.admin), "PROJECT_DIR": str(out), processes.MARK: NAME}
        topology = ["--enableTAS"] if "topology" in workload else []

        def start(*words: str | Path) -> subprocess.Popen[bytes]:
            sink = (out / f"{Path(words[0]).name}.log").open("wb")
            return subprocess.Popen(list(map(str, words)), env=env, cwd=out, stdout=sink, stderr=subprocess.STDOUT)

        manager = start(built / "minimalkueue", *topology)
        time.sleep(6)
        began = time.monotonic()
        # the flags of Kueue's Makefile for a cluster that is there
        runner = start(
            built / "runner",
            "--o",
            out,
            "--generatorConfig",
            out / "generator.yaml",
            "--qps=1000",
            "--burst=2000",
            "--timeout=25m",
            *topology,
        )
        used = server.used()
        while not (out / "wlStates.csv").exists():  # it cleans up afterwards
            if runner.poll() is not None or manager.poll() is not None or time.monotonic() > began + _LIMIT:
                raise CommandFailed(f"Kueue or its runner has failed: {out}")
            used = server.used()
            time.sleep(1)
        runner.wait()
        return {
            **_summary(out),
            "used": {name: part for name, part in used.items() if name != "runner"},
            "kueue": binaries.version("kueue-bench"),
        }


def _cut(workload: dict[str, Any], share: float) -> None:
    for cohort in workload["cohorts"]:
        for queues in cohort["queuesSets"]:
            for some in queues["workloadsSets"]:
                some["count"] = round(some["count"] * share)


def _summary(out: Path) -> dict[str, Any]:
    found = yaml.safe_load((out / "summary.yaml").read_text())
    (queues,) = found["clusterQueueClasses"].values()
    classes = found["workloadClasses"]
    ends = [float(row["ms to finish"]) for row in csv.DictReader((out / "wlStates.csv").open())]
    return {
        "jobs": sum(c["count"] for c in classes.values()),
        "longest_job_seconds": round(max(ends) / 1000, 1),
        "seconds": round((_moment(queues["lastEventTime"]) - _moment(queues["firstEventTime"])), 1),
        "evictions": sum(c["totalEvictions"] for c in classes.values()),
        "time_to_admission": {name: round(c["averageTimeToAdmissionMs"] / 1000, 1) for name, c in classes.items()},
    }


def _moment(value: Any) -> float:
    from finetune_operator.model.times import parse_time

    return parse_time(value).timestamp() if isinstance(value, str) else value.timestamp()
