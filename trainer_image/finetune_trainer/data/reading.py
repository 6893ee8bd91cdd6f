"""Rows of a source with their line numbers; broken ones as problems, never as a stack trace."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.uris import URI

from ..context import Context
from ..errors import UserError

LINE_LIMIT = 16 * 1024 * 1024
"""Bytes of one row; a longer one is a mistake, and would fill the memory."""
DEPTH_LIMIT = 32
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One row of a source: a value, or what is wrong with it."""

    number: int
    """Line number from 1 in JSONL, row number from 1 elsewhere."""
    value: dict[str, Any] | None = None
    problem: str = ""
    excerpt: str = ""


def rows(context: Context, uri: URI, split: str, token: str | None) -> Iterator[Row]:
    """All rows of a source. Raises UserError when the source itself cannot be read."""
    if uri.scheme == "hf":
        yield from _hub_rows(uri, split, token)
        return
    path = context.mounted(uri)
    if not path.exists():
        raise UserError("DatasetNotFound", f"{uri.scheme}://{uri.name}/{uri.path} does not exist")
    if path.is_dir():
        raise UserError("DatasetNotAFile", f"{uri.scheme}://{uri.name}/{uri.path} is a folder; name a .jsonl, .json or .csv file in it")
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from _csv_rows(path)
    elif suffix == ".json":
        yield from _json_rows(path)
    elif suffix in (".jsonl", ".ndjson"):
        yield from _jsonl_rows(path)
    else:
        raise UserError("DatasetType", f"{path.name}: files of type {suffix or '(none)'} are not supported; use .jsonl, .json or .csv")


def _excerpt(text: str, limit: int = 60) -> str:
    shown = "".join(c if c.isprintable() else " " for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "..."


def _depth(value: Any, left: int = DEPTH_LIMIT) -> bool:
    if left == 0:
        return False
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(_depth(child, left - 1) for child in children)


def _parse(number: int, data: bytes) -> Row:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as failure:
        return Row(number, problem=f"not UTF-8 at byte {failure.start + 1} of the line", excerpt=_excerpt(data.decode("utf-8", "replace")))
    try:
        value = json.loads(text)
    except RecursionError:
        return Row(number, problem="nested too deeply", excerpt=_excerpt(text))
    except ValueError as failure:
        return Row(number, problem=f"not JSON: {failure}", excerpt=_excerpt(text))
    return _row(number, value)


def _row(number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        return Row(number, problem=f"expected a JSON object, got {type(value).__name__}", excerpt=_excerpt(str(value)))
    if not _depth(value):
        return Row(number, problem=f"nested deeper than {DEPTH_LIMIT} levels", excerpt=_excerpt(str(value)[:200]))
    return Row(number, value=value)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(LINE_LIMIT + 1):
            number += 1
            if len(line) > LINE_LIMIT and not line.endswith(b"\n"):
                excerpt = _excerpt(line[:200].decode("utf-8", "replace"))
                while line and not line.endswith(b"\n"):
                    line = stream.readline(LINE_LIMIT)
                yield Row(number, problem=f"longer than {LINE_LIMIT // 2**20} MiB", excerpt=excerpt)
                continue
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                yield _parse(number, line.strip())


def _json_rows(path: Path) -> Iterator[Row]:
    if path.stat().st_size > 64 * LINE_LIMIT:
        raise UserError("DatasetTooLarge", f"{path.name} is over 1 GiB; a .json file is read at once, use .jsonl")
    try:
        document = json.loads(path.read_bytes().removeprefix(_BOM).decode("utf-8"))
    except (ValueError, RecursionError) as failure:
        raise UserError("DatasetNotJSON", f"{path.name} is no JSON document in UTF-8: {_excerpt(str(failure), 200)}") from None
    if isinstance(document, dict):
        lists = [value for value in document.values() if isinstance(value, list)]
        document = lists[0] if len(lists) == 1 else document
    if not isinstance(document, list):
        raise UserError(
            "DatasetNotAList", f"{path.name}: expected a list of rows, got {type(document).__name__}; use .jsonl or a JSON list"
        )
    for number, value in enumerate(document, start=1):
        yield _row(number, value)


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(LINE_LIMIT)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            for number, value in enumerate(csv.DictReader(stream, strict=True), start=1):
                if None in value or None in value.values():
                    yield Row(number, problem="has another number of columns than the header", excerpt=_excerpt(str(list(value.values()))))
                else:
                    yield Row(number, value=dict(value))
    except UnicodeDecodeError as failure:
        raise UserError(
            "DatasetNotUTF8", f"{path.name} is not UTF-8 at byte {failure.start + 1}; convert it, for example with iconv"
        ) from None
    except csv.Error as failure:
        raise UserError("DatasetNotCSV", f"{path.name}: {failure}") from None


def _hub_rows(uri: URI, split: str, token: str | None) -> Iterator[Row]:
    from datasets import load_dataset

    loaded = load_dataset(uri.name, revision=uri.revision or None, split=split, token=token)
    for number, value in enumerate(loaded, start=1):
        yield _row(number, dict(value))
