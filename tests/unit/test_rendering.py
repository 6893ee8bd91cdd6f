"""Render, then verify: what a row says stands in the text, or the row is refused, or it is told (the field's cases of templates)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.data.store import read_rows
from finetune_trainer.process.errors import UserError
from tests.unit.test_prepare import Desk, desk, lines

__all__ = ["desk"]

TURNS = "{% for m in messages %}{{ '<|'+('user' if m.role=='tool' else m.role)+'|>' }}"
ASK = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
TOOLS = (
    "{% if tools %}{{ '<|system|>' }}{% for t in tools %}{{ t|tojson }}{% endfor %}{{ '<|end|>' }}{% endif %}"
    + TURNS
    + "{% if m.reasoning_content is defined %}{{ '<think>'+m.reasoning_content+'</think>' }}{% endif %}{{ m.content or '' }}"
    "{% if m.tool_calls is defined and m.tool_calls %}{% for c in m.tool_calls %}{{ '[call]'+c.function.name+(c.function.arguments|tojson) }}"
    "{% endfor %}{% endif %}{{ '<|end|>' }}{% endfor %}" + ASK
)
TEXT_ARGUMENTS = TOOLS.replace("c.function.name+(c.function.arguments|tojson)", "c.function.name+' '+c.function.arguments")
NULL_CONTENT = (
    TURNS
    + "{% if m.role=='assistant' and m.content is none %}{% for c in m.tool_calls %}{{ '[call]'+c.function.name+(c.function.arguments|tojson) }}"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}{{ '<|end|>' }}{% endfor %}" + ASK
)
NINE_LETTERS = (
    "{% for m in messages %}{{ '<|'+('system' if m.role=='tool' else m.role)+'|>' }}{% if m.tool_calls is defined and m.tool_calls %}{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id|length != 9 %}{{ raise_exception('a call needs an id of 9 letters') }}{% endif %}"
    "{{ c.function.name+(c.function.arguments|tojson)+c.id }}{% endfor %}{% else %}"
    "{% if m.role=='tool' and (m.tool_call_id is not defined or m.tool_call_id|length != 9) %}{{ raise_exception('a result needs an id of 9 letters') }}{% endif %}"
    "{{ m.content }}{% endif %}{{ '<|end|>' }}{% endfor %}" + ASK
)
NO_HISTORY_OF_REASONING = (  # as Qwen3's
    "{% set ns=namespace(last=-1) %}{% for m in messages %}{% if m.role=='user' %}{% set ns.last=loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|'+m.role+'|>\n' }}{% if m.role=='assistant' and loop.index0 > ns.last and (loop.last or m.reasoning_content) %}"
    "{{ '<think>\n'+(m.reasoning_content or '')+'\n</think>\n\n' }}{% endif %}{{ m.content+'<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PAINT = [{"type": "function", "function": {"name": "paint", "description": "paint a thing", "parameters": {"type": "object", "properties": {"colour": {"type": "string"}}}}}]  # fmt: skip
QUESTION, ANSWER, RESULT = (
    {"role": "user", "content": "paint red"},
    {"role": "assistant", "content": "done"},
    {"role": "tool", "content": "ok"},
)


def called(content: str | None = None, identifier: str | None = None, **arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "paint", "arguments": arguments or {"colour": "red"}}}
    return {"role": "assistant", "content": content, "tool_calls": [{**call, **({"id": identifier} if identifier else {})}]}


def learned(desk: Desk, row: dict[str, Any], template: str | None, **changes: Any) -> tuple[str, str, dict[str, int]]:
    """(the text of the row, what is learned of it, warnings)."""
    from transformers import AutoTokenizer

    tuning = {"chatTemplate": template} if template is not None else {}
    spec = {"dataset": {"checks": {"minExamples": 1, "duplicates": "keep"}}, **changes}
    result = desk.run(lines([row] * 2), **{**spec, "tuning": {**tuning, **changes.get("tuning", {})}})
    written = read_rows(desk.context(None).layout.train_rows, ("input_ids", "labels"), 1)[0]
    tokenizer = AutoTokenizer.from_pretrained(desk.model)
    kept = [label for label in written["labels"] if label != -100]
    return tokenizer.decode(written["input_ids"]), tokenizer.decode(kept), result.result["dataset"].get("warnings", {})


def refused(desk: Desk, row: dict[str, Any], template: str | None, **changes: Any) -> UserError:
    with pytest.raises(UserError) as problem:
        learned(desk, row, template, **changes)
    return problem.value


def test_tools_that_the_template_does_not_know_are_no_silent_loss(desk: Desk) -> None:
    row = {"messages": [QUESTION, called(""), RESULT, ANSWER], "tools": PAINT}
    problem = refused(desk, row, TURNS + "{{ m.content or '' }}<|end|>{% endfor %}" + ASK)
    assert problem.reason == "InvalidRows" and "train row 1" in problem.message
    assert "leaves out messages[1].tool_calls[0], tools: 'paint'" in problem.message, "that the user says paint too does not count"
    text, answer, warnings = learned(desk, row, TOOLS)
    assert '"name": "paint"' in text and answer == '[call]paint{"colour": "red"}<|end|>done<|end|>' and not warnings


def test_a_template_that_shows_calls_and_no_tools_is_told(desk: Desk) -> None:
    row = {"messages": [QUESTION, called("", "abcdefgh0"), {**RESULT, "tool_call_id": "abcdefgh0"}, ANSWER], "tools": PAINT}
    text, answer, warnings = learned(desk, row, NINE_LETTERS)
    assert answer == 'paint{"colour": "red"}abcdefgh0<|end|>done<|end|>', "the call's id is the row's"
    assert warnings == {"notRendered:tools": 2}


def test_identifiers_are_written_as_a_template_takes_them(desk: Desk) -> None:
    """Mistral's take nine letters; OpenAI's have more, and many a row has none."""
    text, _, warnings = learned(
        desk, {"messages": [QUESTION, called("", "abcdefgh0"), {**RESULT, "tool_call_id": "abcdefgh0"}, ANSWER]}, NINE_LETTERS
    )
    assert "abcdefgh0<|end|>" in text and "toolCallIdsRewritten" not in warnings
    for identifier in ("call_abc123", None):
        result = {**RESULT, **({"tool_call_id": identifier} if identifier else {})}
        _, answer, warnings = learned(desk, {"messages": [QUESTION, called("", identifier), result, ANSWER]}, NINE_LETTERS)
        assert re.fullmatch(r'paint{"colour": "red"}[0-9a-f]{9}<\|end\|>done<\|end\|>', answer) and warnings == {"toolCallIdsRewritten": 2}
    row = {"messages": [QUESTION, called("", "c0"), {**RESULT, "tool_call_id": "c0"}, ANSWER]}
    assert "a call needs an id of 9 letters" in refused(desk, row, NINE_LETTERS.replace("!= 9", "!= 8")).message


def test_ids_of_calls_and_results_agree() -> None:
    from finetune_trainer.data.call_ids import with_nine

    two = {"role": "assistant", "content": None, "tool_calls": [*called("", "call_1")["tool_calls"], *called("", "call_2")["tool_calls"]]}
    results = [{**RESULT, "tool_call_id": "call_2"}, {**RESULT, "tool_call_id": "call_1"}]
    pair = with_nine({"prompt": [QUESTION, two, *results], "chosen": [ANSWER], "rejected": [called("", "call_1")]})
    first, second = (call["id"] for call in pair["prompt"][1]["tool_calls"])
    assert [turn["tool_call_id"] for turn in pair["prompt"][2:]] == [second, first] and first != second
    assert pair["rejected"][0]["tool_calls"][0]["id"] == first and pair["chosen"] == [ANSWER]
    bare = with_nine({"messages": [QUESTION, {**two, "tool_calls": called()["tool_calls"] * 2}, RESULT, RESULT, ANSWER]})["messages"]
    assert [turn["tool_call_id"] for turn in bare[2:4]] == [call["id"] for call in bare[1]["tool_calls"]]
    assert len({call["id"] for call in bare[1]["tool_calls"]}) == 2
    good = {"messages": [QUESTION, called("", "abcdefgh0"), {**RESULT, "tool_call_id": "abcdefgh0"}, ANSWER]}
    assert with_nine(good) is good and with_nine({"prompt": "a"}) == {"prompt": "a"}


def test_an_argument_that_the_template_leaves_out(desk: Desk) -> None:
    row = {"messages": [QUESTION, called("", colour="red", size="big"), RESULT, ANSWER]}
    template = TOOLS.replace("(c.function.arguments|tojson)", "c.function.arguments.colour")
    assert "messages[1].tool_calls[0].function.arguments.size" in refused(desk, row, template).message


def test_reasoning_is_learned_where_the_template_puts_it(desk: Desk) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "what is red"},
            {"role": "assistant", "content": "a colour", "reasoning_content": "no number"},
        ]
    }
    assert learned(desk, row, TOOLS)[1] == "<think>no number</think>a colour<|end|>"
    _, answer, warnings = learned(desk, row, None)
    assert answer == "<think>\nno number\n</think>\n\na colour<|end|>" and warnings == {"reasoningInline": 2}, "the template knows none"


def test_turns_are_found_in_a_template_that_drops_earlier_reasoning(desk: Desk) -> None:
    user, more = {"role": "user", "content": "what is red"}, {"role": "user", "content": "is it"}
    plain = [{"role": "system", "content": "be nice"}, user, {"role": "assistant", "content": "a colour"}, more]
    text, answer, warnings = learned(desk, {"messages": [*plain, {"role": "assistant", "content": "yes it is"}]}, NO_HISTORY_OF_REASONING)
    assert answer == "a colour<|end|><think>\n\n</think>\n\nyes it is<|end|>" and not warnings and text.startswith("<|system|>\nbe nice")
    thought = [user, {"role": "assistant", "content": "a colour", "reasoning_content": "hm"}, more]
    row = {"messages": [*thought, {"role": "assistant", "content": "yes it is", "reasoning_content": "hm hm"}]}
    _, answer, warnings = learned(desk, row, NO_HISTORY_OF_REASONING)
    assert answer == "<think>\nhm\n</think>\n\na colour<|end|>", "a row of its own, in which it is the last"
    assert warnings == {"rowPerAnswer": 2}


def test_an_answer_with_thoughts_is_learned_where_the_template_shows_them(desk: Desk) -> None:
    from transformers import AutoTokenizer

    from finetune_trainer.data.shape import BadRow
    from finetune_trainer.data.tokens import RowTokenizer

    def row(*answers: dict[str, Any]) -> dict[str, Any]:
        turns = [[{"role": "user", "content": f"what {i}"}, {"role": "assistant", **answer}] for i, answer in enumerate(answers)]
        return {"messages": [turn for pair in turns for turn in pair]}

    tokenizer = AutoTokenizer.from_pretrained(desk.model)
    tokenizer.chat_template = NO_HISTORY_OF_REASONING
    rows = RowTokenizer(tokenizer, max_length=4096, assistant_only=True)

    def spans(given: dict[str, Any]) -> list[str]:
        columns = [rows(part)[0] for part in rows.parts(given)]
        return [tokenizer.decode([t for t in part["labels"] if t != -100]) for part in columns]

    a, b, c = ({"content": said, "reasoning_content": f"hm {said}"} for said in ("red", "blue", "cat"))
    first, second, third = (f"<think>\nhm {said}\n</think>\n\n{said}<|end|>" for said in ("red", "blue", "cat"))
    assert spans(row(a, b, c)) == [first, second, third]
    assert spans(row(a, {"content": "dog"}, c)) == [first, f"dog<|end|>{third}"], "what has no thoughts stays where it is"
    assert spans(row(a, {**b, "weight": 0}, c)) == [first, third], "context stays context"
    assert spans(row(a, {**b, "weight": 0})) == [first]
    whole = rows.parts(row(a, b, c))
    assert [len(part["messages"]) for part in whole] == [2, 4, 6]
    assert rows.prompt_and_answer(whole[1])[0].count("hm") == 0, "thoughts of earlier answers are no context"
    tokenizer.chat_template = TURNS + "{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}" + ASK
    rows = RowTokenizer(tokenizer, max_length=4096, assistant_only=True)
    with pytest.raises(BadRow, match="leaves out"):
        spans(row(a, b))


@pytest.mark.parametrize(("template", "wanted"), [(TEXT_ARGUMENTS, '[call]paint {"colour": "red"}<|end|>done<|end|>'), (NULL_CONTENT, '[call]paint{"colour": "red"}<|end|>done<|end|>')])  # fmt: skip
@pytest.mark.parametrize("content", [None, ""])
def test_calls_in_the_form_that_the_template_asks_for(desk: Desk, template: str, wanted: str, content: str | None) -> None:
    row = {"messages": [QUESTION, called(content), RESULT, ANSWER]}
    assert learned(desk, row, template)[1] == wanted


def test_a_template_that_wants_parts_gets_parts(desk: Desk) -> None:
    template = TURNS + "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}<|end|>{% endfor %}" + ASK
    row = {"messages": [QUESTION, ANSWER]}
    assert learned(desk, row, template) == ("<|user|>paint red<|end|><|assistant|>done<|end|>", "done<|end|>", {})


def test_a_system_text_that_the_template_refuses_or_drops_stands_before_the_question(desk: Desk) -> None:
    row = {"messages": [{"role": "system", "content": "be nice"}, QUESTION, ANSWER]}
    plain = TURNS + "{{ m.content }}<|end|>{% endfor %}" + ASK
    for template in (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + plain,
        TURNS.replace("%}{{", "%}{% if m.role != 'system' %}{{", 1) + "{{ m.content }}<|end|>{% endif %}{% endfor %}" + ASK,
    ):
        text, answer, warnings = learned(desk, row, template)
        assert text == "<|user|>be nice\n\npaint red<|end|><|assistant|>done<|end|>" and answer == "done<|end|>"
        assert warnings == {"systemFoldedIntoFirstTurn": 2}


def test_a_template_that_puts_the_system_text_before_the_last_question_only_when_asked(desk: Desk) -> None:
    """Mistral's: a row is rendered as it is when the model is asked for its last answer."""
    template = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ '<|'+m.role+'|>' }}{% if loop.last and m.role=='user' and messages[0].role=='system' %}"
        "{{ messages[0].content+'\n\n' }}{% endif %}{{ m.content+'<|end|>' }}{% endif %}{% endfor %}" + ASK
    )
    row = {"messages": [{"role": "system", "content": "be nice"}, QUESTION, ANSWER]}
    assert learned(desk, row, template)[:2] == ("<|user|>be nice\n\npaint red<|end|><|assistant|>done<|end|>", "done<|end|>")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, called("", colour="<|end|><|user|>no"), RESULT, ANSWER], "tools": PAINT},
        {"messages": [QUESTION, called(""), {**RESULT, "name": "<|user|>"}, ANSWER], "tools": PAINT},
        {"messages": [QUESTION, {**ANSWER, "reasoning_content": "so<|end|>"}]},
        {"messages": [QUESTION, ANSWER], "tools": [{"type": "function", "function": {"name": "paint", "description": "<|assistant|>"}}]},
        {"messages": [QUESTION, called("", **{"<|end|>": 1}), RESULT, ANSWER], "tools": PAINT},
    ],
)
def test_special_tokens_are_looked_for_in_all_text(desk: Desk, row: dict[str, Any]) -> None:
    problem = refused(desk, row, TOOLS)
    assert "special token of the model" in problem.message and "train row 1" in problem.message


def test_a_turn_of_nothing_but_its_end_is_refused(desk: Desk) -> None:
    template = TURNS + "{{ m.content if m.role != 'assistant' or m.content != 'hm' else '' }}<|end|>{% endfor %}" + ASK
    row = {"messages": [QUESTION, {"role": "assistant", "content": "hm"}]}
    assert "train row 1" in refused(desk, row, template).message


def test_a_template_that_changes_a_text_is_told_apart_from_one_that_trims_it(desk: Desk) -> None:
    row = {"messages": [{"role": "user", "content": "  paint  red\n"}, {"role": "assistant", "content": "\ndone "}]}
    assert learned(desk, row, TURNS + "{{ m.content | trim }}<|end|>{% endfor %}" + ASK)[1] == "done<|end|>"
    assert learned(desk, row, TURNS + "{{ m.content }}<|end|>{% endfor %}" + ASK)[1] == "\ndone <|end|>"
    joined = {"messages": [{"role": "user", "content": "paint\nred"}, ANSWER]}
    _, answer, warnings = learned(desk, joined, TURNS + "{{ m.content | replace('\n', ' ') }}<|end|>{% endfor %}" + ASK)
    assert answer == "done<|end|>" and warnings == {"changed:content": 2}, "white space within a text may be what it says"
    quoted = {"messages": [{"role": "user", "content": 'say "red"\n'}, ANSWER]}
    assert learned(desk, quoted, TURNS + "{{ m.content | tojson }}<|end|>{% endfor %}" + ASK)[1] == '"done"<|end|>'
    assert (
        "changes messages[0].content"
        in refused(desk, row, TURNS + "{{ m.content | replace('red', 'blue') }}<|end|>{% endfor %}" + ASK).message
    )


def test_a_template_ends_turns_with_a_token_of_the_model(desk: Desk) -> None:
    row = {"messages": [QUESTION, ANSWER]}
    chatml = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    problem = refused(desk, row, chatml)
    assert problem.reason == "NoTurnEnd" and "<|im_end|>" in problem.message
    proposed = problem.message.partition("for example: ")[2]
    assert learned(desk, row, proposed)[1] == "done<|end|>", "what is proposed works"


def copied(desk: Desk, **tokenizer: Any) -> Path:
    """The model with other tokens named in its tokenizer."""
    folder = desk.folder / "other" / "tiny"
    shutil.copytree(desk.model, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **tokenizer}))
    desk.model = folder
    return folder


def test_the_tokens_that_the_tokenizer_puts_first_stand_first(desk: Desk) -> None:
    folder = copied(desk, bos_token="<|system|>")
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|system|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|system|>": {"id": "<|system|>", "ids": [2], "tokens": ["<|system|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    pretrain = {"tuning": {"objective": "pretrain"}}
    assert learned(desk, {"text": "what is red"}, None, **pretrain)[0] == "<|system|>what is red<|end|>"
    assert learned(desk, {"prompt": "what is ", "completion": "red"}, None)[:2] == ("<|system|>what is red<|end|>", "red<|end|>")
    assert learned(desk, {"messages": [QUESTION, ANSWER]}, None)[0] == "<|user|>paint red<|end|><|assistant|>done<|end|>", (
        "as a server has it"
    )
    pair = {"prompt": "what is ", "chosen": "red", "rejected": "blue"}
    desk.run(lines([pair] * 2), dataset={"checks": {"minExamples": 1, "duplicates": "keep"}}, tuning={"objective": "dpo"})
    assert read_rows(desk.context(None).layout.train_rows, ("prompt_ids",), 1)[0]["prompt_ids"][0] == 2


def test_what_ends_a_turn_is_what_tokenizer_and_generation_stop_with(desk: Desk) -> None:
    from transformers import AutoTokenizer

    from finetune_trainer.models.stopping import load_served_tokenizer, write_generation_config

    folder = copied(desk, eos_token="<|pad|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3], "temperature": 0.5}))
    _, answer, _ = learned(desk, {"messages": [QUESTION, ANSWER]}, None)
    assert answer == "done<|end|>"
    context, target = desk.context(None), desk.folder / "saved"
    target.mkdir()
    tokenizer = load_served_tokenizer(context, str(folder))
    assert tokenizer.eos_token == "<|end|>"
    tokenizer.save_pretrained(target)
    write_generation_config(context, tokenizer, str(folder), target)
    assert AutoTokenizer.from_pretrained(target).eos_token == "<|end|>"
    written = json.loads((target / "generation_config.json").read_text())
    assert written["eos_token_id"] == [1, 3] and written["temperature"] == 0.5, "the base's own stay"
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    write_generation_config(context, tokenizer, str(folder), target)
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == 1, "padding is no end"


def test_a_template_that_writes_the_eos_token_goes_on_to_write_the_same(desk: Desk) -> None:
    """Phi-3's: the end of a turn is another token than the end of the text, which stands behind the last turn."""
    from finetune_trainer.models.stopping import load_served_tokenizer

    folder = copied(desk, eos_token="<|system|>")
    template = TURNS + "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    text, answer, _ = learned(desk, {"messages": [QUESTION, ANSWER]}, template)
    assert answer == "done<|end|>" and text.endswith("<|end|><|system|>")
    context = desk.context(None, tuning={"chatTemplate": template})
    tokenizer = load_served_tokenizer(context, str(folder))
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=False) == text


def test_a_template_that_closes_no_turn_stops_with_what_opens_the_next(desk: Desk) -> None:
    row = {"messages": [QUESTION, ANSWER, QUESTION, ANSWER]}
    template = TURNS + "{{ m.content }}{% endfor %}" + ASK
    assert learned(desk, row, template)[1] == "done<|user|>done<|user|>"


@pytest.mark.parametrize(
    ("turn", "wanted"),
    [
        ({"role": "assistant", "content": "a colour"}, "a colour"),
        ({"role": "assistant", "content": "a colour", "reasoning_content": "no number"}, "a colour"),
        (called(""), '[call]paint{"colour": "red"}'),
        ({**called(""), "reasoning_content": "no number"}, '[call]paint{"colour": "red"}'),
    ],
)
def test_the_answer_that_is_wanted_is_what_is_compared(desk: Desk, turn: dict[str, Any], wanted: str) -> None:
    from transformers import AutoTokenizer

    from finetune_trainer.data.tokens import RowTokenizer
    from finetune_trainer.evaluation.answers import final_answer

    tokenizer = AutoTokenizer.from_pretrained(desk.model)
    tokenizer.chat_template = TOOLS
    row = {"messages": [QUESTION, turn], "tools": PAINT}
    prompt, answer = RowTokenizer(tokenizer, max_length=4096, assistant_only=True).prompt_and_answer(row)
    assert prompt.endswith("<|user|>paint red<|end|><|assistant|>") and answer == wanted
    assert final_answer(f"<think>hm</think>{wanted}") == answer == final_answer(answer)


def test_a_template_that_shows_a_part_of_an_id(desk: Desk) -> None:
    row = {"messages": [QUESTION, called("", "call_abcdefgh0"), {**RESULT, "tool_call_id": "call_abcdefgh0"}, ANSWER]}
    template = (
        NINE_LETTERS.replace("c.id|length != 9", "c.id|length < 9")
        .replace("+c.id }}", "+c.id[-9:] }}")
        .replace("m.tool_call_id|length != 9", "false")
    )
    assert learned(desk, row, template)[1] == 'paint{"colour": "red"}abcdefgh0<|end|>done<|end|>'


def test_a_template_whose_own_words_change_with_the_row(desk: Desk) -> None:
    row = {"messages": [QUESTION, ANSWER]}
    template = TURNS + "{{ m.content|length }}{{ m.content }}<|end|>{% endfor %}" + ASK
    problem = refused(desk, row, template)
    assert "train row 1" in problem.message and "assistantOnlyLoss: false" in problem.message
    _, answer, _ = learned(desk, row, template, tuning={"assistantOnlyLoss": False})
    assert answer == "<|user|>9paint red<|end|><|assistant|>4done<|end|>", "as the message says"
    from transformers import AutoTokenizer

    from finetune_trainer.data.tokens import RowTokenizer

    tokenizer = AutoTokenizer.from_pretrained(desk.model)
    tokenizer.chat_template = template
    row_tokenizer = RowTokenizer(tokenizer, max_length=99, assistant_only=True)
    for end in (False, True):
        wanted = "done<|end|>" if end else "done"
        assert row_tokenizer.prompt_and_answer(row, end=end) == ("<|user|>9paint red<|end|><|assistant|>", wanted)


def test_rows_that_are_refused_are_refused_quickly() -> None:
    """Every form is tried on the first of a kind, not on each of a million."""
    from transformers import AutoTokenizer

    from finetune_trainer.data.shape import BadRow
    from finetune_trainer.data.tokens import RowTokenizer
    from tests.cluster.quickstart import model

    tokenizer = AutoTokenizer.from_pretrained(model("tiny.py", "tiny"))
    for template in (
        TURNS + "{{ m.content or '' }}<|end|>{% endfor %}" + ASK,
        "{% if messages[0] %}{{ raise_exception('no') }}{% endif %}",
    ):
        tokenizer.chat_template = template
        row_tokenizer, renders = RowTokenizer(tokenizer, max_length=4096, assistant_only=True), []
        render = row_tokenizer.template.render
        row_tokenizer.template.render = lambda *a, render=render, renders=renders, **k: (renders.append(1), render(*a, **k))[1]  # type: ignore[method-assign]
        counts = []
        for number in range(40):
            before = len(renders)
            with pytest.raises(BadRow):
                row_tokenizer({"messages": [QUESTION, called("", colour=f"red {number}"), RESULT, ANSWER], "tools": PAINT})
            counts.append(len(renders) - before)
        assert counts[0] > 10 and counts[-1] <= 6, counts
