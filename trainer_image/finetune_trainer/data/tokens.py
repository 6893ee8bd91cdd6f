"""From a row in its common shape to token IDs and labels.

The loss mask is ours: TRL would put a chat template of its own in place of the model's where that one does not
mark the assistant's turns. A turn's tokens are found by rendering the conversation up to it, with the model's own
template, and comparing.
"""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from .formats import BadRow

IGNORED = -100
"""Label of a token that is not learned; torch.nn.CrossEntropyLoss ignores it."""


class Tokens(dict[str, list[int]]):
    """{"input_ids": [...], "labels": [...]} of one row; `truncated` when it was cut."""

    truncated = False

    @property
    def learnable(self) -> bool:
        """Whether any token is left to learn; the first has no prediction."""
        return any(label != IGNORED for label in self["labels"][1:])


class Tokeniser:
    """Turns rows into tokens with the model's tokenizer and chat template."""

    def __init__(self, tokenizer: Any, *, max_length: int, assistant_only: bool) -> None:
        self.tokenizer, self.max_length, self.assistant_only = tokenizer, max_length, assistant_only
        self._special = {t for t in tokenizer.all_special_tokens if len(t) > 2}

    def require_chat_template(self) -> None:
        """Raises UserError when the model has no chat template."""
        if not self.tokenizer.chat_template:
            raise UserError(
                "NoChatTemplate",
                "the rows are messages, but the model's tokenizer has no chat template. Use the instruct variant of the model, "
                "add a chat_template.jinja to its folder, or give the data as prompt-completion",
            )

    def special_tokens_in(self, texts: list[str]) -> str | None:
        """A special token of the model that stands in the data, where it would forge a turn's end."""
        return next((token for text in texts for token in self._special if token in text), None)

    def __call__(self, row: dict[str, Any]) -> Tokens:
        """Tokens and labels, cut to max_length."""
        if "messages" in row:
            ids, labels = self._chat(row["messages"])
        elif "prompt" in row:
            ids, labels = self._pair(row["prompt"], row["completion"])
        else:
            ids = [*self._encode(row["text"]), *self._end()]
            labels = list(ids)
        tokens = Tokens(input_ids=ids[: self.max_length], labels=labels[: self.max_length])
        tokens.truncated = len(ids) > self.max_length
        return tokens

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _end(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [] if end is None else [int(end)]

    def _pair(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        head, answer = self._encode(prompt), [*self._encode(completion), *self._end()]
        kept = [IGNORED] * len(head) if self.assistant_only else head
        return head + answer, kept + answer

    def _render(self, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))

    def prompt_text(self, row: dict[str, Any]) -> tuple[str, str]:
        """(prompt, expected answer) of a row, for generation."""
        if "messages" in row:
            return self._render(row["messages"][:-1], prompt=True), row["messages"][-1]["content"]
        if "prompt" in row:
            return row["prompt"], row["completion"]
        raise BadRow("plain text has no answer to generate")

    def _chat(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        text = self._render(messages)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        if not self.assistant_only:
            return ids, list(ids)
        spans = self._answer_spans(messages, text)
        labels = [
            token if any(start < last and first < end for first, last in spans) else IGNORED
            for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
        return ids, labels

    def _answer_spans(self, messages: list[dict[str, str]], text: str) -> list[tuple[int, int]]:
        """Character ranges of the assistant's turns, each with its end-of-turn token."""
        spans = []
        for index, turn in enumerate(messages):
            if turn["role"] != "assistant":
                continue
            before = self._render(messages[:index], prompt=True)
            upto = self._render(messages[: index + 1])
            if not upto.startswith(before) or not text.startswith(upto.rstrip()):
                raise UserError(
                    "UnstableChatTemplate",
                    "the model's chat template renders a turn differently once others follow, so the assistant's tokens cannot be told apart; "
                    "set tuning.assistantOnlyLoss: false, or give the data as prompt-completion",
                )
            spans.append((len(before), len(upto.rstrip())))
        return spans
