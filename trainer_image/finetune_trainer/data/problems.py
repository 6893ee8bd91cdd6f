"""What is found wrong with rows: counted by kind and cause, the first places of each kept; and where a row stands."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field

SHOWN = 10
"""Places that are shown of a cause."""
_CAUSES, _TOLD, _LENGTH, _KEYS = 50, 5, 2400, 1000
"""Causes kept of a kind; those that a message tells, and its characters; names of keys that are kept."""
_VARIES = re.compile(r"\d+|'[^']*'")
"""What differs between two messages of one cause: indices and quoted values."""


@dataclass
class Files:
    """The files of a source, so that a row is told by file and line. Rows of a folder are counted through."""

    names: list[str] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    """Rows, or lines, before each file."""
    by_line: bool = False

    def begin(self, name: str, before: int, *, by_line: bool) -> None:
        """The next file."""
        self.names.append(name)
        self.first.append(before)
        self.by_line = by_line

    def place(self, number: int) -> str:
        """`row 7 (train.jsonl:7)`."""
        if not self.names:
            return f"row {number}"
        index = max(0, bisect_right(self.first, number - 1) - 1)
        inside = number - self.first[index]
        return f"row {number} ({self.names[index]}{f':{inside}' if self.by_line else f' row {inside}'})"


@dataclass
class Cause:
    """One cause, with the first of its places."""

    rows: int = 0
    places: list[tuple[str, str]] = field(default_factory=list)
    """(place, what was found there)."""

    def describe(self) -> str:
        """Told once; places whose words are the same are only named."""
        (first, detail), *others = self.places
        same = [place for place, other in others if other == detail]
        told = [f"{first}: {detail}", *(f"{place}: {other}" for place, other in others if other != detail)]
        text = "; ".join(told) + (f"; the same in {', '.join(same)}" if same else "")
        more = self.rows - len(self.places)
        return text + (f"; and {more} more" if more > 0 else "")


@dataclass
class Problems:
    """What was found wrong, by kind."""

    counts: Counter[str] = field(default_factory=Counter)
    causes: dict[str, dict[str, Cause]] = field(default_factory=dict)

    def add(self, kind: str, place: str, detail: str, excerpt: str = "", count: int = 1) -> None:
        """Note a row, or several with one place shown."""
        self.counts[kind] += count
        causes = self.causes.setdefault(kind, {})
        key = _VARIES.sub("#", detail)
        if key not in causes and len(causes) >= _CAUSES:
            key = next(reversed(causes))
        cause = causes.setdefault(key, Cause())
        cause.rows += count
        if len(cause.places) < SHOWN:
            cause.places.append((place, detail + (f" [{excerpt}]" if excerpt else "")))

    def describe(self, kind: str, kinds: int = 1) -> str:
        """Count, causes and first places, for a message that tells so many kinds."""
        causes = list(self.causes[kind].values())
        told = "; ".join(cause.describe() for cause in causes[:_TOLD])
        left = sum(cause.rows for cause in causes[_TOLD:])
        told = told if len(told) <= _LENGTH // kinds else f"{told[: _LENGTH // kinds]}..."
        return f"{self.counts[kind]} row(s): {told}" + (f"; and {left} row(s) of other causes" if left else "")

    def wire(self) -> dict[str, object]:
        """As JSON, for the report."""
        return {
            kind: {
                "rows": rows,
                "first": [f"{place}: {detail}" for cause in self.causes[kind].values() for place, detail in cause.places][:_CAUSES],
                "causes": [{"rows": cause.rows, "what": cause.places[0][1]} for cause in self.causes[kind].values()],
            }
            for kind, rows in self.counts.items()
        }


class Keys:
    """Keys that rows have and nothing reads: rows by name. Of data whose keys are values, the first names are kept."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()

    def add(self, names: tuple[str, ...]) -> None:
        """Those of one row."""
        for name in names:
            shown = "".join(c if c.isprintable() else "?" for c in name[:100]) or "(no name)"
            self._rows[shown if shown in self._rows or len(self._rows) < _KEYS else "(other keys)"] += 1

    def all(self) -> dict[str, int]:
        """Rows by key, the commonest first."""
        return dict(sorted(self._rows.items(), key=lambda entry: (-entry[1], entry[0])))

    def brief(self, size: int = 700) -> dict[str, int]:
        """The commonest of them: as many as so many bytes of a pod's last words hold."""
        found = {}
        for name, rows in self.all().items():
            size -= len(json.dumps(name)) + 12
            if size < 0:
                break
            found[name] = rows
        return found
