"""The model's chat template: rendered within limits, in the forms that templates ask for, and where it ends a turn.

Templates differ in what they take: a call's arguments as an object or as text, a call's missing content as an empty text,
as null or as no key, a content as text or as a list of parts. A form is one choice of each; which one fits is found by
trying (data/rendering.py).
"""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import dataclass, replace
from typing import Any

from ..process.errors import UserError
from ..process.limits import time_limit
from .shape import BadRow, Shape

_RENDER_SECONDS, _RENDER_GROWTH = 10.0, 1 << 20


@dataclass(frozen=True)
class Form:
    """How a row's turns are given to the template."""

    arguments: str = "object"
    """A call's arguments: object or text."""
    empty: str = "as given"
    """Content of a turn that has calls alone: as given, null, absent or text (an empty one)."""
    parts: bool = False
    """Whether content is a list of parts."""
    reasoning: str = "key"
    """Reasoning under its key, or inline: in the content, between <think> and </think>."""
    training: bool = False
    """Whether TRL's training template for this model's template renders, which keeps the reasoning that the own one drops."""
    served: bool = False
    """Whether all before the last answer is rendered as it is when the model is asked for it, with the answer behind it."""

    folded: bool = False
    """Whether the system text is put before the first turn of the user's, for templates that take none."""

    @property
    def notes(self) -> list[str]:
        """What is not as the row has it."""
        told = {
            "reasoningInline": self.reasoning == "inline", "systemFoldedIntoFirstTurn": self.folded, "trainingTemplate": self.training,
        }  # fmt: skip
        return [note for note, so in told.items() if so]

    def turns(self, messages: list[Shape]) -> list[Shape]:
        """The turns of a row as the template is given them."""
        if self.folded and len(messages) > 1 and messages[0]["role"] == "system":
            first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            messages = [first, *messages[2:]]
        return [self._turn(turn) for turn in messages]

    def _turn(self, turn: Shape) -> Shape:
        told = {key: value for key, value in turn.items() if key != "weight"}
        if self.arguments == "text" and told.get("tool_calls"):
            told["tool_calls"] = [_with_text_arguments(call) for call in told["tool_calls"]]
        if self.reasoning == "inline" and told.get("reasoning_content"):
            told["content"] = f"<think>\n{told.pop('reasoning_content')}\n</think>\n\n{told.get('content') or ''}"
        if not told.get("content"):
            if self.empty == "absent":
                told.pop("content", None)
            elif self.empty != "as given":
                told["content"] = None if self.empty == "null" else ""
        elif self.parts:
            told["content"] = [{"type": "text", "text": told["content"]}]
        return told


def _with_text_arguments(call: Shape) -> Shape:
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}}


def forms_for(messages: list[Shape], *, inline: bool) -> list[Form]:
    """The forms to try, the usual ones first. `inline`: whether reasoning may be put into the content."""
    calls = any(turn.get("tool_calls") for turn in messages)
    empty = any(not turn.get("content") for turn in messages)
    reasons = any(turn.get("reasoning_content") for turn in messages) or any("</think>" in (turn.get("content") or "") for turn in messages)
    found = [Form(arguments=a) for a in (("object", "text") if calls else ("object",))]
    if empty:
        found = [replace(form, empty=e) for e in ("as given", "absent", "null", "text") for form in found]
    found += [replace(form, served=True) for form in found]
    if messages[0]["role"] == "system":
        found += [replace(form, folded=True) for form in found if not form.served]
    found += [replace(form, parts=True) for form in found]
    if reasons:
        if inline:
            found += [replace(form, reasoning="inline") for form in found]
        found += [replace(form, training=True) for form in found]
    return found


class ChatTemplate:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special_map = dict(tokenizer.special_tokens_map)
        added = {str(token) for token in tokenizer.get_added_vocab() if not str(token).isspace() and len(str(token)) > 1}
        self._added = re.compile("|".join(re.escape(t) for t in sorted(added, key=len, reverse=True))) if added else None

    def render(self, messages: list[Shape], tools: list[Shape] | None = None, *, form: Form = Form(), prompt: bool = False) -> str:
        """The text of a conversation; with `prompt` it ends where the assistant's turn begins. Raises BadRow for what the template refuses."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._training if form.training else self.tokenizer.get_chat_template(tools=tools)
        try:
            with time_limit(_RENDER_SECONDS, "ChatTemplateTooSlow", f"the chat template takes over {_RENDER_SECONDS:.0f} s for one row"):
                # not apply_chat_template: that removes a content of null, which templates ask for
                told = form.turns(messages)
                texts, _ = render_jinja_template(
                    conversations=[told], tools=tools, chat_template=template, add_generation_prompt=prompt, **self._special_map
                )
                text = str(texts[0])
        except (UserError, MemoryError):
            raise
        except RecursionError:
            raise UserError("ChatTemplateFailed", "the chat template calls itself without end") from None
        except Exception as failure:  # whatever a template raises
            raise BadRow(f"the model's chat template refuses the row: {type(failure).__name__}: {str(failure)[:200]}") from None
        if len(text) > _RENDER_GROWTH + 100 * sum(len(str(m)) for m in messages):
            raise UserError("ChatTemplateTooLarge", f"the chat template makes {len(text)} characters of one row")
        return text

    @functools.cached_property
    def _training(self) -> str:
        """TRL's variant of the template, which keeps reasoning; the template itself where TRL has none."""
        from trl.chat_template_utils import get_training_chat_template

        try:
            return get_training_chat_template(self.tokenizer) or str(self.tokenizer.get_chat_template())
        except ValueError:
            return str(self.tokenizer.get_chat_template())

    def next_token(self, text: str, start: int = 0, end: int | None = None) -> tuple[int, str] | None:
        """(place, token) of the first token of the added vocabulary in a part of a text."""
        found = self._added.search(text, start, len(text) if end is None else end) if self._added else None
        return (found.start(), found.group()) if found else None

    def last_token(self, text: str, start: int) -> str | None:
        """The last token of the added vocabulary in the rest of a text."""
        found = self._added.findall(text, start) if self._added else []
        return str(found[-1]) if found else None

    def whole_tokens(self, text: str, length: int) -> int:
        """A length of a text that ends within no token of the added vocabulary."""
        within = (m.start() for m in self._added.finditer(text) if m.start() < length < m.end()) if self._added else iter(())
        return next(within, length)

    @functools.cached_property
    def knows_reasoning(self) -> bool:
        """Whether the template renders a turn's reasoning under its key, at least that of the last turn."""
        turns = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "answer", "reasoning_content": "because-of-this"},
        ]
        try:
            return "because-of-this" in self.render(turns)
        except BadRow:
            return False

    @functools.cached_property
    def answer_lead(self) -> str:
        """The special tokens, and words between them, behind which the answer itself begins (gpt-oss: the final channel's).

        Empty where an answer is told from thoughts by plain text, or by nothing, and without a template.
        """
        if not self.tokenizer.chat_template:
            return ""
        ask, thoughts, answer = "first question", "because-of-this", "only answer"
        turns: list[Shape] = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        try:
            asked, plain = self.render(turns[:1], prompt=True), self.render(turns).partition(answer)[0]
            plain = plain[len(os.path.commonprefix([plain, asked])) :]  # noqa: RUF071 - no paths
            thought = self.render([turns[0], {**turns[1], "reasoning_content": thoughts}]).partition(thoughts)[2].partition(answer)[0]
        except BadRow:
            return ""
        alike = os.path.commonprefix([plain[::-1], thought[::-1]])[::-1]  # noqa: RUF071 - no paths
        lead = (alike or thought or plain).rstrip()
        special = {str(token) for token in self.tokenizer.all_special_tokens}
        special |= {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        first = min((place for token in special if (place := lead.find(token)) >= 0), default=len(lead))
        return lead[first:]

    @functools.cached_property
    def closes_turns(self) -> bool:
        """Whether a token stands behind the last turn of a conversation. Where none does (GLM), it ends with what opens the next."""
        for form in (Form(), Form(parts=True)):
            try:
                text = self.render(
                    [{"role": "user", "content": "first question"}, {"role": "assistant", "content": "only answer"}], form=form
                )
            except BadRow:
                continue
            return self.next_token(text.rpartition("only answer")[2]) is not None
        return True

    @functools.cached_property
    def turn_end(self) -> str:
        """The token that ends the assistant's turn: what the model learns to stop with. Raises UserError where there is none.

        Where the template closes no turn (GLM), it is the token that opens the next one.
        """
        ask, answer, more = "first question", "only answer", "second question"
        turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        between: str | None = None
        for form in (Form(), Form(parts=True)):
            ends: list[str] = []
            for conversation in ([*turns, {"role": "user", "content": more}], turns):
                try:
                    _, found, rest = self.render(conversation, form=form).partition(answer)
                except BadRow:  # of this conversation: what the rows say of it, they say themselves
                    continue
                if found:
                    ends.append(rest.partition(more)[0])
            if not ends:
                continue
            eos = self.tokenizer.eos_token
            if eos and eos in ends[0]:  # behind a token of the answer's own (Cohere)
                return str(eos)
            for rest in reversed(ends):
                if (token := self.next_token(rest)) is not None:
                    return token[1]
            between = ends[0] if between is None else between
        if between is None and self.tokenizer.eos_token:
            return str(self.tokenizer.eos_token)
        raise UserError(
            "NoTurnEnd",
            f"the chat template ends the assistant's turn with {(between or '').strip()[:60]!r}, which is no token of the model's tokenizer: the "
            f"model could not stop. Set tuning.chatTemplate to one that ends it with such a token, for example: {self.proposal()} - or give the "
            "data as prompt-completion, which ends with the tokenizer's eos_token",
        )

    def proposal(self) -> str:
        """A template that ends turns with a token that the model has, for messages to people."""
        vocabulary = self.tokenizer.get_added_vocab()
        chatml = "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary
        start, end = ("<|im_start|>", "'<|im_end|>'") if chatml else ("### ", "eos_token")
        return (
            f"{{% for message in messages %}}{{{{ '{start}' + message['role'] + '\\n' + message['content'] + {end} + '\\n' }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ '{start}assistant\\n' }}}}{{% endif %}}"
        )
