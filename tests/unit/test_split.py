"""Which rows are held out: whole prompts or groups, whatever their answers and their order; and what counts as leakage."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_trainer.process.errors import UserError
from tests.unit.test_prepare import Desk, chat, desk, lines, rows_of

__all__ = ["desk"]


def prompts(path: str) -> list[str]:
    """What stands before the first answer of each row."""
    found = []
    for row in map(json.loads, rows_of(path)):
        turns = row["messages"] if "messages" in row else row["prompt"]
        found.append(turns if isinstance(turns, str) else json.dumps([t for t in turns if t["role"] != "assistant"][:1]))
    return found


def sides(desk: Desk, items: list[dict[str, Any]], fraction: float = 0.2, **dataset: Any) -> tuple[list[str], list[str]]:
    layout = desk.context(lines(items)).layout
    held_out = {"splitFraction": fraction, **dataset.pop("eval", {})}
    desk.run(None, dataset={"eval": held_out, "checks": {"minExamples": 1, "nearDuplicates": "ignore", "nearLeakage": "ignore"}, **dataset})
    return prompts(layout.train_rows), prompts(layout.eval_rows)


KINDS: dict[str, Any] = {
    "several answers": [chat(f"what is {i}", answer) for i in range(30) for answer in ("yes", "no", "a cat")],
    "conversations that go on": [
        {"messages": [*chat(f"what is {i}")["messages"], *(turn for k in range(n) for turn in chat(f"and {k}", f"no {n}")["messages"])]}
        for i in range(30)
        for n in (0, 1, 2)
    ],
    "text": [{"prompt": f"what is {i}:", "completion": answer} for i in range(30) for answer in ("yes", "no")],
    "rejected answers": [{"prompt": f"what is {i}", "chosen": good, "rejected": "cat"} for i in range(30) for good in ("yes", "no")],
    "labelled answers": [
        {"prompt": f"what is {i}", "completion": answer, "label": answer == "yes"} for i in range(30) for answer in ("yes", "no")
    ],
}
OBJECTIVES = {"rejected answers": "dpo", "labelled answers": "kto"}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_prompt_fall_on_one_side(desk: Desk, kind: str) -> None:
    layout, items = desk.context(lines(KINDS[kind])).layout, KINDS[kind]
    checks = {"minExamples": 1, "nearDuplicates": "ignore", "nearLeakage": "ignore"}
    tuning = {"objective": OBJECTIVES.get(kind, "sft")}
    desk.run(None, dataset={"eval": {"splitFraction": 0.2}, "checks": checks}, tuning=tuning)
    train, held_out = prompts(layout.train_rows), prompts(layout.eval_rows)
    assert len(train) + len(held_out) == len(items) and not set(train) & set(held_out)
    assert len(held_out) == pytest.approx(0.2 * len(items), abs=2), "as near to the fraction as whole prompts allow"


def test_a_prompt_with_very_many_answers_stays_in_training(desk: Desk) -> None:
    items = [chat("what is a cat", f"no {i}") for i in range(60)] + [chat(f"what is {i}") for i in range(60)]
    train, held_out = sides(desk, items, 0.1)
    assert len(held_out) == 12 and len(set(held_out)) == 12
    assert len(train) == 108


def test_few_large_prompts_still_leave_one_held_out(desk: Desk) -> None:
    _, held_out = sides(desk, [chat(f"what is {i}", f"no {k}") for i in range(3) for k in range(20)], 0.1)
    assert len(held_out) == 20 and len(set(held_out)) == 1


def test_one_prompt_alone_cannot_be_split(desk: Desk) -> None:
    with pytest.raises(UserError, match=r"all rows have one prompt, so none can be held out; name another column in dataset.eval.groupBy"):
        sides(desk, [chat("what is a cat", f"no {i}") for i in range(30)])


def test_rows_of_one_group_fall_on_one_side(desk: Desk) -> None:
    items = [{**chat(f"what is {i}"), "customer": i % 20} for i in range(100)]
    layout = desk.context(lines(items)).layout
    sides(desk, items, eval={"groupBy": "customer"})
    place = {json.dumps(chat(f"what is {i}")): i % 20 for i in range(100)}
    held_out = {place[row] for row in rows_of(layout.eval_rows)}
    assert len(held_out) == 4 and not held_out & {place[row] for row in rows_of(layout.train_rows)}


def test_a_row_without_its_group_is_refused_by_number(desk: Desk) -> None:
    items = [{**chat(f"what is {i}"), **({} if i == 6 else {"customer": i})} for i in range(20)]
    with pytest.raises(UserError, match=r"train row 7 .*: there is no 'customer', the column that dataset.eval.groupBy names"):
        sides(desk, items, eval={"groupBy": "customer"})


@pytest.mark.parametrize(("policy", "left"), [("fail", None), ("drop", 18), ("ignore", 20)])
def test_a_held_out_prompt_with_another_answer_is_a_leak(desk: Desk, policy: str, left: int | None) -> None:
    (desk.folder / "rows" / "eval.jsonl").write_bytes(lines([chat("what is 3", "another"), chat("what is 99")]))
    train = [chat(f"what is {i % 10}", f"yes {i}") for i in range(20)]
    dataset = {"eval": {"uri": "pvc://rows/eval.jsonl"}, "checks": {"minExamples": 1, "leakage": policy, "nearLeakage": "ignore"}}
    if left is None:
        with pytest.raises(UserError, match=r"2 row\(s\): train row 4 .*: has the prompt of eval row 1 .*train row 14"):
            desk.run(lines(train), dataset=dataset)
        return
    assert desk.run(lines(train), dataset=dataset).result["dataset"]["train"] == left


def test_a_held_out_group_is_a_leak(desk: Desk) -> None:
    (desk.folder / "rows" / "eval.jsonl").write_bytes(lines([{**chat("what is 99"), "customer": "a"}]))
    train = [{**chat(f"what is {i}"), "customer": "ab"[i % 2]} for i in range(6)]
    dataset = {"eval": {"uri": "pvc://rows/eval.jsonl", "groupBy": "customer"}}
    with pytest.raises(UserError, match=r"3 row\(s\): train row 1 .*: is of one group with eval row 1"):
        desk.run(lines(train), dataset=dataset)


def test_a_near_leak_names_the_held_out_row_where_it_was_read(desk: Desk) -> None:
    """A row that was split off stands in the training file, under its own number."""
    words = " ".join(f"word{i}" for i in range(40))
    items = [chat(f"{words} what is {i}") for i in range(20)]
    dataset = {"eval": {"splitFraction": 0.2}, "checks": {"minExamples": 1, "nearDuplicates": "ignore", "nearLeakage": "fail"}}
    with pytest.raises(UserError, match=r"train row \d+ \(train.jsonl:\d+\): is nearly the held-out train row \d+ \(train.jsonl:\d+\)"):
        desk.run(lines(items), dataset=dataset)
