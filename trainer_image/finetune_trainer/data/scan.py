"""One pass over a source: every row checked, tokenised and fingerprinted, in all processes of the machine, in order.

Memory does not grow with the data: rows travel in chunks, of which a few are under way at any time.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
from rensa import RMinHash

from .call_ids import REWRITTEN
from .formats import RowReader
from .reading import Row
from .rendering import NOT_RENDERED
from .sensitive import findings
from .shape import BadRow, Shape, all_strings, dumps, is_conversation, strings, system_prompt
from .tokens import IGNORED, RowTokenizer, RowTooLong
from .turns import Unused
from .workers import map_in_order

CHUNK = 512
_INLINE_CHUNKS = 4
PERMUTATIONS = 64
PER_ANSWER = "rowPerAnswer"
"""What a row is noted with of which several were made."""
_FORGED = {True: "take it out", False: "take it out, or give the conversation as messages: its chat template writes these tokens"}


@dataclass
class Scanned:
    """What became of one row."""

    number: int
    problem: str = ""
    excerpt: str = ""
    unreadable: bool = False
    too_long: bool = False
    row: str = ""
    """The row in its common shape, as JSON."""
    digest: int = 0
    """128 bits of the row's BLAKE2 digest."""
    group: int = 0
    """The same for the prompt, or for what dataset.eval.groupBy names: rows that agree in it are held out together."""
    columns: dict[str, Any] = field(default_factory=dict)
    truncated: bool = False
    length: int = 0
    learned: int = 0
    """Tokens that are learned."""
    signature: list[int] = field(default_factory=list)
    """MinHash of the row's word triples; empty when near duplicates are not looked for."""
    system: str = ""
    sensitive: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What does not stand in the text as it does in the row."""
    unused: tuple[str, ...] = ()
    """Paths of keys that hold something and were not read."""


@dataclass(frozen=True)
class Scan:
    """How the rows of a source are read: the worker processes inherit it."""

    row_tokenizer: RowTokenizer
    reader: RowReader
    similar: bool
    """Whether signatures for near duplicates are wanted."""
    answers: dict[str, str] | None = None
    """Answers of a teacher by prompt digest, which replace the rows' own."""
    group_by: str | None = None
    """Column by which rows are held out together."""

    def one(self, row: Row) -> list[Scanned]:
        """Look at one row, of which a template may make several (RowTokenizer.parts)."""
        row = row.parsed()
        if row.value is None:
            return [Scanned(row.number, row.problem, row.excerpt, unreadable=True)]
        unused: Unused = set()
        try:
            shape, _ = self.reader.read(row.value, unused)
            group = self._group(row.value, shape)
            if self.answers is not None:
                shape = with_answer(shape, self.answers)
            everything = all_strings(shape)
            forged = self.row_tokenizer.special_token_in(everything)
            if forged is not None:
                raise BadRow(
                    f"the row holds {forged!r}, a special token of the model, which would forge a turn; {_FORGED[is_conversation(shape)]}"
                )
            found = self._parts(row.number, shape, group)
        except BadRow as failure:
            return [Scanned(row.number, str(failure), too_long=isinstance(failure, RowTooLong), unused=self._untouched(unused))]
        except RecursionError:
            return [Scanned(row.number, "nested too deeply")]
        found[0].sensitive, found[0].unused = findings(everything), self._untouched(unused)
        return found

    def _parts(self, number: int, read: Shape, group: int) -> list[Scanned]:
        shape = self.row_tokenizer.fitted(read)
        parts = self.row_tokenizer.parts(shape)
        found = [self._part(number, part, group) for part in parts]
        if len(parts) > 1 or parts[0] is not shape:
            told = {note for part in found for note in part.notes} - {f"{NOT_RENDERED} reasoning_content"}
            for part in found:
                part.notes = ()
            found[0].notes = (*sorted(told), PER_ANSWER)
        found[0].notes += (REWRITTEN,) if shape is not read else ()
        return found

    def _part(self, number: int, shape: Shape, group: int) -> Scanned:
        try:
            columns, truncated = self.row_tokenizer(shape)
        except RowTooLong as failure:
            return Scanned(number, str(failure), too_long=True)
        notes = self.row_tokenizer.renderer.take_notes()
        try:
            text = dumps(shape)
        except TypeError as failure:  # bytes, from Parquet
            raise BadRow(f"holds a value that is no JSON ({failure}); write text") from None
        system = system_prompt(shape)
        return Scanned(
            number,
            row=text,
            digest=digest_of(text),
            group=group,
            columns=columns,
            truncated=truncated,
            length=len(columns["input_ids"]),
            learned=sum(label != IGNORED for label in columns["labels"]),
            signature=signature([t for t in strings(shape) if t != system]) if self.similar else [],
            system=system,
            notes=notes,
        )

    def _untouched(self, unused: Unused) -> tuple[str, ...]:
        return tuple(key for key in unused if key != self.group_by)

    def _group(self, value: dict[str, Any], shape: Shape) -> int:
        if self.group_by is None:
            return digest_of(json.dumps(first_prompt(shape), sort_keys=True, ensure_ascii=False))
        if value.get(self.group_by) is None:
            raise BadRow(f"there is no {self.group_by!r}, the column that dataset.eval.groupBy names")
        return digest_of(json.dumps(value[self.group_by], sort_keys=True, ensure_ascii=False, default=str))

    def chunk(self, rows: list[Row]) -> list[Scanned]:
        """Look at several rows."""
        return [part for row in rows for part in self.one(row)]


def digest_of(text: str) -> int:
    """128 bits that tell one text from another."""
    import hashlib

    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(), "big")


def prompt_digest(shape: Shape) -> str:
    """What a teacher's answer is filed under: the row without its own answer."""
    return f"{digest_of(dumps(without_answer(shape))):032x}"


def without_answer(shape: Shape) -> Shape:
    """The prompt of a row."""
    if "messages" in shape:
        messages = shape["messages"]
        return {**shape, "messages": messages[:-1] if messages[-1]["role"] == "assistant" else messages}
    return {key: value for key, value in shape.items() if key != "completion"}


def first_prompt(shape: Shape) -> Shape:
    """What stands before the first answer of a row. Rows that agree in it are answers to one prompt, however they go on."""
    if "messages" in shape:
        messages = shape["messages"]
        first = next((place for place, turn in enumerate(messages) if turn["role"] == "assistant"), len(messages))
        return {**shape, "messages": messages[:first]}
    return {key: value for key, value in shape.items() if key not in _ANSWERS}


_ANSWERS = ("completion", "chosen", "rejected", "label")


def with_answer(shape: Shape, answers: dict[str, str]) -> Shape:
    """The row with the teacher's answer instead of its own. Raises BadRow when the teacher gave none."""
    answer = answers.get(prompt_digest(shape), "")
    if not answer.strip():
        raise BadRow("the teacher gave no answer")
    prompt = without_answer(shape)
    if "messages" in prompt:
        return {**prompt, "messages": [*prompt["messages"], {"role": "assistant", "content": answer}]}
    return {**prompt, "completion": answer}


_WORD = re.compile(r"\w+")


def signature(texts: list[str]) -> list[int]:
    """MinHash over word triples, lower case; over single words and characters where there are too few."""
    words = _WORD.findall(" ".join(texts).lower())
    pieces = [" ".join(words[i : i + 3]) for i in range(len(words) - 2)]
    if len(pieces) < 3:
        joined = " ".join(words)
        pieces = [joined[i : i + 5] for i in range(max(1, len(joined) - 4))]
    sketch = RMinHash(num_perm=PERMUTATIONS, seed=1)
    sketch.update(pieces)
    return list(sketch.digest())


def bands(signatures: np.ndarray[Any, Any], similarity: float) -> np.ndarray[Any, Any]:
    """Keys for locality-sensitive hashing: uint64 of shape (rows, bands). Rows that share one are candidates.

    The split of the 64 values is the one whose threshold (1/b)^(1/r) lies closest below the similarity
    (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4).
    """
    choices = [(PERMUTATIONS // r, r) for r in (2, 4, 8, 16, 32)]
    count, width = min(choices, key=lambda c: abs((1 / c[0]) ** (1 / c[1]) - (similarity - 0.08)))
    grouped = signatures.astype(np.uint64).reshape(len(signatures), count, width)
    keys = np.full(grouped.shape[:2], 0xCBF29CE484222325, dtype=np.uint64) + np.arange(count, dtype=np.uint64)
    for index in range(width):  # FNV-1a over 32-bit values
        keys = (keys ^ grouped[:, :, index]) * np.uint64(0x100000001B3)
    return np.asarray(keys)


def scan_rows(scan: Scan, rows: Iterable[Row], processes: int | None = None) -> Iterator[list[Scanned]]:
    """Chunks of scanned rows, in order. Small data is looked at here, the rest in as many processes as there are cores.

    Raises StageError: also where a process died.
    """
    iterator = iter(rows)
    take: Callable[[], list[Row]] = lambda: list(islice(iterator, CHUNK))  # noqa: E731
    for _ in range(_INLINE_CHUNKS):
        chunk = take()
        if not chunk:
            return
        yield scan.chunk(chunk)
    processes = processes or len(os.sched_getaffinity(0))
    first = take()
    chunks = chain([first] if first else [], iter(take, []))
    if processes < 2 or not first:
        yield from map(scan.chunk, chunks)
    else:
        yield from map_in_order(scan.chunk, chunks, processes, lambda chunk: f"rows {chunk[0].number} to {chunk[-1].number}")
