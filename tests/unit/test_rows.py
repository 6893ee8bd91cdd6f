"""What a row says is read whole, or refused, or reported: the forms that rows have in the field."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_api.status import DatasetStatus
from finetune_trainer.data.formats import FORMATS, RowReader, detect, looks_like, rename, usual_names
from finetune_trainer.data.shape import BadRow, all_strings, dumps, strings
from finetune_trainer.data.tokens import IGNORED
from finetune_trainer.process.errors import UserError
from tests.unit.test_prepare import Desk, chat, desk, lines, rows, rows_of

__all__ = ["desk"]

TOOL = {"type": "function", "function": {"name": "paint", "parameters": {"type": "object", "properties": {"colour": {"type": "string"}}}}}
CALL = {"type": "function", "function": {"name": "paint", "arguments": {"colour": "red"}}}
ASK, YES = {"role": "user", "content": "paint red"}, {"role": "assistant", "content": "yes"}
RESULT = {"role": "tool", "content": "done"}


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def read(format_: str, row: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    return RowReader(format_, {}).read(row)


READ: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("a number as alpaca's input", "alpaca", {"instruction": "what is", "input": 21, "output": "two"}, chat("what is\n\n21", "two")),
    ("a number as an answer", "prompt-completion", {"prompt": "one and one", "completion": 2}, {"prompt": "one and one", "completion": "2"}),
    ("pandas' nothing", "alpaca", {"instruction": "what", "input": float("nan"), "output": "two"}, chat("what", "two")),
    ("alpaca's history", "alpaca", {"instruction": "and two?", "output": "b", "history": [["one?", "a"]]}, {"messages": [*chat("one?", "a")["messages"], *chat("and two?", "b")["messages"]]}),
    (
        "a system text beside a pair",
        "preference",
        {"system": "be nice", "prompt": "what", "chosen": "good", "rejected": "bad"},
        {"prompt": [turn("system", "be nice"), turn("user", "what")], "chosen": [turn("assistant", "good")], "rejected": [turn("assistant", "bad")]},
    ),
    ("a system text beside a prompt", "prompt-completion", {"system": "be nice", "prompt": "a", "completion": "b"}, {"messages": [turn("system", "be nice"), *chat("a", "b")["messages"]]}),
    ("an empty system text makes a conversation, too", "prompt-completion", {"system": "", "prompt": "a", "completion": "b"}, chat("a", "b")),
    ("a system text beside messages", "messages", {"system": "be nice", **chat("a", "b")}, {"messages": [turn("system", "be nice"), *chat("a", "b")["messages"]]}),
    (
        "tools beside ShareGPT, as text",
        "sharegpt",
        {"conversations": [{"from": "human", "value": "paint red"}, {"from": "gpt", "value": "yes"}], "tools": json.dumps([TOOL])},
        {"messages": [ASK, YES], "tools": [TOOL]},
    ),
    ("tools without their cover", "messages", {"messages": [ASK, YES], "tools": [TOOL["function"]]}, {"messages": [ASK, YES], "tools": [TOOL]}),
    (
        "ShareGPT's calls",
        "sharegpt",
        {"conversations": [{"from": "human", "value": "paint red"}, {"from": "function_call", "value": '{"name": "paint", "arguments": {"colour": "red"}}'}, {"from": "observation", "value": "done"}, {"from": "gpt", "value": "yes"}]},
        {"messages": [ASK, turn("assistant", None, tool_calls=[CALL]), RESULT, YES]},
    ),
    ("the older spelling of a call", "messages", {"messages": [ASK, turn("assistant", None, function_call={"name": "paint", "arguments": '{"colour": "red"}'}), turn("function", "done", name="paint"), YES]}, {"messages": [ASK, turn("assistant", None, tool_calls=[CALL]), {**RESULT, "name": "paint"}, YES]}),
    ("the older spelling of tools", "messages", {"messages": [ASK, YES], "functions": [TOOL["function"]]}, {"messages": [ASK, YES], "tools": [TOOL]}),
    ("history as text", "alpaca", {"instruction": "and two?", "output": "b", "history": '[["one?", "a"]]'}, {"messages": [*chat("one?", "a")["messages"], *chat("and two?", "b")["messages"]]}),
    ("tools as texts in a list", "messages", {"messages": [ASK, YES], "tools": [json.dumps(TOOL)]}, {"messages": [ASK, YES], "tools": [TOOL]}),
    ("a schema as text", "messages", {"messages": [ASK, YES], "tools": [{**TOOL["function"], "parameters": json.dumps(TOOL["function"]["parameters"])}]}, {"messages": [ASK, YES], "tools": [TOOL]}),
    (
        "Hermes' calls, which are text",
        "sharegpt",
        {"conversations": [{"from": "human", "value": "paint red"}, {"from": "gpt", "value": "<tool_call>paint</tool_call>"}, {"from": "tool", "value": "done"}, {"from": "gpt", "value": "yes"}]},
        {"messages": [ASK, turn("assistant", "<tool_call>paint</tool_call>"), RESULT, YES]},
    ),
    ("no tools, as text", "prompt-completion", {"prompt": "a", "completion": "b", "tools": "[]"}, {"prompt": "a", "completion": "b"}),
    ("a weight of 0", "messages", {"messages": [ASK, turn("assistant", "no", weight=0), ASK, turn("assistant", "yes", weight=1)]}, {"messages": [ASK, turn("assistant", "no", weight=0), ASK, YES]}),
    ("train false", "messages", {"messages": [ASK, turn("assistant", "no", train=False), ASK, turn("assistant", "yes", train=True)]}, {"messages": [ASK, turn("assistant", "no", weight=0), ASK, YES]}),
    ("train false in ShareGPT", "sharegpt", {"conversations": [{"from": "human", "value": "paint red"}, {"from": "gpt", "value": "no", "train": "false"}, {"from": "human", "value": "paint red"}, {"from": "gpt", "value": "yes"}]}, {"messages": [ASK, turn("assistant", "no", weight=0), ASK, YES]}),
    ("reasoning", "messages", {"messages": [ASK, turn("assistant", "yes", reasoning_content="why not")]}, {"messages": [ASK, turn("assistant", "yes", reasoning_content="why not")]}),
    ("reasoning by another name", "messages", {"messages": [ASK, turn("assistant", "yes", thinking="why not")]}, {"messages": [ASK, turn("assistant", "yes", reasoning_content="why not")]}),
    ("null beside calls stays null", "messages", {"messages": [ASK, turn("assistant", None, tool_calls=[CALL]), RESULT, YES]}, {"messages": [ASK, turn("assistant", None, tool_calls=[CALL]), RESULT, YES]}),
    ("an empty text beside calls stays one", "messages", {"messages": [ASK, turn("assistant", "", tool_calls=[CALL]), RESULT, YES]}, {"messages": [ASK, turn("assistant", "", tool_calls=[CALL]), RESULT, YES]}),
    (
        "ids of calls",
        "messages",
        {"messages": [ASK, turn("assistant", "", tool_calls=[{**CALL, "id": "abcdefgh0"}]), {**RESULT, "tool_call_id": "abcdefgh0"}, YES]},
        {"messages": [ASK, turn("assistant", "", tool_calls=[{**CALL, "id": "abcdefgh0"}]), {**RESULT, "tool_call_id": "abcdefgh0"}, YES]},
    ),
    ("arguments as text", "messages", {"messages": [ASK, turn("assistant", None, tool_calls=[{"function": {"name": "paint", "arguments": '{"colour": "red"}'}}])]}, {"messages": [ASK, turn("assistant", None, tool_calls=[CALL])]}),
    ("arguments as text twice", "messages", {"messages": [ASK, turn("assistant", None, tool_calls=[{"function": {"name": "paint", "arguments": json.dumps('{"colour": "red"}')}}])]}, {"messages": [ASK, turn("assistant", None, tool_calls=[CALL])]}),
    ("a tool's result as an object", "messages", {"messages": [ASK, turn("assistant", None, tool_calls=[CALL]), turn("tool", {"ok": True}), YES]}, {"messages": [ASK, turn("assistant", None, tool_calls=[CALL]), turn("tool", '{"ok": true}'), YES]}),
    ("a tool that says nothing", "messages", {"messages": [ASK, turn("assistant", None, tool_calls=[CALL]), turn("tool", ""), YES]}, {"messages": [ASK, turn("assistant", None, tool_calls=[CALL]), turn("tool", ""), YES]}),
    ("turns as JSON text", "prompt-completion", {"prompt": '[{"role": "user", "content": "a"}]', "completion": '[{"role": "assistant", "content": "b"}]'}, chat("a", "b")),
    ("a list that is no turns stays text", "prompt-completion", {"prompt": "sort", "completion": "[1, 2]"}, {"prompt": "sort", "completion": "[1, 2]"}),
    ("turns and a text", "prompt-completion", {"prompt": [turn("user", "a")], "completion": "b"}, chat("a", "b")),
    ("an empty system turn", "messages", {"messages": [turn("system", ""), *chat("a", "b")["messages"]]}, {"messages": [turn("system", ""), *chat("a", "b")["messages"]]}),
    ("the newer name of a system turn", "messages", {"messages": [turn("developer", "be nice"), *chat("a", "b")["messages"]]}, {"messages": [turn("system", "be nice"), *chat("a", "b")["messages"]]}),
    ("text parts", "messages", {"messages": [turn("user", [{"type": "text", "text": "what "}, {"type": "text", "text": "is red"}]), YES]}, {"messages": [turn("user", "what is red"), YES]}),
    (
        "UltraFeedback",
        "preference",
        {"prompt": "a", "chosen": chat("a", "good")["messages"], "rejected": chat("a", "bad")["messages"]},
        {"prompt": [turn("user", "a")], "chosen": [turn("assistant", "good")], "rejected": [turn("assistant", "bad")]},
    ),
    (
        "a prompt of turns before whole conversations",
        "preference",
        {"prompt": [turn("user", "a")], "chosen": [turn("system", "s"), *chat("a", "good")["messages"]], "rejected": [turn("system", "s"), *chat("a", "bad")["messages"]]},
        {"prompt": [turn("system", "s"), turn("user", "a")], "chosen": [turn("assistant", "good")], "rejected": [turn("assistant", "bad")]},
    ),
    ("OpenAI's input as a prompt", "preference", {"prompt": {"messages": [turn("user", "a")]}, "chosen": [turn("assistant", "good")], "rejected": [turn("assistant", "bad")]}, {"prompt": [turn("user", "a")], "chosen": [turn("assistant", "good")], "rejected": [turn("assistant", "bad")]}),
    ("one turn as an answer", "preference", {"prompt": "a", "chosen": turn("assistant", "good"), "rejected": turn("assistant", "bad")}, {"prompt": [turn("user", "a")], "chosen": [turn("assistant", "good")], "rejected": [turn("assistant", "bad")]}),
    ("Anthropic's dialogs", "preference", {"chosen": "\n\nHuman: a\n\nAssistant: good", "rejected": "\n\nHuman: a\n\nAssistant: bad"}, {"prompt": [turn("user", "a")], "chosen": [turn("assistant", "good")], "rejected": [turn("assistant", "bad")]}),
    ("a call without its cover", "messages", {"messages": [ASK, turn("assistant", None, tool_calls=[CALL["function"]]), RESULT, YES]}, {"messages": [ASK, turn("assistant", None, tool_calls=[CALL]), RESULT, YES]}),
    ("calls as text, without their cover", "messages", {"messages": [ASK, turn("assistant", None, tool_calls=json.dumps([CALL["function"]]))]}, {"messages": [ASK, turn("assistant", None, tool_calls=[CALL])]}),
    ("a tool's result as a list", "messages", {"messages": [ASK, turn("assistant", None, tool_calls=[CALL]), turn("tool", [{"id": 1, "type": "shade"}]), YES]}, {"messages": [ASK, turn("assistant", None, tool_calls=[CALL]), turn("tool", '[{"id": 1, "type": "shade"}]'), YES]}),
    ("a tool's result as text parts", "messages", {"messages": [ASK, turn("assistant", None, tool_calls=[CALL]), turn("tool", [{"type": "text", "text": "done"}]), YES]}, {"messages": [ASK, turn("assistant", None, tool_calls=[CALL]), RESULT, YES]}),
    ("roles in capitals", "messages", {"messages": [turn("User", "paint red"), turn("ASSISTANT", "yes")]}, {"messages": [ASK, YES]}),
    ("ShareGPT's names in messages", "messages", {"messages": [turn("human", "paint red"), turn("gpt", "yes"), turn("user", "paint red"), turn("model", "yes")]}, {"messages": [ASK, YES, ASK, YES]}),
    ("a label of 1", "unpaired-preference", {"prompt": "a", "completion": "b", "label": 1}, {"prompt": "a", "completion": "b", "label": True}),
    ("a label of 0, as text", "unpaired-preference", {"prompt": "a", "completion": "b", "label": "0"}, {"prompt": "a", "completion": "b", "label": False}),
    ("a label as CSV has it", "unpaired-preference", {"prompt": "a", "completion": "b", "label": "True"}, {"prompt": "a", "completion": "b", "label": True}),
    ("Anthropic's dialogs without the first line", "preference", {"chosen": "Human: a\n\nAssistant: good", "rejected": "Human: a\n\nAssistant: bad"}, {"prompt": [turn("user", "a")], "chosen": [turn("assistant", "good")], "rejected": [turn("assistant", "bad")]}),
    ("text parts of the Responses API", "messages", {"messages": [turn("user", [{"type": "input_text", "text": "paint red"}]), turn("assistant", [{"type": "output_text", "text": "yes"}])]}, {"messages": [ASK, YES]}),
    ("an answer to compare with", "prompt-only", {"prompt": "a", "answer": "b"}, {"prompt": "a", "completion": "b"}),
    ("a solution to compare with", "prompt-only", {"prompt": [turn("user", "a")], "solution": 7}, chat("a", "7")),
    ("tools beside a prompt", "prompt-only", {"prompt": [ASK], "tools": [TOOL]}, {"messages": [ASK], "tools": [TOOL]}),
]  # fmt: skip


@pytest.mark.parametrize(("format_", "row", "shape"), [case[1:] for case in READ], ids=[case[0] for case in READ])
def test_what_a_row_says_is_read(format_: str, row: dict[str, Any], shape: dict[str, Any]) -> None:
    found, unused = read(format_, row)
    assert found == shape and not unused


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("alpaca", {"instruction": "a", "input": ["b"], "output": "c"}, "input is list, expected a string"),
    ("alpaca", {"instruction": "a", "system": {"text": "b"}, "output": "c"}, "system is dict, expected a string"),
    ("alpaca", {"instruction": "a", "output": "c", "history": [["b"]]}, r"history\[0\] is no pair"),
    ("alpaca", {"instruction": "a", "output": "c", "history": 5}, "history is int, expected a list of pairs"),
    ("messages", {"messages": [ASK, turn("assistant", "yes", weight=0.5)]}, r"messages\[1\].weight is 0.5; write 0"),
    ("messages", {"messages": [ASK, turn("assistant", "yes", train="perhaps")]}, r"messages\[1\].train is perhaps; write true or false"),
    ("messages", {"messages": [ASK, turn("assistant", "yes", weight=0)]}, "every answer has weight 0"),
    ("messages", {"messages": [turn("user", [{"type": "image_url", "image_url": {}}]), YES]}, r"messages\[0\].content\[0\] is a part of type image_url; only text"),
    ("messages", {"messages": [turn("user", "a", tool_calls=[CALL]), YES]}, r"tool_calls stands in a turn of user"),
    ("messages", {"messages": [ASK, turn("assistant", None)]}, r"messages\[1\].content is missing"),
    ("messages", {"messages": [ASK, turn("assistant", None, tool_calls=[{"function": {}}])]}, "function.name is missing"),
    ("messages", {"messages": "[{'role': 'user', 'content': 'a'}]"}, "looks like a list of turns, and is no JSON; write it with json.dumps"),
    ("messages", {"messages": [ASK, YES], "tools": "paint"}, "tools is text, and no JSON; write a list of tool definitions"),
    ("messages", {"messages": [ASK, YES], "tools": [{"type": "function", "function": {}}]}, r"tools\[0\] has no function.name"),
    ("messages", {"system": "be nice", "messages": [turn("system", "be rude"), ASK, YES]}, "the column system and the system turn differ"),
    ("prompt-completion", {"prompt": "a", "completion": "[{'role': 'assistant', 'content': 'b'}]"}, "completion looks like a list of turns"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "paint"}]}, r"conversations\[1\].value is text, and no JSON"),
    ("preference", {"prompt": "other", "chosen": chat("a", "good")["messages"], "rejected": chat("a", "bad")["messages"]}, "another prompt than the column prompt"),
    ("preference", {"chosen": "a", "rejected": "b"}, "prompt is missing.*name yours in dataset.columns"),
    ("preference", {"system": "s", "chosen": "a", "rejected": "b"}, "prompt is missing"),
    ("unpaired-preference", {"prompt": "a", "completion": "b", "label": "perhaps"}, "label is perhaps; write true .a good answer. or false, also as 1 or 0"),
    ("unpaired-preference", {"prompt": "a", "completion": "b", "label": -1}, "label is -1"),
    ("messages", {"messages": [ASK, turn("assistant", None, tool_calls=[CALL]), turn("tool", [{"type": "image_url", "image_url": {}}]), YES]}, "a part of type image_url; only text"),
    ("prompt-only", {"prompt": "a", "answer": {"b": 1}}, "answer is dict, expected a string"),
]  # fmt: skip


@pytest.mark.parametrize(("format_", "row", "problem"), REFUSED)
def test_what_cannot_be_read_is_refused(format_: str, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRow, match=problem):
        read(format_, row)


UNUSED: list[tuple[str, dict[str, Any], set[str]]] = [
    ("messages", {**chat("a"), "id": 7, "empty": None, "none": ""}, {"id"}),
    ("messages", {"messages": [turn("user", "a", name="Ann"), turn("assistant", "b", score=0.5, refusal=None)]}, {"messages[].name", "messages[].score"}),
    ("messages", {"messages": [turn("user", "a", weight=1), turn("assistant", "b", thinking="x", reasoning="y")]}, {"messages[].weight", "messages[].thinking"}),
    ("messages", {"messages": [turn("user", "a", weight=0), turn("assistant", "b", reasoning="x", reasoning_content="x")]}, set()),
    ("messages", {"messages": [ASK, turn("assistant", None, tool_calls=[{**CALL, "index": 0, "note": "n"}])]}, {"messages[].tool_calls[].note"}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a", "lang": "en"}, {"from": "gpt", "value": "b"}]}, {"conversations[].lang"}),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "messages": chat("a", "b")["messages"], "score_chosen": 8.0}, {"messages", "score_chosen"}),
    ("prompt-only", {"prompt": "a", "answer": "7", "solution": "because"}, {"solution"}),
    ("text", {"text": "a", "source": "web"}, {"source"}),
]  # fmt: skip


@pytest.mark.parametrize(("format_", "row", "paths"), UNUSED)
def test_what_is_not_read_is_named(format_: str, row: dict[str, Any], paths: set[str]) -> None:
    assert read(format_, row)[1] == paths


def test_every_text_of_a_row_is_looked_through() -> None:
    row, _ = read("messages", {"tools": [TOOL], "messages": [ASK, turn("assistant", None, reasoning="hm", tool_calls=[{**CALL, "id": "c7"}]), turn("tool", "done", tool_call_id="c7"), YES]})  # fmt: skip
    assert strings(row) == ["paint red", "done", "yes"]
    assert {"hm", "paint", "colour", "red", "c7", "string"} <= set(all_strings(row))
    assert json.loads(dumps(row)) == row
    ordered = {"messages": [turn("assistant", None, tool_calls=[{"function": {"name": "f", "arguments": {"z": 1, "a": 2}}}])]}
    assert '"z": 1, "a": 2' in dumps(ordered), "a template shows arguments in the row's own order"


def test_a_format_that_the_objective_learns_from_is_preferred() -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", **chat("a")}
    assert looks_like(pair) == "preference" and looks_like(pair, ("messages", "text")) == "messages"
    assert looks_like({"prompt": "a", "completion": "b", "label": False}, ("prompt-completion",)) == "unpaired-preference"
    assert looks_like({"prompt": "a", "completion": None}, ("prompt-completion",)) == "prompt-only"
    with pytest.raises(UserError, match=r"or name yours: dataset.columns: \{question: prompt, answer: completion\}"):
        detect([{"question": "a", "answer": "b"}], ("prompt-completion",))
    with pytest.raises(UserError, match=r"or name yours: dataset.columns: \{dialog: messages\}"):
        detect([{"dialog": []}], ("messages",))
    with pytest.raises(UserError, match=r"format prompt-only.*dataset.columns: \{response: completion\}"):
        detect([{"prompt": "a", "response": "b"}], ("prompt-completion",))

    with pytest.raises(UserError, match=r"columns: \{instruction: prompt, chosen_response: chosen, rejected_response: rejected\}"):
        detect([{"instruction": "a", "chosen_response": "b", "rejected_response": "c"}], ("preference",))


def test_names_of_columns_are_proposed_however_they_are_spelled() -> None:
    with pytest.raises(UserError, match=r"columns: \{Prompt: prompt, Response: completion\}"):
        detect([{"Prompt": "a", "Response": "b"}], ("prompt-completion",))
    with pytest.raises(UserError, match=r"columns: \{question: prompt, response: completion, Label: label\}"):
        detect([{"question": "a", "response": "b", "Label": True}], ("unpaired-preference",))
    with pytest.raises(UserError, match=r"several formats \(1 prompt-completion, first row 1; 1 prompt-only, first row 2\)"):
        detect([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}], ("prompt-completion",), ["row 1", "row 2"])


def test_well_known_data_sets_are_read_by_their_own_names(desk: Desk) -> None:
    done = desk.run(lines([{"instruction": f"what {i}", "context": "red", "response": "yes", "category": "qa"} for i in range(8)]))
    assert done.result["dataset"]["format"] == "alpaca" and done.result["dataset"]["unusedKeys"] == {"category": 8}
    assert json.loads(rows_of(desk.context(None).layout.train_rows)[0]) == chat("what 0\n\nred", "yes")
    report = json.loads(Path(desk.context(None).layout.data_report).read_text())
    assert report["sources"][0]["reason"].endswith("context is read as input, response is read as output")
    desk.run(lines([{"question": f"what {i}", "chosen": "yes", "rejected": "no"} for i in range(8)]), tuning={"objective": "dpo"})
    assert json.loads(rows_of(desk.context(None).layout.train_rows)[0])["prompt"] == "what 0"
    assert usual_names([{"instruction": "a", "output": "b", "response": None}]) == {}


def test_columns_of_other_names() -> None:
    reader = RowReader("prompt-completion", {"question": "prompt", "answer": "completion"})
    assert reader.read({"question": "a", "answer": "b", "id": 1}) == ({"prompt": "a", "completion": "b"}, {"id"})
    assert reader.read({"question": "a", "prompt": "x", "answer": "b"}) == ({"prompt": "a", "completion": "b"}, {"prompt"})
    both = RowReader("prompt-only", {"question": "prompt", "query": "prompt"})
    assert both.read({"question": "a", "query": "b"}) == ({"prompt": "a"}, {"query"})
    assert both.read({"question": None, "query": "b"}) == ({"prompt": "b"}, set())
    assert rename({"prompt": "a", "completion": "b"}, {"prompt": "completion", "completion": "prompt"}) == {
        "prompt": "b",
        "completion": "a",
    }


def test_rows_of_a_source_are_all_conversations_or_none(desk: Desk) -> None:
    """Plain text has no place for a system text: where some rows have one, the template is used for all."""
    items = [{"prompt": f"what {i}", "completion": "yes", **({"system": "the cat"} if i % 2 else {})} for i in range(8)]
    desk.run(lines(items))
    assert all("messages" in json.loads(row) for row in rows_of(desk.context(None).layout.train_rows))


def test_a_pair_with_a_system_text_needs_a_chat_template(desk: Desk) -> None:
    bare = desk.folder / "bare" / "tiny"
    shutil.copytree(desk.model, bare)
    (bare / "chat_template.jinja").unlink()
    desk.model = bare
    pairs = [{"prompt": f"what {i}", "chosen": "yes", "rejected": "no"} for i in range(8)]
    desk.run(lines(pairs), tuning={"objective": "dpo"})
    with pytest.raises(UserError, match="has no chat template"):
        desk.run(lines([{**pair, "system": "be nice"} for pair in pairs]), tuning={"objective": "dpo"})


def learned(desk: Desk) -> list[str]:
    from transformers import AutoTokenizer

    from finetune_trainer.data.store import read_rows

    tokenizer = AutoTokenizer.from_pretrained(desk.model)
    found = read_rows(desk.context(None).layout.train_rows, ["input_ids", "labels"], 10**6)
    return [tokenizer.decode([t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]) for row in found]


def test_a_turn_of_weight_0_is_not_learned(desk: Desk) -> None:
    items = [{"messages": [*chat(f"what is red {i}", "a cat")["messages"], *chat("no", "a colour")["messages"]]} for i in range(8)]
    for item in items:
        item["messages"][1]["weight"] = 0
    desk.run(lines(items))
    assert learned(desk) == ["a colour<|end|>"] * 8


def test_keys_that_nothing_reads_are_named_and_counted_once_each(desk: Desk) -> None:
    items = [{**chat(f"what {i}"), "id": i, "score": 5} if i % 2 else chat(f"what {i}") for i in range(8)]
    done = desk.run(lines(items))
    assert DatasetStatus.model_validate(done.result["dataset"]).unused_keys == {"id": 4, "score": 4}
    assert "not used: id (4 rows), score (4 rows)" in done.message
    report = json.loads(Path(desk.context(None).layout.data_report).read_text())
    assert report["unusedKeys"] == {"id": 4, "score": 4}
    assert "score" in Path(desk.context(None).layout.data_page).read_text()


def test_keys_of_a_refused_row_are_named_too(desk: Desk) -> None:
    data = lines([*rows(8), {**chat("what", ""), "score": 5}])
    done = desk.run(data, dataset={"checks": {"minExamples": 5, "invalidRows": "drop"}})
    assert done.result["dataset"]["dropped"] == {"invalid": 1} and done.result["dataset"]["unusedKeys"] == {"score": 1}


def test_every_kind_of_refused_row_is_told_at_once(desk: Desk) -> None:
    data = lines([*rows(8), *[chat(f"bad {i}", "") for i in range(12)], chat("cat " * 30, "no")]) + b"{oops\n"
    with pytest.raises(UserError) as problem:
        desk.run(data, tuning={"hyperparameters": {"maxLength": 16}})
    told = problem.value.message
    assert problem.value.reason == "InvalidRows" and "unreadable: 1 row(s): train row 22" in told
    assert "invalid: 12 row(s): train row 9" in told and "train row 18 (train.jsonl:18); and 2 more" in told
    assert "tooLong: 1 row(s): train row 21" in told and told.endswith("set dataset.checks.tooLong to drop")
    with pytest.raises(
        UserError, match=r"no readable row; of its first rows, 2 row.*train row 1 .train.jsonl:1.*train row 2 .train.jsonl:2"
    ):
        desk.run(b"{oops\n[]\n")


def test_a_users_names_of_columns(desk: Desk) -> None:
    data = lines([{"question": f"what {i}", "reply": "yes"} for i in range(8)])
    columns = {"question": "prompt", "reply": "completion"}
    done = desk.run(data, dataset={"columns": columns})
    assert done.result["dataset"]["format"] == "prompt-completion" and not done.result["dataset"]["unusedKeys"]
    assert json.loads(rows_of(desk.context(None).layout.train_rows)[0]) == {"prompt": "what 0", "completion": "yes"}
    with pytest.raises(UserError, match=r"dataset.columns names wrong, which no row has \(found: question, reply\)"):
        desk.run(data, dataset={"columns": {**columns, "wrong": "system"}})


def test_rows_without_an_answer_are_refused_before_a_gpu_is_taken(desk: Desk) -> None:
    tuning = {"objective": "grpo", "grpo": {"generations": 2, "maxNewTokens": 4, "rewards": [{"type": "exact-match"}]}}
    with pytest.raises(UserError, match=r"8 row\(s\): train row 1 \(train.jsonl:1\): .*has none; give it as answer, solution"):
        desk.run(lines([{"prompt": f"what {i}"} for i in range(8)]), tuning=tuning)
    desk.run(lines([{"prompt": f"what {i}", "answer": "a colour"} for i in range(8)]), tuning=tuning)
    assert json.loads(rows_of(desk.context(None).layout.train_rows)[0])["completion"] == "a colour"


def test_a_row_of_a_folder_is_told_by_its_file(desk: Desk) -> None:
    folder = desk.folder / "rows" / "shards"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines(rows(6)))
    (folder / "b.jsonl").write_bytes(b"\n" + lines([chat("good"), chat("bad", "")]))
    with pytest.raises(UserError, match=r"1 row\(s\): train row 9 \(b.jsonl:3\): messages\[1\].content is empty"):
        desk.run(None, dataset={"train": {"uri": "pvc://rows/shards"}})


def test_a_row_that_is_too_long_is_counted_as_that(desk: Desk) -> None:
    data = lines([*rows(8), chat("cat " * 30, "no")])
    settings: dict[str, Any] = {"tuning": {"hyperparameters": {"maxLength": 16}}}
    for checks in ({"tooLong": "drop"}, {"invalidRows": "drop"}):
        done = desk.run(data, dataset={"checks": {"minExamples": 5, **checks}}, **settings)
        assert done.result["dataset"]["dropped"] == {"tooLong": 1}
    with pytest.raises(UserError, match=r"no answer token is left.*maxLength, or set dataset.checks.tooLong to drop"):
        desk.run(data, **settings)


def test_formats_name_every_column_that_the_api_offers() -> None:
    from typing import get_args

    from finetune_api.spec.data import Column

    assert set(get_args(Column)) == {column for kind in FORMATS.values() for column in kind.known} - {"functions"}
