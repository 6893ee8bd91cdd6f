"""From a row in its common shape to token IDs and labels.

The loss mask is ours: TRL would put a chat template of its own in place of the model's where that one does not
mark the assistant's turns. Where a turn's text stands, data/rendering.py tells.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from finetune_api.spec import Objective

from ..process.errors import UserError
from .call_ids import asks_for_nine, with_nine
from .chat_template import ChatTemplate
from .rendering import Renderer, Unaligned, is_learned
from .shape import BadRow, Shape, messages_of

IGNORED = -100
"""Label of a token that is not learned; torch.nn.CrossEntropyLoss ignores it."""
_ANSWER = {"role": "assistant", "content": "answer"}


class RowTooLong(BadRow):
    """A row of which nothing to learn is left within max_length."""


class RowTokenizer:
    """Turns rows into tokens with the model's tokenizer and chat template.

    `encode` gives {"input_ids", "labels"}: the prompt and the answer that is learned or, for pairs, preferred.
    `pairs` gives what the objective's trainer reads beside or instead of it.
    """

    def __init__(
        self, tokenizer: Any, *, objective: Objective = "sft", max_length: int, assistant_only: bool, needs_answer: str | None = None
    ) -> None:
        """`needs_answer`: what compares with the row's own answer, where something does."""
        self.needs_answer = needs_answer
        self.tokenizer, self.objective, self.max_length, self.assistant_only = tokenizer, objective, max_length, assistant_only
        self.template = ChatTemplate(tokenizer)
        self.renderer = Renderer(self.template)
        self._fast = tokenizer.backend_tokenizer
        self._fast.no_truncation()
        self._fast.no_padding()

    def require_chat_template(self) -> None:
        """Raises UserError when the model has no chat template, or one whose turns do not end with a token of the model."""
        if not self.tokenizer.chat_template:
            raise UserError(
                "NoChatTemplate",
                "the rows are conversations, but the model's tokenizer has no chat template. Use the instruct variant of the model, or set "
                f"tuning.chatTemplate, for example to: {self.template.proposal()} - or give the data as prompt-completion",
            )
        if self.objective != "reward":  # which writes nothing
            _ = self.template.turn_end

    def special_token_in(self, texts: Iterable[str]) -> str | None:
        """A special token of the model that stands in the data, where it would forge a turn's end."""
        tokens, leads = self._special
        for text in texts:
            if any(lead in text for lead in leads) and (found := next((t for t in tokens if t in text), None)) is not None:
                return found
        return None

    @functools.cached_property
    def _special(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(the special tokens, their first two characters)."""
        found = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special} | set(self.tokenizer.all_special_tokens)
        if self.tokenizer.chat_template:
            try:
                found.add(self.template.turn_end)
            except UserError:  # told where conversations are read
                pass
        tokens = sorted(t for t in found if len(t) > 2 and not t.isspace())
        return tuple(tokens), tuple(sorted({t[:2] for t in tokens}))

    def fitted(self, row: Shape) -> Shape:
        """The row with ids of calls that the chat template takes."""
        calls = any("tool_calls" in turn for turn in messages_of(row))
        return with_nine(row) if calls and self.tokenizer.chat_template and self._asks_for_nine else row

    @functools.cached_property
    def _asks_for_nine(self) -> bool:
        return asks_for_nine(self.template)

    def parts(self, row: Shape) -> list[Shape]:
        """The row; or, where the template shows the reasoning of the last answer alone, also a row for each earlier one that has some.

        Such a part ends with its answer, and all before it is context: as the model is asked for it. In the row itself the answer is
        context then.
        """
        messages, tools = row.get("messages"), row.get("tools")
        if messages is None or "label" in row or self.objective == "grpo" or not self.assistant_only:
            return [row]
        thought = [i for i, turn in enumerate(messages[:-1]) if turn["role"] == "assistant" and is_learned(turn) and _reasons(turn)]
        if not thought:
            return [row]
        own = []
        try:
            silent = self.renderer.silent(messages, tools)
            for index in silent.intersection(thought):
                part = _context(messages[: index + 1], range(index))
                if index not in self.renderer.silent(part, tools):
                    own.append(index)
        except BadRow:  # told where the row is read whole
            return [row]
        found = [{**row, "messages": _context(messages[: index + 1], range(index))} for index in sorted(own)]
        rest = _context(messages, own)
        if any(turn["role"] == "assistant" and is_learned(turn) and index not in silent for index, turn in enumerate(rest)):
            found.append({**row, "messages": rest} if own else row)
        return found or [row]

    def __call__(self, row: Shape) -> tuple[dict[str, Any], bool]:
        """(columns of the row, whether it was cut to max_length). Raises BadRow when no answer token is left."""
        if self.objective == "grpo":
            prompt, answer = self.prompt_and_answer(row)
            if self.needs_answer is not None and not answer.strip():
                raise BadRow(
                    f"{self.needs_answer} compares with the row's own answer, and it has none; give it as answer, solution or completion "
                    "(dataset.columns names yours), or as the assistant's last turn"
                )
            ids = self._encode(prompt)
            if len(ids) >= self.max_length:
                raise RowTooLong(f"the prompt has {len(ids)} tokens, maxLength is {self.max_length}")
            columns = self._learned(row)[0] if answer else _joined(ids, [])
            return {**columns, "prompt": prompt, "answer": answer, "prompt_ids": ids}, False
        if "chosen" in row:
            prompt, chosen, rejected = self._pair_texts(row)
            columns, cut = self._preference(prompt, chosen, rejected)
        elif "label" in row:
            prompt, answer = self.prompt_and_answer(row, end=True)
            head, body = self._encode(prompt), self._encode(answer)
            kept = self._cut(head, body)
            columns, cut = {**_joined(head, kept), "prompt_ids": head, "completion_ids": kept, "label": row["label"]}, len(kept) < len(body)
        else:
            columns, cut = self._learned(row)
        if not any(label != IGNORED for label in columns["labels"][1:]):
            if cut:
                raise RowTooLong(f"no answer token is left within maxLength {self.max_length}")
            raise BadRow("there is no answer token")
        return columns, cut

    def _learned(self, row: Shape) -> tuple[dict[str, Any], bool]:
        if "messages" in row:
            ids, labels = self._chat(row)
        elif "completion" in row:
            head, answer = self._start(row["prompt"]), [*self._encode(row["completion"]), *self._end()]
            ids, labels = head + answer, ([IGNORED] * len(head) if self.assistant_only else head) + answer
        elif "text" in row:
            ids = [*self._start(row["text"]), *self._end()]
            labels = list(ids)
        else:
            raise BadRow("the row has a prompt and no answer to learn")
        cut = len(ids) > self.max_length
        return {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}, cut

    def _preference(self, prompt: str, chosen: str, rejected: str) -> tuple[dict[str, Any], bool]:
        head, good, bad = self._encode(prompt), self._encode(chosen), self._encode(rejected)
        kept = [self._cut(head, answer) for answer in (good, bad)]
        columns: dict[str, Any] = _joined(head, kept[0])
        if self.objective == "reward":  # whole sequences, of which the last token is scored
            columns |= {"chosen_ids": head + kept[0], "rejected_ids": head + kept[1]}
        else:
            columns |= {"prompt_ids": head, "chosen_ids": kept[0], "rejected_ids": kept[1]}
        return columns, len(kept[0]) < len(good) or len(kept[1]) < len(bad)

    def _cut(self, head: list[int], answer: list[int]) -> list[int]:
        left = self.max_length - len(head)
        if left < 1:
            raise RowTooLong(f"no answer token is left within maxLength {self.max_length}: the prompt has {len(head)}")
        return answer[:left]

    def _encode(self, text: str) -> list[int]:
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def _end(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [] if end is None else [int(end)]

    @functools.cached_property
    def _first(self) -> list[int]:
        """What the tokenizer itself puts before a text, as a served model gets it: the BOS token, or nothing."""
        alone, whole = (list(self._fast.encode("a", add_special_tokens=s).ids) for s in (False, True))
        place = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)
        return whole[:place]

    def _start(self, text: str) -> list[int]:
        """The tokens of a text that nothing stands before."""
        return self._first + self._encode(text)

    def prompt_and_answer(self, row: Shape, *, end: bool = False) -> tuple[str, str]:
        """(prompt, answer) of a row as text, for generation; with `end` the answer closes as the template or tokenizer does."""
        if "chosen" in row:
            prompt, _, _ = self._pair_texts(row)
            return prompt, row["chosen"][-1]["content"] if isinstance(row["chosen"], list) else row["chosen"]
        if "messages" in row:
            return self._asked(row["messages"], row.get("tools"), end=end)
        if "prompt" in row:
            answer = row.get("completion", "")
            return self._opened(row["prompt"]), answer + (self.tokenizer.eos_token or "") if end else answer
        raise BadRow("plain text has no answer to generate")

    def ends(self, row: Shape) -> set[str]:
        """The tokens that learned turns of a conversation end with."""
        if "messages" not in row or row["messages"][-1]["role"] != "assistant":
            return set()
        try:
            turns = self.renderer.row(row["messages"], row.get("tools")).turns
        except Unaligned:  # learned as a whole
            return set()
        return {turn.token for turn in turns if turn.learned and turn.token}

    def _opened(self, text: str) -> str:
        """A text that nothing stands before, with its first tokens written out."""
        return str(self.tokenizer.decode(self._first)) + text if self._first else text

    def _asked(self, messages: list[Shape], tools: list[Shape] | None, *, end: bool) -> tuple[str, str]:
        """The text with which the model is asked for the last answer, and that answer."""
        if messages[-1]["role"] != "assistant":
            form = self.renderer.row([*messages, _ANSWER], tools).form
            return self.template.render(messages, tools, form=replace(form, training=False), prompt=True), ""
        last = messages[-1]
        try:
            rendered = self.renderer.row(messages, tools)
        except Unaligned:
            if last.get("tool_calls"):
                raise
            return self.template.render(messages[:-1], tools, prompt=True), last["content"] + (self.template.turn_end if end else "")
        turn = rendered.turns[-1]
        if end:
            return rendered.text[: turn.start], rendered.text[turn.start : turn.end]
        prompt = self.template.render(messages[:-1], tools, form=replace(rendered.form, training=False), prompt=True)
        text = rendered.text[turn.start : turn.end]
        written = str(self.tokenizer.decode(self._encode(text), skip_special_tokens=True)).strip()
        if last.get("tool_calls"):  # of which the thoughts are no part either
            return prompt, written.rpartition("</think>")[2].strip() if last.get("reasoning_content") else written
        lead = self.template.answer_lead
        said = "</think>" in written or (lead and lead in text) or written == last["content"].strip()
        return prompt, last["content"] if said else written

    def _pair_texts(self, row: Shape) -> tuple[str, str, str]:
        if isinstance(row["prompt"], str):
            end = self.tokenizer.eos_token or ""
            return self._opened(row["prompt"]), row["chosen"] + end, row["rejected"] + end
        first, sides = len(row["prompt"]), []
        for side in ("chosen", "rejected"):
            rendered = self.renderer.row([*row["prompt"], *row[side]], row.get("tools"))
            start = next(turn.start for turn in rendered.turns if turn.index >= first)
            sides.append((rendered.text[:start], rendered.text[start : rendered.turns[-1].end]))
        (head, chosen), (other, rejected) = sides
        if head != other:  # a template that opens the turn by what it holds
            shared = os.path.commonprefix([head, other])  # noqa: RUF071 - no paths
            return shared, head[len(shared) :] + chosen, other[len(shared) :] + rejected
        return head, chosen, rejected

    def _chat(self, row: Shape) -> tuple[list[int], list[int]]:
        if not self.assistant_only:
            ids = self._encode(self.renderer.text(row["messages"], row.get("tools")))
            return ids, list(ids)
        rendered = self.renderer.row(row["messages"], row.get("tools"))
        encoded = self._fast.encode(rendered.text, add_special_tokens=False)
        ids = list(encoded.ids)
        labels, length = [IGNORED] * len(ids), len(rendered.text)
        for turn in rendered.turns:
            if turn.learned:
                start, stop = (_token_at(encoded, place, length, len(ids)) for place in (turn.start, turn.end))
                labels[start:stop] = ids[start:stop]
        return ids, labels


def _token_at(encoded: Any, place: int, length: int, count: int) -> int:
    """The first token that reaches a place of the text; white space may belong to none."""
    while place < length:
        token = encoded.char_to_token(place)
        if token is not None:
            return int(token)
        place += 1
    return count


def _reasons(turn: Shape) -> bool:
    return bool(turn.get("reasoning_content")) or "</think>" in (turn.get("content") or "")


def _context(messages: list[Shape], places: Iterable[int]) -> list[Shape]:
    """The turns, of which those of the assistant at these places are not learned."""
    kept = set(places)
    return [{**turn, "weight": 0} if i in kept and turn["role"] == "assistant" else turn for i, turn in enumerate(messages)]


def _joined(head: list[int], answer: list[int]) -> dict[str, Any]:
    return {"input_ids": head + answer, "labels": [IGNORED] * len(head) + answer}
