"""From a row in its common shape to token IDs and labels.

The loss mask is ours: TRL would put a chat template of its own in place of the model's where that one does not
mark the assistant's turns. A turn's tokens are found by rendering the conversation up to it, with the model's own
template, and comparing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune_api.spec import Objective

from ..process.errors import UserError
from ..process.limits import time_limit
from .formats import BadRow, Shape

IGNORED = -100
"""Label of a token that is not learned; torch.nn.CrossEntropyLoss ignores it."""
_RENDER_SECONDS, _RENDER_GROWTH = 10.0, 1 << 20
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""What is proposed to users whose model has no chat template."""


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
        self._special = {t for t in tokenizer.all_special_tokens if len(t) > 2}
        self._fast = tokenizer.backend_tokenizer
        self._fast.no_truncation()
        self._fast.no_padding()

    def require_chat_template(self) -> None:
        """Raises UserError when the model has no chat template."""
        if not self.tokenizer.chat_template:
            raise UserError(
                "NoChatTemplate",
                "the rows are conversations, but the model's tokenizer has no chat template. Use the instruct variant of the model, or set "
                f"tuning.chatTemplate, for example to ChatML: {CHATML} - or give the data as prompt-completion",
            )

    def special_token_in(self, texts: Sequence[str]) -> str | None:
        """A special token of the model that stands in the data, where it would forge a turn's end."""
        return next((token for text in texts for token in self._special if token in text), None)

    def __call__(self, row: Shape) -> tuple[dict[str, Any], bool]:
        """(columns of the row, whether it was cut to max_length). Raises BadRow when no answer token is left."""
        if self.objective == "grpo":
            prompt, answer = self.prompt_and_answer(row)
            if self.needs_answer is not None and not answer.strip():
                raise BadRow(
                    f"{self.needs_answer} compares with the row's own answer, and it has none; give it as answer, solution or completion, or as "
                    "the assistant's last turn"
                )
            ids = self._encode(prompt)
            if len(ids) >= self.max_length:
                raise RowTooLong(f"the prompt has {len(ids)} tokens, maxLength is {self.max_length}")
            return {**self._answer_columns(row, answer), "prompt": prompt, "answer": answer, "prompt_ids": ids}, False
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

    def _answer_columns(self, row: Shape, answer: str) -> dict[str, Any]:
        if not answer:  # a prompt alone
            ids = self._encode(self.prompt_and_answer(row)[0])
            return {"input_ids": ids, "labels": [IGNORED] * len(ids)}
        return self._learned(row)[0]

    def _learned(self, row: Shape) -> tuple[dict[str, Any], bool]:
        if "messages" in row:
            ids, labels = self._chat(row)
        elif "completion" in row:
            head, answer = self._encode(row["prompt"]), [*self._encode(row["completion"]), *self._end()]
            ids, labels = head + answer, ([IGNORED] * len(head) if self.assistant_only else head) + answer
        elif "text" in row:
            ids = [*self._encode(row["text"]), *self._end()]
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

    def _render(self, messages: list[Shape], tools: list[Shape] | None = None, *, prompt: bool = False) -> str:
        try:
            with time_limit(_RENDER_SECONDS, "ChatTemplateTooSlow", f"the chat template takes over {_RENDER_SECONDS:.0f} s for one row"):
                text = str(self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt))
        except (UserError, MemoryError):
            raise
        except RecursionError:
            raise UserError("ChatTemplateFailed", "the chat template calls itself without end") from None
        except Exception as failure:  # whatever a template raises
            raise BadRow(f"the model's chat template refuses the row: {type(failure).__name__}: {str(failure)[:200]}") from None
        if len(text) > _RENDER_GROWTH + 100 * sum(len(str(m)) for m in messages):
            raise UserError("ChatTemplateTooLarge", f"the chat template makes {len(text)} characters of one row")
        return text

    def prompt_and_answer(self, row: Shape, *, end: bool = False) -> tuple[str, str]:
        """(prompt, answer) of a row as text, for generation; with `end` the answer closes as the template or tokenizer does."""
        if "chosen" in row:
            prompt, _, _ = self._pair_texts(row)
            return prompt, row["chosen"][-1]["content"] if isinstance(row["chosen"], list) else row["chosen"]
        if "messages" in row:
            messages, tools = row["messages"], row.get("tools")
            if messages[-1]["role"] != "assistant":
                return self._render(messages, tools, prompt=True), ""
            head = self._render(messages[:-1], tools, prompt=True)
            return head, self._rest(head, messages, tools) if end else messages[-1]["content"]
        if "prompt" in row:
            answer = row.get("completion", "")
            return row["prompt"], answer + (self.tokenizer.eos_token or "") if end else answer
        raise BadRow("plain text has no answer to generate")

    def _pair_texts(self, row: Shape) -> tuple[str, str, str]:
        if isinstance(row["prompt"], str):
            end = self.tokenizer.eos_token or ""
            return row["prompt"], row["chosen"] + end, row["rejected"] + end
        head = self._render(row["prompt"], prompt=True)
        return head, *(self._rest(head, [*row["prompt"], *row[side]], None) for side in ("chosen", "rejected"))  # type: ignore[return-value]

    def _rest(self, head: str, messages: list[Shape], tools: list[Shape] | None) -> str:
        text = self._render(messages, tools)
        if not text.startswith(head):
            raise UserError("UnstableChatTemplate", _UNSTABLE)
        return text[len(head) :].rstrip("\n")

    def _chat(self, row: Shape) -> tuple[list[int], list[int]]:
        messages, tools = row["messages"], row.get("tools")
        text = self._render(messages, tools)
        encoded = self._fast.encode(text, add_special_tokens=False)
        ids = list(encoded.ids)
        if not self.assistant_only:
            return ids, list(ids)
        labels, spans, place = [], self._answer_spans(messages, tools, text), 0
        for token, (start, stop) in zip(ids, encoded.offsets, strict=True):
            while place < len(spans) and spans[place][1] <= start:
                place += 1
            inside = place < len(spans) and start < spans[place][1] and spans[place][0] < stop
            labels.append(token if inside else IGNORED)
        return ids, labels

    def _answer_spans(self, messages: list[Shape], tools: list[Shape] | None, text: str) -> list[tuple[int, int]]:
        """Character ranges of the assistant's turns, each with its end-of-turn token."""
        spans = []
        for index, turn in enumerate(messages):
            if turn["role"] != "assistant":
                continue
            before = self._render(messages[:index], tools, prompt=True)
            upto = text if index == len(messages) - 1 else self._render(messages[: index + 1], tools)
            if not upto.startswith(before) or not text.startswith(upto.rstrip()):
                raise UserError("UnstableChatTemplate", _UNSTABLE)
            spans.append((len(before), len(upto.rstrip())))
        return spans


_UNSTABLE = (
    "the model's chat template renders a turn differently once others follow, so the assistant's tokens cannot be told apart; "
    "set tuning.assistantOnlyLoss: false or another tuning.chatTemplate, or give the data as prompt-completion"
)


def _joined(head: list[int], answer: list[int]) -> dict[str, Any]:
    return {"input_ids": head + answer, "labels": [IGNORED] * len(head) + answer}
