"""Use of models that is not in the store yet: counted in memory, by day, model and caller. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import NamedTuple

from finetune_api.base import shortened
from finetune_api.scalars import printable

from .choosing import Target

MOST_ROWS = 10_000
"""What is counted beyond so many rows at once is lost, and told: memory stays bounded while the store is away."""
MOST_TOKENS = 2**31
"""Of one request: a replica that tells more is wrong, and sums must fit the store's numbers."""
_LONGEST_NAME = 253


class Use(NamedTuple):
    """A row: what is counted together. In order."""

    day: date
    """In UTC."""
    namespace: str
    model: str
    version: int
    """0: a base."""
    key: str
    user: str


@dataclass(slots=True)
class Amount:
    """How much of it."""

    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def user_name(name: str) -> str:
    """A user's name as the store takes it: what is too long, or cannot be printed, is told by a digest."""
    text = printable(name)
    if text == name and len(text) <= _LONGEST_NAME:
        return name
    return f"{shortened(text, 200)}~{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:32]}"


class Ledger:
    """What is to be written."""

    def __init__(self, today: Callable[[], date], most_rows: int = MOST_ROWS) -> None:
        """`today`: in UTC."""
        self._today, self._most = today, most_rows
        self._rows: dict[Use, Amount] = {}
        self.lost = 0
        """Requests for which there was no room."""

    def request(self, target: Target, key: str, user: str, *, error: bool) -> None:
        """One has ended."""
        amount = self._amount(target, key, user)
        if amount is None:
            self.lost += 1
            return
        amount.requests += 1
        amount.errors += error

    def broken(self, target: Target, key: str, user: str) -> None:
        """An answer that had begun is not whole."""
        amount = self._amount(target, key, user)
        if amount is not None:
            amount.errors += 1

    def tokens(self, target: Target, key: str, user: str, prompt: int, completion: int) -> None:
        """What an answer took."""
        amount = self._amount(target, key, user)
        if amount is not None:
            amount.prompt_tokens += min(prompt, MOST_TOKENS)
            amount.completion_tokens += min(completion, MOST_TOKENS)

    def _amount(self, target: Target, key: str, user: str) -> Amount | None:
        use = Use(self._today(), target.endpoint[0], target.model, target.version or 0, key, user_name(user))
        amount = self._rows.get(use)
        if amount is None and len(self._rows) < self._most:
            amount = self._rows[use] = Amount()
        return amount

    @property
    def requests(self) -> int:
        """That are counted here."""
        return sum(amount.requests for amount in self._rows.values())

    def take(self) -> list[tuple[Use, Amount]]:
        """All of it, in order, so that two gateways which write it do not wait for each other in a circle; it begins anew."""
        taken, self._rows = sorted(self._rows.items()), {}
        return taken
