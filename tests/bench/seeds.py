"""`make seeds`: the quickstart's result with several seeds, as the table of docs/evaluation.md with its spread.

    python -m tests.bench.seeds [--seeds 1 2 3] [--folder FOLDER] [--gpus N]

Each seed fills the training situations in otherwise, and draws another adapter and another order; the held-out rows are the same.
The stages run as `finetune run --local` runs them, on the model and with the settings of examples/quickstart.yaml. A seed whose
result lies in the folder is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from finetune_api.validation import parse_job
from finetune_cli.local import LocalRun, job_file
from tests.cluster.quickstart import EXAMPLES, JOB, model

ARMS = {"Base": "base", "Instructed": "base, told the task", "FewShot": "base, {shots} examples", "Tuned": "tuned"}
_COSTS = {"promptTokens": "tokens sent", "answerTokens": "tokens answered", "latencySeconds": "seconds of a request"}


def run(seed: int, folder: Path, gpus: int) -> dict[str, Any]:
    """One seed: the evaluation as the status has it, and what it took."""
    told = folder / f"seed-{seed}.json"
    if told.exists():
        return json.loads(told.read_text())
    data = folder / f"data-{seed}"
    data.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, EXAMPLES / "data" / "support_tickets.py", data, "--seed", str(seed)], check=True)
    document = yaml.safe_load((EXAMPLES / "quickstart.yaml").read_text())
    document["spec"]["tuning"]["hyperparameters"]["seed"] = seed
    if gpus:
        document["spec"]["distribution"] = {"gpusPerNode": gpus}
    document["spec"]["evaluation"]["gate"]["onInconclusive"] = "publish"  # what it says is wanted, whatever it is
    metadata, spec = parse_job(document)
    base = model("smollm2.py", "SmolLM2-135M-Instruct")
    volumes = {"models": str(base.parent), JOB: str(data), "published": str(folder / f"published-{seed}")}
    began = time.monotonic()
    local = LocalRun(job_file(metadata, spec, volumes), folder / f"workspace-{seed}")
    local.run()
    status = local.read()
    if status.evaluation is None:
        sys.exit(f"seed {seed}: {status.conditions[-1].reason}: {status.conditions[-1].message}")
    found = {"seed": seed, "seconds": round(time.monotonic() - began), "evaluation": status.evaluation.to_wire()}
    told.write_text(json.dumps(found, indent=1))
    return found


def _spread(numbers: list[float]) -> str:
    """The mean, and from where to where."""
    if max(numbers) - min(numbers) < 1e-9:
        return f"{numbers[0]:.3g}"
    return f"{mean(numbers):.3g} ({min(numbers):.3g} to {max(numbers):.3g})"


def table(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: every metric and cost by arm, the mean over the seeds with its spread; then each seed's verdict."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for one in runs:
        for arm in one["evaluation"]["arms"]:
            arms.setdefault(arm["name"], []).append(arm)
    shown = [name for name in ARMS if name in arms]
    titles = [ARMS[name].format(shots=arms[name][0].get("shots", 0)) for name in shown]
    yield "| | " + " | ".join(titles) + " |"
    yield "|---" * (len(shown) + 1) + "|"
    metrics = list(dict.fromkeys(metric for name in shown for arm in arms[name] for metric in arm["metrics"]))
    numbers = {
        metric: {name: [float(a["metrics"][metric]) for a in arms[name] if metric in a["metrics"]] for name in shown} for metric in metrics
    }
    numbers |= {title: {name: [float(a[key]) for a in arms[name] if key in a] for name in shown} for key, title in _COSTS.items()}
    for title, found in numbers.items():
        if any(found.values()):
            yield f"| {title} | " + " | ".join(_spread(found[name]) if found[name] else "" for name in shown) + " |"
    yield ""
    for one in runs:
        told = one["evaluation"]
        low, high = (float(edge) for edge in told["interval"])
        over = titles[shown.index(told["comparedWith"])]
        gain = f"{float(told['improvement']):.3g}, between {low:.3g} and {high:.3g}"
        yield f"- seed {one['seed']}: gate {told['gate']}; improvement over {over} {gain}; {told['examples']} held-out rows; {one['seconds']} s"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="tests.bench.seeds", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, help="where data, workspaces and results stay; else a new one below /tmp")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of one node, in place of the quickstart's two processes on CPU")
    arguments = parser.parse_args()
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="finetune-seeds-"))).resolve()
    print(f"in {folder}", file=sys.stderr)
    print("\n".join(table([run(seed, folder, arguments.gpus) for seed in arguments.seeds])))


if __name__ == "__main__":
    main()
