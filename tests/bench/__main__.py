"""`make bench`: what the operator and the trainer cost, beside a baseline in the same run."""

from __future__ import annotations

import argparse
import json

from . import (
    engine,
    evaluation,
    faults,
    gateway,
    inventory,
    kueue,
    kueue_workload,
    loop,
    operator,
    prepare,
    queueing,
    status_write,
    trainer,
)

ALL = (
    "operator",
    "loop",
    "queueing",
    "inventory",
    "kueue",
    "status-write",
    "prepare",
    "trainer",
    "evaluation",
    "faults",
    "gateway",
    "engine",
)


def main() -> None:
    """Run the benchmarks and print one JSON document."""
    parser = argparse.ArgumentParser(prog="tests.bench", description=__doc__)
    parser.add_argument("which", nargs="*", choices=[*ALL, []], default=[])
    which = parser.parse_args().which or ALL
    results = {}
    if "operator" in which:
        results["operator"] = operator.bench()
    if "loop" in which:
        results["loop"] = loop.bench()
    if "queueing" in which:
        results["queueing"] = queueing.bench()
    if "inventory" in which:
        results["inventory"] = inventory.bench()
    if "kueue" in which:  # a tenth: all of it takes a quarter of an hour on two cores (python -m tests.bench.kueue_workload baseline)
        results["kueue"] = {"operator": kueue_workload.bench(0.1), "kueue": kueue.bench(0.1)}
    if "status-write" in which:
        results["status-write"] = status_write.bench()
    if "prepare" in which:
        results["prepare"] = prepare.bench()
    if "trainer" in which:
        results["trainer"] = trainer.bench()
    if "evaluation" in which:
        results["evaluation"] = evaluation.bench()
    if "faults" in which:
        results["faults"] = faults.bench()
    if "gateway" in which:
        results["gateway"] = gateway.bench()
    if "engine" in which:
        results["engine"] = engine.bench()
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
