"""The stages in one process over the tiny model: really prepared, really trained, really evaluated."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.contract import JobFile, StageResult
from finetune_api.status import Plan
from finetune_api.validation import parse_spec
from finetune_trainer.job.context import Context
from tests.cluster.shell import REPO

COLOURS: list[tuple[str, str]] = [
    (q["content"], a["content"])
    for q, a in (json.loads(line)["messages"] for line in (REPO / "examples" / "data" / "colours.jsonl").read_text().splitlines())
]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def wrong(answer: str) -> str:
    """A worse answer: it says everything twice."""
    return f"{answer} {answer}"


ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [chat(q, a) for q, a in COLOURS],
    "text": [{"text": f"{q} {a}"} for q, a in COLOURS],
    "preference": [{"prompt": q, "chosen": a, "rejected": wrong(a)} for q, a in COLOURS],
    "unpaired-preference": [
        row
        for q, a in COLOURS
        for row in ({"prompt": q, "completion": a, "label": True}, {"prompt": q, "completion": wrong(a), "label": False})
    ],
    "prompt-only": [{"prompt": q} for q, _ in COLOURS],
}


class Bench:
    """Runs jobs in a folder."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.data = folder / "rows"
        self.data.mkdir()

    def context(self, rows: list[dict[str, Any]] | None = None, *, name: str = "job", **spec: Any) -> Context:
        """A job over these rows; blocks of the spec replace the defaults."""
        if rows is not None:
            (self.data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        document = {
            "model": {"uri": f"pvc://models/{self.model.name}"},
            "dataset": {"train": {"uri": "pvc://rows/train.jsonl"}, "eval": {"splitFraction": 0.25}, "checks": {"minExamples": 1}},
            "distribution": {"gpusPerNode": 0},
            **copy.deepcopy(spec),
        }
        uid = f"{abs(hash(name)):08x}"[:8]
        sources = {"pvc://models": str(self.model.parent), "pvc://rows": str(self.data), "pvc://published": str(self.folder / "published")}
        targets = {"pvc://published": str(self.folder / "published")}
        job = JobFile(name=name, namespace="n", uid=uid, spec=parse_spec(document), sources=sources, targets=targets)
        return Context(job, str(self.folder / f"workspace-{name}"))

    def train(self, context: Context) -> StageResult:
        """prepare and train."""
        from finetune_trainer.stages.prepare import prepare
        from finetune_trainer.stages.worker import fit

        plan = Plan.model_validate(prepare(context).result["plan"])
        result = fit(context, plan)
        assert result is not None
        return result

    def run(self, rows: list[dict[str, Any]] | None = None, **spec: Any) -> tuple[dict[str, float], dict[str, float], Context]:
        """All of it: (metrics of the base, metrics of the tuned model, the job)."""
        from finetune_trainer.stages.evaluate import evaluate

        context = self.context(rows, **spec)
        self.train(context)
        base, tuned = metrics_of(evaluate(context), "Base", "Tuned")
        return base, tuned, context


def metrics_of(result: StageResult, *arms: str) -> list[dict[str, float]]:
    """The metrics of some arms of an evaluation."""
    found = {arm["name"]: arm["metrics"] for arm in result.result["arms"]}
    return [found[name] for name in arms]


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path) -> Bench:
    return Bench(tmp_path, tiny_model)


def history(context: Context) -> list[dict[str, Any]]:
    """The logged steps."""
    return [json.loads(line) for line in Path(context.layout.history).read_text().splitlines()]
