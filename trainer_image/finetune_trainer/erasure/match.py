"""What belongs to the rows that are to go. Pure but for reading the file of rows.

A prepared row is compared by what is said in it, turn by turn, and not by its JSON: columns, format, system text, or a template that
makes several rows of one, do not matter. Case, white space and Unicode's forms do not either.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_api.erasure import Reading, RowsFile
from finetune_api.probing import Probe

from ..data.formats import FORMATS, RowReader, looks_like, rename, usual_names
from ..data.prompts import prompt_key
from ..data.reading import file_rows
from ..data.scan import first_prompt, prompt_digest, without_answer
from ..data.shape import BadRow, Shape, all_strings, strings, system_prompt
from ..process.errors import UserError

Said = tuple[str, ...]
"""What is said in a row, in order, without its system text."""
_TELLING = 24
"""Characters of a prompt that are enough to know a row by; of a shorter one the answer has to be there, too."""
_CUT = 16
"""Characters that have to be left of a text that was cut off."""
_ANSWERS = ("completion", "chosen", "rejected")
_ORDER = ("messages", "prompt", "text", *_ANSWERS)


class BadMatch(UserError):
    """What was asked for names no row. No job ends with it."""

    def __init__(self, message: str) -> None:
        super().__init__("BadMatch", message)


def plain(text: str) -> str:
    """As texts are compared."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _said(shape: Shape) -> Said:
    system = system_prompt(shape)
    found = [plain(text) for text in strings({key: shape[key] for key in _ORDER if key in shape}) if text != system]
    return tuple(text for text in found if text)


class Match:
    """Whose rows go."""

    def __init__(self, containing: Sequence[str] = (), shapes: Iterable[Shape] = (), *, rows: int = 0) -> None:
        """`shapes`: the rows in all the ways in which jobs may have read them; `rows`: how many they are."""
        self.containing, self.rows = [plain(text) for text in containing], rows
        self.keys: set[bytes] = set()
        """As in prompts/NUMBER.bin."""
        self._whole: set[Said] = set()
        self._asked: set[Said] = set()
        self._prompts: set[Said] = set()
        self._needed: set[Said] = set()
        self._digests: set[str] = set()
        for shape in shapes:
            self._add(shape)

    def _add(self, shape: Shape) -> None:
        whole, first = _said(shape), _said(first_prompt(shape))
        self.keys.add(prompt_key(shape))
        self._digests.add(prompt_digest(shape))
        self._prompts.add(_said(_question(shape)))
        self._needed.add(first if len(" ".join(first)) >= _TELLING else whole[: len(first) + 1])
        if whole == first and "text" not in shape:  # a prompt alone: whatever was answered
            self._asked.add(first)
            return
        self._whole.add(whole)
        if "messages" in shape:  # a template may have made a row of each answer
            self._whole.update(whole[:length] for length in range(len(first) + 1, len(whole)))

    def row(self, shape: Shape, *, by_prompt: bool = False) -> bool:
        """Whether a prepared row goes. `by_prompt`: its answer is a teacher's, and not the row's own."""
        if self.containing and self.text(" \n ".join(all_strings(shape))):
            return True
        if not self.keys:
            return False
        said = _said(shape)
        if said in self._whole or _said(first_prompt(shape)) in self._asked:
            return True
        return by_prompt and _said(_question(shape)) in self._prompts

    def digest(self, digest: str) -> bool:
        """Whether a teacher's answer is to one of the rows."""
        return digest in self._digests

    def text(self, text: str) -> bool:
        """Whether a text holds one of the texts that were named."""
        found = plain(text)
        return any(wanted in found for wanted in self.containing)

    def mentions(self, text: str) -> bool:
        """Whether a text, such as a rendered prompt, an excerpt or a sample, shows one of the rows."""
        if self.containing and self.text(text):
            return True
        found = plain(text)
        return any(_holds(found, needed) for needed in self._needed) or self._is_piece(found)

    def probe(self, probe: Probe) -> bool:
        """Whether a probe is one of the rows, or one of the models said in it what was named."""
        asked = _said({"messages": probe.messages})
        texts = [probe.prompt, *(f"{probe.prompt}{answer.text}" for answer in probe.answers), *strings({"messages": probe.messages})]
        return bool(asked and (asked in self._prompts or asked in self._asked)) or any(map(self.mentions, texts))

    def _is_piece(self, found: str) -> bool:
        return len(found) >= _TELLING and any(found in text for whole in self._whole for text in whole)


def _question(shape: Shape) -> Shape:
    return {key: value for key, value in without_answer(shape).items() if key not in _ANSWERS}


def _holds(found: str, needed: Said) -> bool:
    """Whether all of these texts stand there, in this order; the text may be cut off where it ends."""
    at = 0
    for text in needed:
        place = _word(found, text, at)
        if place < 0:
            return _is_cut(found[at:], text)
        at = place + len(text)
    return bool(needed)


def _word(found: str, text: str, at: int) -> int:
    """Where a text stands that is no part of a longer word, or -1."""
    if text not in found:  # which is told without an expression for each
        return -1
    head, tail = (r"(?<!\w)" if text[:1].isalnum() else "", r"(?!\w)" if text[-1:].isalnum() else "")
    match = re.compile(f"{head}{re.escape(text)}{tail}").search(found, at)
    return -1 if match is None else match.start()


def _is_cut(found: str, text: str) -> bool:
    return text[:_CUT] in found and any(found.endswith(text[:length]) for length in range(min(len(text), len(found)), _CUT - 1, -1))


def make_match(containing: Sequence[str], file: RowsFile | None, where: dict[str, str], readings: Sequence[Reading]) -> Match:
    """Raises UserError for what names no row."""
    for text in containing:
        if len(plain(text)) < 3:
            raise BadMatch(f"--containing {text!r}: less than three characters are in nearly every row; write more of it")
    if file is None:
        if where:
            column = next(iter(where))
            raise BadMatch(
                f"--where {column}=...: prepared rows keep no column {column}; give the rows as they stood in your data: --rows FILE",
            )
        if not containing:
            raise BadMatch("nothing says which rows: give --containing TEXT, or --rows FILE, also with --where COLUMN=VALUE")
        return Match(containing)
    values = list(_selected(_read(file), file.name, where))
    return Match(containing, _shapes(values, file.name, readings), rows=len(values))


def _read(file: RowsFile) -> list[dict[str, Any]]:
    """Raises UserError as prepare does for a data set."""
    try:
        content = base64.b64decode(file.content, validate=True)
    except binascii.Error as failure:
        raise BadMatch(f"--rows {file.name}: {failure}") from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, PurePosixPath(file.name).name)
        path.write_bytes(content)
        found = []
        for row in (row.parsed() for row in file_rows(path)):
            if row.value is None:
                raise BadMatch(f"--rows {path.name}: row {row.number} {row.problem}; mend it, or give those rows alone")
            found.append(row.value)
    return found


def _selected(values: list[dict[str, Any]], name: str, where: dict[str, str]) -> Iterator[dict[str, Any]]:
    for column in where:
        if not any(_at(value, column) is not None for value in values):
            known = ", ".join(sorted({str(key) for value in values for key in value})[:20])
            raise BadMatch(f"--where {column}=...: no row of {name} has that column; there are: {known or 'none'}")
    found = [value for value in values if all(_is(_at(value, column), wanted) for column, wanted in where.items())]
    if not found:
        told = " and ".join(f"{column}={wanted}" for column, wanted in where.items())
        raise BadMatch(f"--rows {name}: none of its {len(values)} rows {f'has {told}' if told else 'is there'}; nothing to look for")
    yield from found


def _at(value: Any, column: str) -> Any:
    if isinstance(value, dict) and column in value:
        return value[column]
    head, _, rest = column.partition(".")
    return _at(value[head], rest) if rest and isinstance(value, dict) and head in value else None


def _is(value: Any, wanted: str) -> bool:
    if isinstance(value, bool) or value is None:
        return json.dumps(value) == wanted
    return str(value) == wanted


def _shapes(values: list[dict[str, Any]], name: str, readings: Sequence[Reading]) -> list[Shape]:
    """Every row in every way in which a job may have read it. Raises UserError for one that can be read in none."""
    ways = [*readings, Reading(), Reading(columns=usual_names(values))]
    found: list[Shape] = []
    for number, value in enumerate(values, start=1):
        before, why = len(found), "is of no known format; name its columns as the jobs do: --column QUESTION=prompt"
        for way in ways:
            row = rename(value, way.columns)
            kind = way.format if way.format in FORMATS else looks_like(row)
            for chat in (False, True) if kind is not None else ():
                try:
                    found.append(RowReader(str(kind), way.columns, chat=chat, filled=True).read(value)[0])
                except BadRow as failure:
                    why = str(failure)
        if len(found) == before:
            raise BadMatch(f"--rows {name}: row {number} of those that were chosen: {why}")
    return found
