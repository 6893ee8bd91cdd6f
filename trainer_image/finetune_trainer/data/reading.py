"""Rows of a source with their line numbers; broken ones as problems, never as a stack trace. Memory is constant."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from finetune_api.spec import DatasetSource
from finetune_api.uris import parse_uri

from ..job.context import Context
from ..process.errors import UserError
from ..remote.retry import error_for_exception, hub_host, with_retries
from .fetch import TYPES, fetch
from .nulls import without_nulls
from .problems import Files

LINE_LIMIT = 16 * 1024 * 1024
"""Bytes of one row; a longer one is a mistake, and would fill the memory."""
JSON_LIMIT = 256 * 1024 * 1024
"""Bytes of a .json file, which is read at once."""
DEPTH_LIMIT = 32
FILES_LIMIT = 10_000
"""Files of a folder."""
_COLUMNS = {"messages", "conversations", "chosen", "rejected"}
"""Columns that hold a list of turns: no list of rows."""
EXPANSION_LIMIT = 200
"""How many times larger than its file a gzipped data set may be (beyond the first 64 MiB): real text stays below 30."""
_BOM = b"\xef\xbb\xbf"
_BY_LINE = (".jsonl", ".ndjson", ".csv")
_ARCHIVES = (".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


@dataclass(frozen=True)
class Row:
    """One row of a source: a value, or bytes that are still to be parsed, or what is wrong with it."""

    number: int
    """Line number from 1 in JSONL and CSV, row number from 1 elsewhere; of a folder, counted through."""
    value: dict[str, Any] | None = None
    problem: str = ""
    excerpt: str = ""
    raw: bytes | None = None

    def parsed(self) -> Row:
        """The row with its JSON parsed."""
        return self if self.raw is None else _parse(self.number, self.raw)


def rows(context: Context, source: DatasetSource, field: str, files: Files | None = None) -> Iterator[Row]:
    """All rows of a source; `field` names its secret, `files` learns where its files begin. Raises UserError when the source itself cannot be read."""
    uri = parse_uri(source.uri)
    if uri.scheme == "hf":
        yield from _hub_rows(source, context.secret(field))
        return
    path = context.mounted(uri) if uri.scheme in ("pvc", "configmap") else fetch(context, source, field)
    if not path.exists():
        raise UserError("DatasetNotFound", f"{source.uri} does not exist")
    number = 0
    for file in _files(path, source.uri):
        before = number
        if files is not None:
            files.begin(file.name, before, by_line=_type(file) in _BY_LINE)
        for row in file_rows(file):
            number = before + row.number
            yield row if not before else Row(number, row.value, row.problem, row.excerpt, row.raw)


def _files(path: Path, shown: str) -> list[Path]:
    """The file, or those of a folder: all of one type, in the order of their names."""
    if path.is_file():
        return [path]
    inside = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".") and _type(p) is not None)
    if not inside or len(inside) > FILES_LIMIT:
        found = "no" if not inside else f"over {FILES_LIMIT}"
        raise UserError("DatasetNotAFile", f"{shown} is a folder with {found} {', '.join(TYPES)} files; name a file in it")
    if len({_type(p) for p in inside}) > 1:
        raise UserError(
            "DatasetNotAFile", f"{shown} is a folder with files of several types; name one of {', '.join(p.name for p in inside[:5])}"
        )
    root = path.resolve()
    if any(root not in p.resolve().parents for p in inside):
        raise UserError("PathLeavesVolume", f"{shown} holds a link that leads out of it")
    return inside


def _type(path: Path) -> str | None:
    suffix = path.suffix.lower() if path.suffix.lower() != ".gz" else Path(path.stem).suffix.lower()
    return suffix if suffix in TYPES else None


def file_rows(path: Path) -> Iterator[Row]:
    """All rows of one file."""
    kind = _type(path)
    if kind is None:
        if path.suffix.lower() in _ARCHIVES or Path(path.stem).suffix.lower() == ".tar":
            raise UserError("DatasetType", f"{path.name} is an archive, which is not unpacked; give the files themselves (.gz is fine)")
        raise UserError(
            "DatasetType", f"{path.name}: files of type {path.suffix or '(none)'} are not supported; use {', '.join(TYPES)}, also with .gz"
        )
    if kind == ".parquet":
        yield from _parquet_rows(path)
        return
    with _open(path) as stream:
        try:
            yield from {".csv": _csv_rows, ".json": _json_rows}.get(kind, _jsonl_rows)(stream, path.name)
        except (gzip.BadGzipFile, EOFError, zlib.error) as failure:
            raise UserError("DatasetNotGzip", f"{path.name} is no intact gzip file: {_excerpt(str(failure), 200)}") from None


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() != ".gz":
        return path.open("rb")
    return io.BufferedReader(_Bounded(path))  # type: ignore[return-value]


class _Bounded(gzip.GzipFile):
    """A gzip file that refuses to grow without end: a decompression bomb (case A5)."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self._most, self._path, self._grown = 64 * 2**20 + EXPANSION_LIMIT * path.stat().st_size, path, 0

    def _count(self, size: int) -> None:
        self._grown += size
        if self._grown > self._most:
            raise UserError(
                "DecompressionBomb", f"{self._path.name} grows to more than {EXPANSION_LIMIT} times its size; give it uncompressed"
            )

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(min(size, 1 << 20) if size is not None and size >= 0 else 1 << 20)
        self._count(len(data))
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _excerpt(text: str, limit: int = 60) -> str:
    shown = "".join(c if c.isprintable() else " " for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "..."


def _depth(value: Any, left: int = DEPTH_LIMIT) -> bool:
    if left == 0:
        return False
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(_depth(child, left - 1) for child in children)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which no key stands twice: Python would keep the last of them in silence."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"key {_twice([key for key, _ in pairs])!r} stands twice in one object")
    return value


def _twice(names: Iterable[str]) -> str | None:
    """The first name that stands twice."""
    seen: set[str] = set()
    return next((_excerpt(name, 40) for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


_decode = json.JSONDecoder(object_pairs_hook=_pairs).decode


def _parse(number: int, data: bytes) -> Row:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as failure:
        return Row(number, problem=f"not UTF-8 at byte {failure.start + 1} of the line", excerpt=_excerpt(data.decode("utf-8", "replace")))
    try:
        value = _decode(text)
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


def _jsonl_rows(stream: BinaryIO, _: str) -> Iterator[Row]:
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
        if stripped := line.strip():
            yield Row(number, raw=stripped)


def _json_rows(stream: BinaryIO, name: str) -> Iterator[Row]:
    first = stream.readline(LINE_LIMIT + 1)
    if _is_object(first.removeprefix(_BOM)) and (second := _next_line(stream)):  # many a .json file holds one object a line
        yield from _jsonl_rows(_Chained((first, second), stream), name)  # type: ignore[arg-type]
        return
    data = first + b"".join(iter(lambda: stream.read(1 << 20) if stream.tell() <= JSON_LIMIT else b"", b""))
    if len(data) > JSON_LIMIT:
        raise UserError("DatasetTooLarge", f"{name} is over {JSON_LIMIT // 2**20} MiB; a .json file is read at once, use .jsonl")
    try:
        document = _decode(data.removeprefix(_BOM).decode("utf-8"))
    except (ValueError, RecursionError) as failure:
        hint = "; where it holds one object a line, rename it to .jsonl" if "Extra data" in str(failure) else ""
        raise UserError("DatasetNotJSON", f"{name} is no JSON document in UTF-8: {_excerpt(str(failure), 200)}{hint}") from None
    if isinstance(document, dict):
        lists = [value for key, value in document.items() if isinstance(value, list) and key not in _COLUMNS]
        document = lists[0] if len(lists) == 1 else document
    if not isinstance(document, list):
        held = f"an object with {_excerpt(', '.join(map(repr, document)), 100)}" if isinstance(document, dict) else type(document).__name__
        raise UserError(
            "DatasetNotAList", f"{name}: expected a list of rows, or an object with one such list, got {held}; use .jsonl or a JSON list"
        )
    for number, value in enumerate(document, start=1):
        yield _row(number, value)


def _is_object(line: bytes) -> bool:
    try:
        return line.lstrip()[:1] == b"{" and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _next_line(stream: BinaryIO) -> bytes:
    """The next line that holds something, with what is blank before it."""
    blank = b""
    while (line := stream.readline(LINE_LIMIT + 1)) and not line.strip():
        blank += line
    return blank + line if line else b""


class _Chained:
    """Lines that were read already, then the rest of their file."""

    def __init__(self, lines: tuple[bytes, ...], rest: BinaryIO) -> None:
        self._lines, self._rest = [part for line in lines for part in line.splitlines(keepends=True)], rest

    def readline(self, size: int) -> bytes:
        """The next line."""
        return self._lines.pop(0) if self._lines else self._rest.readline(size)


def _csv_rows(stream: BinaryIO, shown: str) -> Iterator[Row]:
    csv.field_size_limit(LINE_LIMIT)
    try:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        reader = csv.DictReader(text, strict=True)
        header = reader.fieldnames or ()
        if len(header) == 1 and (other := next((c for c in ";\t|" if c in header[0]), None)) is not None:
            raise UserError(
                "DatasetNotCSV", f"{shown}: the columns {_excerpt(header[0])!r} are separated by {other!r}; write it with commas"
            )
        if (name := _twice(header)) is not None:
            raise UserError("DatasetNotCSV", f"{shown}: column {name!r} stands twice in the header; rename one")
        number = reader.line_num + 1
        for value in reader:
            if None in value or None in value.values():
                yield Row(number, problem="has another number of columns than the header", excerpt=_excerpt(str(list(value.values()))))
            else:
                yield Row(number, value=dict(value))
            number = reader.line_num + 1
    except UnicodeDecodeError as failure:
        raise UserError("DatasetNotUTF8", f"{shown} is not UTF-8 at byte {failure.start + 1}; convert it, for example with iconv") from None
    except csv.Error as failure:
        raise UserError("DatasetNotCSV", f"{shown}: {failure}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            if (name := _twice(file.schema_arrow.names)) is not None:
                raise UserError("DatasetNotParquet", f"{path.name}: column {name!r} stands twice; rename one")
            for batch in file.iter_batches(batch_size=256):
                for value in batch.to_pylist(maps_as_pydicts="lossy"):
                    number += 1
                    yield _row(number, without_nulls(value))
    except (pa.ArrowException, OSError) as failure:
        raise UserError("DatasetNotParquet", f"{path.name}, after row {number}: {_excerpt(str(failure), 200)}") from None


def _hub_rows(source: DatasetSource, token: str | None) -> Iterator[Row]:
    from datasets import config, load_dataset
    from huggingface_hub import HfApi

    uri = parse_uri(source.uri)
    host = hub_host()

    def refused(why: str) -> UserError:
        return UserError("DatasetNotFound", f"{source.uri}: {why}; check the uri and its revision, and secretRef if it is gated or private")

    # asked first: load_dataset hides a hub that is down behind a file that it does not find
    known = with_retries(lambda: HfApi(token=token).dataset_info(uri.name, revision=uri.revision or None), host, refused)
    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 3
    config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 5
    try:
        loaded = load_dataset(uri.name, revision=known.sha or uri.revision or None, split=source.split, token=token, streaming=True)
        for number, value in enumerate(loaded, start=1):
            yield _row(number, without_nulls(dict(value)))
    except Exception as failure:
        if (error := error_for_exception(failure, host, refused)) is None:
            raise
        raise error from failure
