"""Common families, each as a tiny model of its own class: rows with system text, turns, reasoning and tools are prepared and trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_trainer.data.store import read_rows
from tests.families import FAMILIES, make
from tests.trainer.conftest import Bench, history
from tests.unit.test_families import LEARNED, PER_ANSWER, ROWS


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains(name: str, bench: Bench, tmp_path: Path) -> None:
    family = FAMILIES[name]
    bench.model = make(family, tmp_path / "models" / "base")
    rows = [row for kind, row in ROWS.items() if not isinstance(LEARNED[name][kind], str)]
    context = bench.context(
        rows * 2,
        dataset={"train": {"uri": "pvc://rows/train.jsonl"}, "checks": {"minExamples": 1, "duplicates": "keep"}},
        tuning={
            "lora": {"rank": 4, "alpha": 8, **family.lora},
            "hyperparameters": {"maxLength": 2000, "maxSteps": 3, "globalBatchSize": 2, "learningRate": 0.01},
        },
    )
    assert bench.train(context).result["steps"] == 3
    losses = [entry["loss"] for entry in history(context) if "loss" in entry]
    assert losses and all(0 < loss < 20 for loss in losses)
    prepared = read_rows(context.layout.train_rows, ("row", "labels"), 100)
    assert len(prepared) == (len(rows) + (name in PER_ANSWER)) * 2 and all(
        any(label != -100 for label in row["labels"]) for row in prepared
    )
    output = Path(context.layout.output)
    assert json.loads((output / "tokenizer_config.json").read_text())["eos_token"] == family.end
    stops = json.loads((output / "generation_config.json").read_text())["eos_token_id"]
    from transformers import AutoTokenizer

    assert (stops if isinstance(stops, int) else stops[0]) == AutoTokenizer.from_pretrained(output).convert_tokens_to_ids(family.end)
