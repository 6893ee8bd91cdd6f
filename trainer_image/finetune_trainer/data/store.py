"""The scanned rows in a database on the workspace: duplicates, leakage, split and mixture are queries over it.

DuckDB sorts and joins on disk when its share of memory is used up, so a data set of any size can be prepared.
Table `rows`: one line per usable row. `origin` is the number of the training source, -1 where it is held out;
`source` is where it was read, -1 for the held-out source.
Table `gone`: rows that are left out, with the reason.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .scan import Scanned, bands

HELD_OUT = -1
_WINDOW = 20_000
_TOKENS = pa.list_(pa.int32())
_COLUMNS: dict[str, pa.DataType] = {
    "input_ids": _TOKENS,
    "labels": _TOKENS,
    "prompt_ids": _TOKENS,
    "chosen_ids": _TOKENS,
    "rejected_ids": _TOKENS,
    "completion_ids": _TOKENS,
    "label": pa.bool_(),
    "prompt": pa.string(),
    "answer": pa.string(),
}


class Store:
    """The rows of one job while they are prepared."""

    def __init__(self, folder: str, *, memory: str = "512MB") -> None:
        self._folder = Path(folder, "prepare")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._db = duckdb.connect(str(self._folder / "rows.duckdb"))
        self._db.execute(
            f"SET memory_limit='{memory}'; SET temp_directory={_quoted(f'{self._folder}/spill')}; SET preserve_insertion_order=false"
        )
        self._db.execute("CREATE TABLE gone (id BIGINT, reason VARCHAR, partner BIGINT)")
        self._db.execute("CREATE TABLE bands (id BIGINT, key UBIGINT)")
        self._next, self._columns = 0, ""

    def close(self) -> None:
        """Remove the database."""
        self._db.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, origin: int, rows: list[Scanned], similarity: float) -> None:
        """Keep a chunk of usable rows."""
        if not rows:
            return
        ids = np.arange(self._next, self._next + len(rows))
        self._next += len(rows)
        names = sorted(rows[0].columns)
        table = {
            "id": pa.array(ids),
            "origin": pa.array([origin] * len(rows), pa.int32()),
            "source": pa.array([origin] * len(rows), pa.int32()),
            "number": pa.array([r.number for r in rows], pa.int64()),
            "digest": pa.array([f"{r.digest:032x}" for r in rows]),
            "group_id": pa.array([f"{r.group:032x}" for r in rows]),
            "row": pa.array([r.row for r in rows]),
            "length": pa.array([r.length for r in rows], pa.int32()),
            "learned": pa.array([r.learned for r in rows], pa.int32()),
            "truncated": pa.array([r.truncated for r in rows]),
            "system": pa.array([r.system for r in rows]),
            "signature": pa.array([r.signature for r in rows], pa.list_(pa.uint32())),
            **{name: pa.array([r.columns[name] for r in rows], _COLUMNS[name]) for name in names},
        }
        batch = pa.table(table)
        if not self._columns:
            self._columns = ", ".join(names)
            self._db.execute("CREATE TABLE rows AS SELECT * FROM batch LIMIT 0")
        self._db.execute("INSERT INTO rows SELECT * FROM batch")
        if rows[0].signature:
            keys = bands(np.array([r.signature for r in rows]), similarity)
            pairs = pa.table({"id": np.repeat(ids, keys.shape[1]), "key": keys.reshape(-1)})
            self._db.execute("INSERT INTO bands SELECT * FROM pairs")
            del pairs
        del batch

    @property
    def has_rows(self) -> bool:
        """Whether any usable row was added."""
        return self._next > 0

    def _one(self, query: str, *parameters: Any) -> Any:
        rows = self._db.execute(query, parameters).fetchall()
        return rows[0][0] if rows else None

    def _all(self, query: str) -> list[Any]:
        return list(self._db.execute(query).fetchall())

    def count(self, *, held_out: bool) -> int:
        """Rows that are kept."""
        return int(self._one(f"SELECT count(*) FROM kept WHERE origin {'<' if held_out else '>='} 0"))

    def begin(self) -> None:
        """All rows are in: make the view of those that are kept."""
        self._db.execute("CREATE VIEW kept AS SELECT * FROM rows WHERE id NOT IN (SELECT id FROM gone)")

    def duplicates(self) -> int:
        """Note training rows equal to an earlier one; returns how many."""
        self._db.execute(
            "CREATE TABLE duplicate AS SELECT r.id, g.first AS partner FROM rows r JOIN "
            "(SELECT digest, min(id) AS first FROM kept WHERE origin >= 0 GROUP BY digest HAVING count(*) > 1) g "
            "ON r.digest = g.digest AND r.id <> g.first WHERE r.origin >= 0"
        )
        return int(self._one("SELECT count(*) FROM duplicate"))

    def leaked(self) -> int:
        """Note training rows of a prompt, or group, that is also held out; returns how many."""
        self._db.execute(
            "CREATE TABLE leaked AS SELECT k.id, e.first AS partner FROM kept k JOIN "
            "(SELECT group_id, min(id) AS first FROM kept WHERE origin < 0 GROUP BY group_id) e ON k.group_id = e.group_id WHERE k.origin >= 0"
        )
        return int(self._one("SELECT count(*) FROM leaked"))

    def near(self, name: str, similarity: float, *, with_held_out: bool) -> int:
        """Note in table `name` the training rows nearly equal to an earlier training row, or to a held-out one.

        Candidates share a band of their MinHash; the whole signatures then decide.
        """
        first = "e.origin < 0" if with_held_out else "e.origin >= 0"
        candidates = (
            f"SELECT DISTINCT b.id AS id, g.first AS first FROM bands b JOIN (SELECT key, min(b.id) AS first FROM bands b JOIN kept e ON e.id = b.id "
            f"WHERE {first} GROUP BY key) g ON b.key = g.key WHERE b.id <> g.first"
        )
        query = (
            f"SELECT c.id, c.first, a.signature, e.signature FROM ({candidates}) c JOIN kept a ON a.id = c.id JOIN rows e ON e.id = c.first "
            f"WHERE a.origin >= 0 AND a.digest <> e.digest AND NOT (a.source = e.source AND a.number = e.number)"
        )
        self._db.execute(f"CREATE TABLE {name} (id BIGINT, partner BIGINT)")
        writer = self._db.cursor()
        for batch in self._db.sql(query).to_arrow_reader(50_000):
            if not batch.num_rows:
                continue
            left, right = (np.asarray(batch.column(i).flatten()).reshape(batch.num_rows, -1) for i in (2, 3))
            close = (left == right).mean(axis=1) >= similarity
            found = pa.table({"id": batch.column(0), "partner": batch.column(1)}).filter(pa.array(close))
            writer.execute(f"INSERT INTO {name} SELECT id, min(partner) FROM found GROUP BY id")
            del found
        return int(self._one(f"SELECT count(DISTINCT id) FROM {name}"))

    def places(self, name: str, limit: int) -> list[tuple[int, int, int, int]]:
        """(source, number, partner's source, partner's number) of the first rows of a table of pairs."""
        return self._all(
            f"SELECT r.source, r.number, p.source, p.number FROM (SELECT id, min(partner) AS partner FROM {name} GROUP BY id) t "
            f"JOIN rows r ON r.id = t.id JOIN rows p ON p.id = t.partner ORDER BY r.id LIMIT {limit}"
        )

    def drop(self, name: str) -> None:
        """Leave out the rows of a table of pairs."""
        self._db.execute(
            f"INSERT INTO gone SELECT id, '{name}', min(partner) FROM {name} WHERE id NOT IN (SELECT id FROM gone) GROUP BY id"
        )

    def hold_out(self, fraction: float, seed: int) -> bool:
        """Make a share of the training rows held out, as near to it as whole groups allow. Returns whether any group could be.

        By content: rows of one prompt fall on the same side, whatever their order. A group that is larger than the share is left in
        training, unless all are.
        """
        rows, groups = self._all("SELECT count(*), count(DISTINCT group_id) FROM kept WHERE origin >= 0")[0]
        if groups < 2:
            return False
        share = max(1, round(rows * fraction))
        self._db.execute(
            f"CREATE TABLE sizes AS SELECT group_id, count(*) AS size, md5('{seed}:' || group_id) AS place FROM kept WHERE origin >= 0 GROUP BY group_id"
        )
        self._db.execute(
            f"CREATE TABLE chosen AS SELECT group_id FROM (SELECT group_id, size, sum(size) OVER (ORDER BY place, group_id) AS upto FROM sizes "
            f"WHERE size <= {share}) WHERE upto - size / 2.0 <= {share}"
        )
        if not self._one("SELECT count(*) FROM chosen"):
            self._db.execute("INSERT INTO chosen SELECT group_id FROM sizes ORDER BY size, place LIMIT 1")
        self._db.execute(f"UPDATE rows SET origin = {HELD_OUT} WHERE origin >= 0 AND group_id IN (SELECT group_id FROM chosen)")
        return True

    def weigh(self, weights: list[float], seed: int) -> None:
        """Repeat or thin the rows of each training source; a fraction is taken by content."""
        cases = " ".join(
            f"WHEN {origin} THEN {int(weight)} + CASE WHEN ('0x' || md5('{seed}/' || digest)[:8])::BIGINT / 4294967296.0 < {weight - int(weight)} THEN 1 ELSE 0 END"
            for origin, weight in enumerate(weights)
        )
        self._db.execute(f"CREATE TABLE copies AS SELECT id, CASE origin {cases} ELSE 1 END AS n FROM kept WHERE origin >= 0")

    def write(self, path: str, *, held_out: bool) -> str:
        """Write the rows of one side to Parquet, in a stable order, a window at a time. Returns the SHA-256 over them."""
        partial, digest, writer = Path(f"{path}.partial"), hashlib.sha256(), None
        for window in self._evaluation_windows() if held_out else self._training_windows():
            more = "k.group_id, " if held_out else ""
            table = self._db.sql(f"SELECT k.digest, k.row, {more}{self._columns} FROM kept k {window}").to_arrow_table()
            if not table.num_rows:
                continue
            digest.update("\n".join(table.column("digest").to_pylist()).encode())
            shown = table.drop_columns(["digest"])
            writer = writer or pq.ParquetWriter(partial, shown.schema, compression="zstd")
            writer.write_table(shown)
        if writer is None:
            raise ValueError("no rows to write")
        writer.close()
        partial.replace(path)
        return digest.hexdigest()

    def _training_windows(self) -> Iterator[str]:
        """In the order of reading; the trainer shuffles. Identifiers are stored in order, so a window is read alone."""
        repeat = "JOIN copies c ON c.id = k.id JOIN range(100) r(i) ON r.i < c.n"
        for first in range(0, self._next, _WINDOW):
            yield f"{repeat} WHERE k.origin >= 0 AND k.id BETWEEN {first} AND {first + _WINDOW - 1} ORDER BY k.id"

    def _evaluation_windows(self) -> Iterator[str]:
        """Mixed, by content: an evaluation may look at the first rows only."""
        self._db.execute(
            "CREATE TABLE places AS SELECT id, row_number() OVER (ORDER BY md5(digest), id) AS place FROM kept WHERE origin < 0"
        )
        for first in range(1, int(self._one("SELECT count(*) FROM places")) + 1, _WINDOW):
            yield f"JOIN places p ON p.id = k.id WHERE p.place BETWEEN {first} AND {first + _WINDOW - 1} ORDER BY p.place"

    def totals(self) -> tuple[int, int]:
        """(training rows, their tokens), with repetitions."""
        rows, tokens = self._all("SELECT sum(c.n), sum(c.n * k.length) FROM kept k JOIN copies c ON c.id = k.id")[0]
        return int(rows or 0), int(tokens or 0)

    def _lists(self) -> list[str]:
        """The columns of tokens, without labels."""
        return [name for name, kind in _COLUMNS.items() if kind == _TOKENS and name in self._columns.split(", ") and name != "labels"]

    def rows_with_tokens_from(self, first: int) -> tuple[int, int, int, int] | None:
        """(rows, a token, origin and number of the first row) of those with a token ID of `first` or more; None when there are none."""
        largest = f"greatest({', '.join(f'coalesce(list_max({name}), 0)' for name in self._lists())}, 0)"
        found = self._all(
            f"SELECT count(*) OVER (), {largest}, origin, number FROM kept WHERE {largest} >= {first} ORDER BY origin < 0, id LIMIT 1"
        )
        return found[0] if found else None

    def longer_than(self, limit: int, *, prompts: bool = False) -> tuple[int, int, int, int]:
        """(rows, tokens, origin and number of the longest row) of those that have more tokens; of prompts alone, if wanted."""
        lists = self._lists()
        whole = [f"len({name})" for name in lists if name != "prompt_ids"] if "prompt_ids" not in lists else ["len(input_ids)"]
        whole += [f"len(prompt_ids) + len({name})" for name in lists if name in ("chosen_ids", "rejected_ids") and "prompt_ids" in lists]
        tokens = "length - learned" if prompts else f"greatest({', '.join(whole)}, 0)"
        found = self._all(
            f"SELECT count(*) OVER (), {tokens} AS tokens, origin, number FROM kept WHERE {tokens} > {limit} ORDER BY tokens DESC, id LIMIT 1"
        )
        return found[0] if found else (0, 0, 0, 0)

    def training_lengths(self) -> Iterator[int]:
        """Tokens of each training row, with repetitions, in the order of the prepared rows."""
        found = self._db.cursor().execute("SELECT k.length, c.n FROM kept k JOIN copies c ON c.id = k.id ORDER BY k.id")
        while batch := found.fetchmany(_WINDOW):
            for length, copies in batch:
                yield from (length for _ in range(copies))

    def lengths(self) -> dict[str, Any]:
        """Statistics and a histogram of tokens per training row."""
        found = self._all(
            "SELECT min(length), median(length), quantile_cont(length, 0.95), max(length), quantile_cont(length, 0.25), quantile_cont(length, 0.75), "
            "sum(learned) / sum(length) FROM kept WHERE origin >= 0"
        )
        low, median, p95, high, q1, q3, share = found[0]
        width = max(1, -(-(high - low + 1) // 30))
        bins = self._db.execute(
            f"SELECT {low} + (length - {low}) // {width} * {width} AS bin, count(*) FROM kept WHERE origin >= 0 GROUP BY bin ORDER BY bin"
        ).fetchall()
        fence = q3 + 3 * max(q3 - q1, 0.1 * q3)  # Tukey's far out, with room where all rows are of one length
        outliers = int(self._one("SELECT count(*) FROM kept WHERE origin >= 0 AND length > ?", fence))
        return {
            "min": low,
            "median": median,
            "p95": p95,
            "max": high,
            "learnedShare": share,
            "binWidth": width,
            "bins": bins,
            "outliers": outliers,
        }

    def system_prompts(self) -> list[tuple[str, int]]:
        """Different system prompts of training rows with their counts, the commonest first."""
        return self._all("SELECT system, count(*) AS n FROM kept WHERE origin >= 0 GROUP BY system ORDER BY n DESC, system LIMIT 20")

    def other_system_prompts(self) -> int:
        """Held-out rows whose system prompt no training row has."""
        return int(
            self._one("SELECT count(*) FROM kept WHERE origin < 0 AND system NOT IN (SELECT DISTINCT system FROM kept WHERE origin >= 0)")
        )

    def sample(self, count: int, columns: str) -> Iterator[tuple[Any, ...]]:
        """Some training rows, spread over all, the same for the same data."""
        yield from self._db.execute(f"SELECT {columns} FROM kept WHERE origin >= 0 ORDER BY md5(digest) LIMIT {count}").fetchall()


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def read_rows(path: str, columns: Iterable[str], limit: int) -> list[dict[str, Any]]:
    """The first rows of a prepared file."""
    found: list[dict[str, Any]] = []
    with pq.ParquetFile(path) as file:
        wanted = [c for c in columns if c in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=1024, columns=wanted):
            found += batch.to_pylist()
            if len(found) >= limit:
                break
    return found[:limit]
