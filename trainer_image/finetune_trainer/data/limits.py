"""What a model can take of the rows: tokens that it has an embedding for, positions. Beyond them an index is out of range on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..process.errors import UserError
from .store import Store

Place = Callable[[int, int], str]
"""Names a row, by its origin and number."""


@dataclass(frozen=True)
class Limits:
    """What a model can take."""

    vocabulary: int
    """Tokens that it has an embedding for."""
    positions: int | None = None
    """Tokens that it has positions for, where it can have no more."""
    context: int | None = None
    """Tokens that it was made for, where more can be computed."""
    front: int = 0
    """Virtual tokens in front of each row."""
    sampled: int | None = None
    """Tokens sampled behind each prompt; None where rows are learned as they are."""


@dataclass(frozen=True)
class Beyond:
    """Rows that are longer than what a model was made for."""

    rows: int
    longest: str
    """Where the longest of them stands."""
    told: str
    """What it has, and what to set."""


def check_vocabulary(limits: Limits, store: Store, tokenizer: Any, place: Place) -> None:
    """Raise UserError when a token of the rows has no embedding. A larger tokenizer whose tokens do not occur does no harm."""
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= limits.vocabulary}
    if not beyond:
        return
    found = store.rows_with_tokens_from(limits.vocabulary)
    if found is None:
        return
    count, token, origin, number = found
    raise UserError(
        "TokensBeyondVocabulary",
        f"{count} row(s), the first {place(origin, number)}, hold tokens that the tokenizer has and the model has no embedding for, such as "
        f"{beyond.get(token, token)!r} (ID {token}; the model has {limits.vocabulary}). Give the model more with "
        "model.resize_token_embeddings(len(tokenizer)) and save it, or use the tokenizer that belongs to it",
    )


def check_length(limits: Limits, store: Store, max_length: int, place: Place) -> Beyond | None:
    """Raise UserError for rows that are longer than the model has positions for. Returns those that it was not made for."""
    behind = limits.sampled or 0
    extra = f" with {limits.front} virtual tokens in front" if limits.front else ""
    extra += f" and tuning.grpo.maxNewTokens {behind} behind" if behind else ""

    def longer(most: int | None) -> tuple[int, int, str, str]:
        """(rows that need more, tokens and place of the longest, what to set)."""
        if most is None or max_length + limits.front + behind <= most:
            return 0, 0, "", ""
        room = most - limits.front - behind
        rows, longest, origin, number = store.longer_than(room, prompts=limits.sampled is not None)
        return (
            rows,
            longest,
            place(origin, number) if rows else "",
            "lower maxNewTokens" if room < 16 else f"set hyperparameters.maxLength to {room}",
        )

    rows, longest, where, fewer = longer(limits.positions)
    if rows:
        raise UserError(
            "LongerThanPositions",
            f"the model has {limits.positions} positions, and {rows} row(s) need more{extra}; the longest, {where}, has {longest} "
            f"tokens. {fewer[:1].upper()}{fewer[1:]} (dataset.checks.tooLong says what becomes of longer rows), or use a model with more positions",
        )
    rows, longest, where, fewer = longer(limits.context)
    told = f"{longest} tokens{extra}, and the model was made for {limits.context}: what it says beyond is a guess; {fewer}, or use a model with a longer context"
    return Beyond(rows, where, told) if rows else None
