"""The quickstart's rows are honest: the task stands in them, and what is held out is no training situation filled in anew."""

from __future__ import annotations

import importlib.util
import json
import re
import string
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.bench import seeds

REPO = Path(__file__).parents[2]
DATA = REPO / "examples" / "data"
LEAST_PROMPTS = 33
"""Held-out prompts that the gate needs at the strictest confidence of its table (docs/evaluation.md)."""


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support_tickets", DATA / "support_tickets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


TRAINING, HELD_OUT = read("support-tickets"), read("support-tickets-held-out")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def grams(text: str, size: int = 3) -> set[tuple[str, ...]]:
    """All runs of so many words."""
    found = words(text)
    return {tuple(found[i : i + size]) for i in range(len(found) - size + 1)}


def likeness(one: str, other: str) -> float:
    """Share of word triples that two texts have in common (Jaccard), as the product's own check counts."""
    mine, theirs = grams(one), grams(other)
    return len(mine & theirs) / max(1, len(mine | theirs))


def test_the_files_are_what_the_generator_makes(generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["support_tickets.py", str(tmp_path)])
    generator.main()
    for path in tmp_path.iterdir():
        assert path.read_text() == (DATA / path.name).read_text(), f"{path.name}: run examples/data/support_tickets.py examples/data"
    monkeypatch.setattr("sys.argv", ["support_tickets.py", str(tmp_path), "--seed", "1"])
    generator.main()
    others = (tmp_path / "support-tickets.jsonl").read_text()
    assert others != (DATA / "support-tickets.jsonl").read_text(), "filled in otherwise"
    assert (tmp_path / "support-tickets-held-out.jsonl").read_text() == (DATA / "support-tickets-held-out.jsonl").read_text()


def test_the_task_stands_in_every_row(generator: ModuleType) -> None:
    for row in [*TRAINING, *HELD_OUT]:
        assert [turn["role"] for turn in row] == ["system", "user", "assistant"]
        assert row[0]["content"] == generator.SYSTEM
        category, _, priority = row[2]["content"].partition(" / ")
        assert category in generator.SYSTEM and priority in generator.SYSTEM, "a reader of the system text can answer"


def test_no_answer_can_be_guessed_from_how_often_it_is_right() -> None:
    labels = [Counter(row[2]["content"] for row in rows) for rows in (TRAINING, HELD_OUT)]
    assert labels[0].keys() == labels[1].keys() and len(labels[0]) == 13
    for counts in labels:
        assert max(counts.values()) <= 0.15 * sum(counts.values()), counts


def test_there_are_enough_held_out_prompts_for_the_gate() -> None:
    assert len({row[1]["content"] for row in HELD_OUT}) == len(HELD_OUT) >= LEAST_PROMPTS


def test_no_held_out_row_is_a_training_situation_filled_in_anew(generator: ModuleType) -> None:
    """Compared with the situations, their places left out: neither a share of their word triples, nor five words in a row, is met again."""
    situations = [string.Formatter().parse(text) for texts in generator.TRAINING.values() for text in texts]
    known = [" ".join(part[0] for part in parts) for parts in situations]
    trained = [row[1]["content"] for row in TRAINING]
    runs = set().union(*(grams(text, 5) for text in trained))
    for ticket in (row[1]["content"] for row in HELD_OUT):
        assert max(likeness(ticket, other) for other in [*trained, *known]) < 0.25, ticket
        assert not grams(ticket, 5) & runs, ticket


def test_a_refilled_row_would_be_found(generator: ModuleType) -> None:
    """The check above can fail: the split of the rows that stood here before, one filling for training and one held out."""
    first, second = ({row["messages"][1]["content"] for row in generator.training_rows(seed)} for seed in (0, 1))
    closest = [max(likeness(a, b) for b in second) for a in first]
    assert sum(share >= 0.25 for share in closest) > 0.9 * len(closest)


def test_the_quickstart_uses_them() -> None:
    spec: dict[str, Any] = yaml.safe_load((REPO / "examples" / "quickstart.yaml").read_text())["spec"]
    dataset = spec["dataset"]
    assert dataset["train"]["uri"].endswith("/support-tickets.jsonl") and dataset["eval"] == {
        "uri": "configmap://support-tickets/support-tickets-held-out.jsonl"
    }
    assert dataset["checks"] == {"leakage": "fail", "nearLeakage": "fail"}, "the product looks at it, too"
    texts = [path.read_text() for path in (REPO / "tests" / "cluster" / "quickstart.py", REPO / "docs" / "first-job.md")]
    assert all("held-out" in text for text in texts), "both files come into the ConfigMap"
    assert sum(len(path.read_bytes()) for path in DATA.glob("support-tickets*.jsonl")) < 1 << 20
    assert all(a != b for a, b in pairwise(sorted(row[1]["content"] for row in TRAINING))), "no row twice"


def test_the_table_of_several_seeds() -> None:
    def one(seed: int, tuned: float) -> dict[str, Any]:
        arms = [
            {"name": "Base", "metrics": {"loss": "11.25", "exact-match": "0"}, "promptTokens": "40"},
            {"name": "FewShot", "shots": 8, "metrics": {"loss": "1.01", "exact-match": "0.25"}, "promptTokens": "600"},
            {"name": "Tuned", "metrics": {"loss": str(tuned), "exact-match": "0.7"}, "promptTokens": "90"},
        ]
        told = {"arms": arms, "gate": "Passed", "comparedWith": "FewShot", "improvement": "0.6", "interval": ["0.5", "0.7"], "examples": 60}
        return {"seed": seed, "seconds": 300, "evaluation": told}

    assert list(seeds.table([one(1, 0.4), one(2, 0.5)])) == [
        "| | base | base, 8 examples | tuned |",
        "|---|---|---|---|",
        "| loss | 11.2 | 1.01 | 0.45 (0.4 to 0.5) |",
        "| exact-match | 0 | 0.25 | 0.7 |",
        "| tokens sent | 40 | 600 | 90 |",
        "",
        "- seed 1: gate Passed; improvement over base, 8 examples 0.6, between 0.5 and 0.7; 60 held-out rows; 300 s",
        "- seed 2: gate Passed; improvement over base, 8 examples 0.6, between 0.5 and 0.7; 60 held-out rows; 300 s",
    ]
