"""Rows of files: nulls of Arrow, JSON by the line, what stands twice; and how rows are told to people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_trainer.data import reading
from finetune_trainer.data.formats import RowReader
from finetune_trainer.data.nulls import filled_in
from finetune_trainer.data.problems import Files, Keys, Problems
from finetune_trainer.process.errors import UserError
from tests.unit.test_prepare import Desk, desk, lines, rows
from tests.unit.test_rows import ASK, CALL, RESULT, TOOL, YES, read, turn

__all__ = ["desk"]


def parquet(path: Path, items: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(items), path)
    return path


def test_a_teacher_behind_an_endpoint_is_asked_with_the_tools(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.training import teacher

    asked: list[tuple[Any, Any]] = []

    def complete(_: Any, messages: Any, *, tools: Any, **__: Any) -> str:
        asked.append((messages, tools))
        return "yes"

    monkeypatch.setattr(teacher, "complete", complete)
    distillation = {"mode": "generate", "endpoint": {"url": "http://teacher.example/v1", "model": "big"}}
    context = desk.context(b"", tuning={"objective": "distill", "distillation": distillation})
    turns = [ASK, turn("assistant", None, tool_calls=[{**CALL, "id": "c0"}], weight=0), {**RESULT, "tool_call_id": "c0"}, YES]
    items = [reading.Row(1, {"messages": turns, "tools": [TOOL]})]
    assert list(teacher.write_answers(context, None, items, RowReader("messages", {})).values()) == ["yes"]  # type: ignore[arg-type]
    ((messages, tools),) = asked
    called = {"id": "c0", "type": "function", "function": {"name": "paint", "arguments": '{"colour": "red"}'}}
    assert tools == [TOOL] and messages == [ASK, turn("assistant", None, tool_calls=[called]), turns[2]]


def test_nulls_that_arrow_invented_are_removed(tmp_path: Path) -> None:
    """A struct column has every field that any row has."""
    other = {"type": "function", "function": {"name": "move", "arguments": {"by": 3}}}
    items = [
        {
            "messages": [ASK, turn("assistant", None, tool_calls=[{**CALL, "id": "c0"}]), {**RESULT, "tool_call_id": "c0"}, YES],
            "note": None,
        },
        {"messages": [ASK, turn("assistant", None, tool_calls=[other]), RESULT, YES], "note": "n"},
    ]
    found = [RowReader("messages", {}).read(row.value or {}) for row in reading.file_rows(parquet(tmp_path / "a.parquet", items))]
    assert [shape for shape, _ in found] == [{"messages": item["messages"]} for item in items]
    assert [unused for _, unused in found] == [set(), {"note"}]


def _calls(*functions: tuple[str, dict[str, Any]], tools: Any = None) -> dict[str, Any]:
    calls = [{"function": {"name": name, "arguments": arguments}} for name, arguments in functions]
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": calls}], "tools": tools}


def test_nulls_that_arrow_invented_in_a_file_of_json() -> None:
    """datasets' to_json writes the fields of all calls into each."""
    paint, add = ("paint", {"colour": "red", "a": None}), ("add", {"colour": None, "a": 1})
    definition = {"name": "paint", "parameters": {"properties": {"colour": {"type": "string"}, "a": None}}}
    for found in (
        [_calls(paint), _calls(add)],
        [_calls(paint, add)],
        [_calls(paint, tools=[definition])],
        [_calls(paint, tools=json.dumps([{"type": "function", "function": definition}]))],
    ):
        assert filled_in(found), found
    own = {"name": "paint", "parameters": {"properties": {"colour": {}, "a": {}}}}
    for found in (
        [_calls(paint, tools=[own])],
        [_calls(paint)],
        [_calls(paint), _calls(("add", {"a": 1}))],
        [_calls(("paint", {"colour": "red"}), ("add", {"colour": "red"}))],
        [_calls(paint, ("add", {"colour": "red", "a": None}), tools=[own, {**own, "name": "add"}])],
        [{"messages": "text", "tools": "text"}, {"messages": [None, {"tool_calls": [5, {"function": 5}], "function_call": "f"}]}],
    ):
        assert not filled_in(found), found
    shape, _ = RowReader("messages", {}, filled=True).read(_calls(paint))
    assert shape["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"colour": "red"}


def test_values_of_arrow_that_are_no_json(tmp_path: Path) -> None:
    import datetime
    import decimal

    items = [{"prompt": "when", "completion": "b", "at": datetime.date(2026, 1, 2), "n": decimal.Decimal("1.5"), "raw": b"\xff"}]
    value = next(iter(reading.file_rows(parquet(tmp_path / "a.parquet", items)))).value
    assert value == {"prompt": "when", "completion": "b", "at": "2026-01-02", "n": "1.5", "raw": b"\xff"}
    assert read("prompt-completion", value) == ({"prompt": "when", "completion": "b"}, {"at", "n", "raw"})


def test_a_json_list_in_a_jsonl_file(desk: Desk) -> None:
    for document in (json.dumps(rows(9)), json.dumps(rows(9), indent=1), json.dumps({"data": rows(9)}, indent=1)):
        with pytest.raises(
            UserError, match=r"train row 1 \(train.jsonl:1\): .*one JSON document, and not one object a line, rename it to .json"
        ):
            desk.run(document.encode())


@pytest.mark.parametrize("blank", [b"", b"\n  \n"])
def test_a_json_file_with_one_object_a_line(tmp_path: Path, blank: bytes) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(lines(rows(1)) + blank + lines(rows(3)[1:]))
    found = [row.parsed() for row in reading.file_rows(path)]
    assert [row.value for row in found] == rows(3)
    assert [row.number for row in found] == ([1, 2, 3] if not blank else [1, 4, 5])
    path.write_text(json.dumps(rows(3), indent=1))
    assert [row.value for row in reading.file_rows(path)] == rows(3)
    path.write_text("".join(json.dumps(row, indent=1) + "\n" for row in rows(2)))
    with pytest.raises(UserError, match="one object a line, rename it to .jsonl"):
        list(reading.file_rows(path))


def test_what_stands_twice_is_refused(tmp_path: Path) -> None:
    """A reader that keeps the last of two would lose the first in silence."""
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a", "prompt": "b"}\n' + lines([{"prompt": "c"}]))
    first, second = (row.parsed() for row in reading.file_rows(tmp_path / "a.jsonl"))
    assert "key 'prompt' stands twice in one object" in first.problem and second.value == {"prompt": "c"}
    (tmp_path / "a.json").write_text('[{"prompt": "a", "prompt": "b"}]')
    (tmp_path / "a.csv").write_text("prompt,prompt\na,b\n")
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), tmp_path / "a.parquet")
    for name in ("a.json", "a.csv", "a.parquet"):
        with pytest.raises(UserError, match="'prompt' stands twice"):
            list(reading.file_rows(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.csv", b"prompt;completion\na;b\n", "'prompt;completion' are separated by ';'; write it with commas"),
        ("a.csv", b"prompt\tcompletion\na\tb\n", "are separated by"),
        ("a.json", b'{"train": [{}], "test": [{}]}', "an object with 'train', 'test'; use .jsonl"),
    ],
)
def test_files_that_are_told_how_to_be_written(tmp_path: Path, name: str, data: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=told):
        list(reading.file_rows(tmp_path / name))


def test_lines_of_csv_are_lines_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"a\nb",c\nd\n')
    assert [(row.number, bool(row.problem)) for row in reading.file_rows(path)] == [(2, False), (4, True)]


def test_a_row_is_told_by_file_and_line() -> None:
    files = Files()
    assert files.place(3) == "row 3"
    files.begin("a.jsonl", 0, by_line=True)
    files.begin("b.jsonl", 4, by_line=True)
    assert [files.place(n) for n in (1, 4, 5)] == ["row 1 (a.jsonl:1)", "row 4 (a.jsonl:4)", "row 5 (b.jsonl:1)"]
    files = Files()
    files.begin("a.parquet", 0, by_line=False)
    assert files.place(2) == "row 2 (a.parquet row 2)"


def test_a_cause_is_told_once_with_its_first_ten_places() -> None:
    problems = Problems()
    for index in range(12):
        problems.add("invalid", f"train row {index}", f"messages[{index % 3}].content is empty" if index % 2 else "role is missing")
    text = problems.describe("invalid")
    assert text.startswith("12 row(s): train row 0: role is missing; the same in train row 2, train row 4")
    assert text.count("role is missing") == 1 and "messages[1].content is empty" in text
    for index in range(200):
        problems.add("many", f"row {index}", f"cause {'x' * index}")
    assert len(problems.causes["many"]) == 50 and problems.counts["many"] == 200 and "of other causes" in problems.describe("many")
    assert problems.wire()["many"]["rows"] == 200  # type: ignore[index]


def test_names_of_keys_are_bounded() -> None:
    keys = Keys()
    for index in range(3000):
        keys.add((f"key{index}", "id"))
    assert list(keys.all().items())[:2] == [("id", 3000), ("(other keys)", 2001)] and len(keys.all()) == 1001
    assert list(keys.brief())[:2] == ["id", "(other keys)"] and len(json.dumps(keys.brief())) <= 700
    keys = Keys()
    keys.add(("\x1b[31mred",))
    assert keys.all() == {"?[31mred": 1}
