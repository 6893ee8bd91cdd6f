"""Rows with system text, several turns, tools and reasoning in the chat templates of common families: what is learned of them."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_trainer.data.shape import BadRow
from finetune_trainer.data.tokens import IGNORED, RowTokenizer
from tests.cluster.shell import REPO
from tests.families import FAMILIES, Family, tokenizer_of

PER_ANSWER = ("gpt-oss", "Nemotron-3-Nano")
"""Families whose template shows the reasoning of the last answer alone: a row of several makes several."""
SYSTEM = {"role": "system", "content": "be nice"}
TOOLS = [
    {"type": "function", "function": {"name": "paint", "description": "paint a thing", "parameters": {"type": "object", "properties": {"colour": {"type": "string"}}}}}
]  # fmt: skip


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


_CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "paint", "arguments": {"colour": "red"}}}
ROWS: dict[str, dict[str, Any]] = {
    "turns": {"messages": [SYSTEM, _user("what is red"), _assistant("a colour"), _user("is it"), _assistant("yes it is")]},
    "reasoning": {
        "messages": [SYSTEM, _user("what is red"), _assistant("a colour", reasoning_content="no number")],
    },
    "reasoning in turns": {
        "messages": [
            SYSTEM, _user("what is red"), _assistant("a colour", reasoning_content="no number"), _user("is it"),
            _assistant("yes it is", reasoning_content="I said so"),
        ],
    },
    "tools": {
        "messages": [
            SYSTEM, _user("paint it red"), _assistant("", tool_calls=[_CALL]), {"role": "tool", "tool_call_id": "abcdefgh1", "content": "ok"},
            _assistant("done"),
        ],
        "tools": TOOLS,
    },
}  # fmt: skip
_THOUGHT, _MORE = "<think>\nno number\n</think>\n\n", "<think>\nI said so\n</think>\n\n"


def _inline(end: str, lead: str = "") -> dict[str, list[str] | str]:
    """Families whose template knows no reasoning: it stands before the answer, as in the row's own text."""
    return {
        "turns": [f"{lead}a colour{end}", f"{lead}yes it is{end}"],
        "reasoning": [f"{lead}{_THOUGHT}a colour{end}"],
        "reasoning in turns": [f"{lead}{_THOUGHT}a colour{end}", f"{lead}{_MORE}yes it is{end}"],
    }


_JSON_CALL = '{"name": "paint", "parameters": {"colour": "red"}}'
_R1 = "<｜end▁of▁sentence｜>"
_R1_ROWS: dict[str, list[str] | str] = {
    "turns": [f"a colour{_R1}", f"yes it is{_R1}"],
    "reasoning": [f"no number\n</think>\n\na colour{_R1}"],
    "reasoning in turns": [f"no number\n</think>\n\na colour{_R1}", f"I said so\n</think>\n\nyes it is{_R1}"],
    "tools": [
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>paint\n```json\n{"colour": "red"}\n```<｜tool▁call▁end｜>',
        f"done{_R1}",
    ],
}
LEARNED: dict[str, dict[str, list[str] | str]] = {
    "Qwen3": {
        "turns": ["a colour<|im_end|>", "<think>\n\n</think>\n\nyes it is<|im_end|>"],
        "reasoning": [f"{_THOUGHT}a colour<|im_end|>"],
        "reasoning in turns": [f"{_THOUGHT}a colour<|im_end|>", f"{_MORE}yes it is<|im_end|>"],
        "tools": [
            '<tool_call>\n{"name": "paint", "arguments": {"colour": "red"}}\n</tool_call><|im_end|>',
            "<think>\n\n</think>\n\ndone<|im_end|>",
        ],
    },
    "gpt-oss": {
        "turns": ["<|channel|>final<|message|>a colour", "<|channel|>final<|message|>yes it is<|return|>"],
        "reasoning": [
            "<|channel|>analysis<|message|>no number<|end|><|start|>assistant<|channel|>final<|message|>a colour<|return|>",
        ],
        "reasoning in turns": [
            "<|channel|>analysis<|message|>no number<|end|><|start|>assistant<|channel|>final<|message|>a colour<|return|>",
            "<|channel|>analysis<|message|>I said so<|end|><|start|>assistant<|channel|>final<|message|>yes it is<|return|>",
        ],
        "tools": [
            ' to=functions.paint<|channel|>commentary json<|message|>{"colour": "red"}<|call|>',
            "<|channel|>final<|message|>done<|return|>",
        ],
    },
    "Phi-3": {**_inline("<|end|>"), "tools": "leaves out .*tools: 'paint'"},
    "Phi-3.5": {**_inline("<|end|>"), "tools": "leaves out .*tools: 'paint'"},
    "Phi-4": {**_inline("<|im_end|>"), "tools": "leaves out .*tools: 'paint'"},
    "DeepSeek-R1-Distill-Qwen": _R1_ROWS,
    "DeepSeek-R1-Distill-Llama": _R1_ROWS,
    "Nemotron-3-Nano": {
        "turns": ["</think>a colour<|im_end|>", "</think>yes it is<|im_end|>"],
        "reasoning": ["no number\n</think>\na colour<|im_end|>"],
        "reasoning in turns": ["no number\n</think>\na colour<|im_end|>", "I said so\n</think>\nyes it is<|im_end|>"],
        "tools": [
            "</think>\n<tool_call>\n<function=paint>\n<parameter=colour>\nred\n</parameter>\n</function>\n</tool_call>\n<|im_end|>",
            "</think>done<|im_end|>",
        ],
    },
    "Gemma-3": {**_inline("<end_of_turn>"), "tools": "roles must alternate"},
    "Mistral-7B-v0.2": {**_inline("</s>", " "), "tools": "roles must alternate"},
    "Mistral-Nemo": {
        **_inline("</s>"),
        "tools": ['[TOOL_CALLS][{"name": "paint", "arguments": {"colour": "red"}, "id": "abcdefgh1"}]</s>', "done</s>"],
    },
    "Mistral-Small-3.2": {
        **_inline("</s>"),
        "tools": ['[TOOL_CALLS]paint[CALL_ID]abcdefgh1[ARGS]{"colour": "red"}</s>', "done</s>"],
    },
    "Llama-3": {**_inline("<|eot_id|>"), "tools": "leaves out .*tools: 'paint'"},
    "Llama-3.1": {**_inline("<|eot_id|>"), "tools": [f"{_JSON_CALL}<|eot_id|>", "done<|eot_id|>"]},
    "Llama-3.2": {**_inline("<|eot_id|>"), "tools": [f"{_JSON_CALL}<|eot_id|>", "done<|eot_id|>"]},
}
"""What is learned of each row, turn by turn; or, of one that is refused, what the refusal says."""


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_every_kind_in_the_template_of_a_family(name: str, kind: str) -> None:
    family, row = FAMILIES[name], ROWS[kind]
    tokenizer = tokenizer_of(family)
    row_tokenizer = RowTokenizer(tokenizer, max_length=4096, assistant_only=True)
    assert row_tokenizer.template.turn_end == family.end
    wanted = LEARNED[name][kind]
    if isinstance(wanted, str):
        with pytest.raises(BadRow, match=wanted):
            row_tokenizer(row)
        return
    parts = [(part, row_tokenizer(part)) for part in row_tokenizer.parts(row)]
    assert len(parts) == (2 if kind == "reasoning in turns" and name in PER_ANSWER else 1)
    spans, texts = [], []
    for part, (columns, cut) in parts:
        assert not cut
        spans += spans_of(tokenizer, columns)
        texts.append(tokenizer.decode(columns["input_ids"]))
        assert texts[-1].count("be nice") == 1, "the system text reaches the model, once"
        assert all(turn["content"] in texts[-1] for turn in part["messages"])
        lead = row_tokenizer.template.answer_lead
        last = part["messages"][-1]
        _, answer = row_tokenizer.prompt_and_answer(part)
        assert "tool_calls" in last or answer == last["content"], "without channels and thoughts"
        assert lead == ("<|channel|>final<|message|>" if name == "gpt-oss" else "")
    assert spans == wanted
    assert all(t.get("reasoning_content", "") in "".join(texts) for t in row["messages"])


def spans_of(tokenizer: Any, columns: dict[str, Any]) -> list[str]:
    """What is learned, span by span."""
    runs: list[list[int]] = [[]]
    for token, label in zip(columns["input_ids"], columns["labels"], strict=True):
        if label == IGNORED and runs[-1]:
            runs.append([])
        elif label != IGNORED:
            assert label == token
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


def test_a_call_in_a_template_that_closes_no_turn_ends_with_what_opens_the_result() -> None:
    special = ("[gMASK]", "<sop>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    added = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    tokenizer = tokenizer_of(Family("Glm4MoeConfig", "glm4moe", special, "<|endoftext|>", "<|user|>", added=added))
    rows = RowTokenizer(tokenizer, max_length=4096, assistant_only=True)
    row = ROWS["tools"]
    call = "\n<think></think>\n<tool_call>paint\n<arg_key>colour</arg_key>\n<arg_value>red</arg_value>\n</tool_call><|observation|>"
    assert spans_of(tokenizer, rows(row)[0]) == [call, "\n<think></think>\ndone<|user|>"]
    assert rows.ends(row) == {"<|observation|>", "<|user|>"}, "a call's own last token stops nothing: there may be several calls"
    asked = {**row, "messages": row["messages"][:3]}
    assert spans_of(tokenizer, rows(asked)[0]) == [call] and rows.ends(asked) == {"<|observation|>"}


def test_an_answer_is_told_from_thoughts_that_special_tokens_keep_apart() -> None:
    from finetune_trainer.evaluation.answers import final_answer
    from finetune_trainer.models.generate import spoken

    tokenizer = tokenizer_of(FAMILIES["gpt-oss"])
    lead = RowTokenizer(tokenizer, max_length=4096, assistant_only=True).template.answer_lead

    def said(text: str) -> str:
        return spoken(tokenizer, [tokenizer(text, add_special_tokens=False)["input_ids"]], lead)[0]

    final = "<|channel|>final<|message|>a colour<|return|>"
    whole = said(f"<|channel|>analysis<|message|>no number<|end|><|start|>assistant{final}")
    assert whole == "<think>analysisno numberassistant</think>a colour" and final_answer(whole) == "a colour"
    assert said(final) == "a colour" and said("<|channel|>analysis<|message|>no") == "analysisno"
    thinking = tokenizer_of(FAMILIES["Phi-3"])
    thinking.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]}, replace_extra_special_tokens=False)
    thinking.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}[THINK]{{ m.reasoning_content }}[/THINK]{% endif %}{{ m.content }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert RowTokenizer(thinking, max_length=99, assistant_only=True).template.answer_lead == "[/THINK]"


def test_the_docs_say_of_every_family_what_was_run() -> None:
    page = (REPO / "docs" / "templates.md").read_text()
    for name, family in FAMILIES.items():
        source = "llama.cpp" if family.source.parent == REPO / "tests" / "templates" else "TRL"
        line = next(
            (line for line in page.splitlines() if line.startswith(f"| {name} | {family.config.removesuffix('Config')} | {source}")), ""
        )
        assert line, f"{name} is not in the table"
        assert ("refused" in line) == any(isinstance(wanted, str) for wanted in LEARNED[name].values()), name
