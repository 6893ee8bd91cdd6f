"""evaluate with four arms beside the same with two (the base as it is, and the tuned model), on SmolLM2-135M-Instruct.

The measuring alone is timed, without loading, in seconds of the processor: whatever else the machine does is not counted. The rows are
support tickets with an instruction; the base also gets eight examples. The two take turns in one process, and the quickest of each
counts.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.cluster.quickstart import model
from tests.cluster.shell import REPO
from tests.trainer.conftest import Bench

TURNS, ROWS = 2, 16
MOST_TIMES = 2.2
"""Four arms may cost so many times what two cost."""
_TUNING = {"lora": {"rank": 8, "dropout": 0}, "hyperparameters": {"maxSteps": 1, "globalBatchSize": 1, "maxLength": 128}}
_INSTRUCTION = "Sort the support ticket. Answer with the team and the priority, as in: shipping / normal"
_TWO: dict[str, Any] = {"metrics": ["loss", "exact-match"], "maxNewTokens": 12, "maxExamples": ROWS, "baseline": {"fewShot": 0}}
_FOUR: dict[str, Any] = {**_TWO, "baseline": {"fewShot": 8, "systemPrompt": _INSTRUCTION}}


def _seconds(bench: Bench, evaluation: dict[str, Any]) -> tuple[float, list[dict[str, Any]]]:
    """(seconds that all arms took to measure, the arms)."""
    from finetune_trainer.stages import evaluate as stage
    from finetune_trainer.stages.prepare import prepare

    context = bench.context(None, tuning=_TUNING, evaluation=evaluation)
    prepare(context)
    spent, measure = 0.0, stage.measure

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        began = time.process_time()
        try:
            return measure(*args, **kwargs)
        finally:
            spent += time.process_time() - began

    stage.measure = timed
    try:
        arms = stage.evaluate(context).result["arms"]
    finally:
        stage.measure = measure
    return spent, arms


def bench() -> dict[str, Any]:
    """Seconds of both, and how many times two arms' four cost."""
    rows = [json.loads(line) for line in (REPO / "examples" / "data" / "support-tickets.jsonl").read_text().splitlines()]
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), model("smollm2.py", "SmolLM2-135M-Instruct"))
        bench.train(bench.context(rows, tuning=_TUNING))
        runs = [(_seconds(bench, _TWO), _seconds(bench, _FOUR)) for _ in range(TURNS)]
    two, four = (min(run[i][0] for run in runs) for i in (0, 1))
    times = four / two
    return {"two": round(two, 2), "four": round(four, 2), "times": round(times, 2), "held": times <= MOST_TIMES, "arms": runs[0][1][1]}


if __name__ == "__main__":
    print(json.dumps(bench(), indent=1))
