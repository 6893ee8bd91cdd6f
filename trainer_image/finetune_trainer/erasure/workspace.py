"""One job's folder of a workspace: which of its files hold something of the rows, and those files without it.

What is sealed by digests, or was published, is only told: output, checkpoints, the bundle. It holds weights and texts of the whole
data set (a system text, say), no rows.
"""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.contract import read_identity
from finetune_api.erasure import ERASED, ERASURES, Erased, Erasure, Learned, TrainedOn, read_erasures
from finetune_api.probing import Probes

from ..data.prompts import prompt_key
from ..data.shape import Shape, system_prompt
from ..job.files import write_bytes, write_text
from ..job.pages import render_page
from .match import Match

_TEXTS = {".json", ".jsonl", ".log", ".html", ".md", ".txt", ".result", ""}
_SEALED = ("output", "publish", "checkpoints", "earlier")
_TOLD_OF = {"README.md", "Modelfile", "finetune.json", "job.json"}
"""Of what stays as it is: files in which people's words may stand."""
_GENERAL = "data/general.json"
_LEFTOVERS = ("data/prepare", "data/downloads")
"""Of a prepare that was killed: rows as they were read."""
_MOST_TEXT = 64 * 2**20
"""Bytes of a text file that is looked into."""


def job_folders(workspace: str, wanted: list[str] | None) -> list[Path]:
    """Folders of jobs, those that are named or all."""
    jobs = Path(workspace, "jobs")
    there = sorted(path for path in jobs.iterdir() if path.is_dir()) if jobs.is_dir() else []
    return there if wanted is None else [path for path in there if path.name in wanted]


@dataclass
class Found:
    """What was found in a job's folder."""

    files: list[Erased] = field(default_factory=list)
    learned: Learned | None = None
    trained: TrainedOn | None = None
    notes: list[str] = field(default_factory=list)


def now() -> str:
    """As timestamps are written."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def erase_from(folder: Path, match: Match, *, dry_run: bool) -> Found:
    """Look through a job's folder, and unless it is a dry run remove what belongs to the rows. Again is the same; it may be killed anywhere."""
    return _Folder(folder, match, dry_run=dry_run).run()


@dataclass
class _Rows:
    """What a prepared file has of them."""

    count: int = 0
    keys: set[bytes] = field(default_factory=set)
    still_used: set[bytes] = field(default_factory=set)
    systems: set[str] = field(default_factory=set)
    """System texts of rows that go, which no row has that stays."""


class _Folder:
    def __init__(self, folder: Path, match: Match, *, dry_run: bool) -> None:
        self.folder, self.match, self.dry_run, self.found = folder, match, dry_run, Found()
        self.by_teacher = (folder / "data" / "teacher.jsonl").exists()
        identity = read_identity(folder / "identity.json")
        self.name = f"{identity.namespace}/{identity.name}" if identity is not None else ""
        self.systems: set[str] = set()
        self.keys = set(match.keys)
        self.changed: set[Path] = set()

    def run(self) -> Found:
        train, held_out = (self.folder / "data" / name for name in ("train.parquet", "eval.parquet"))
        trained, evaluated = self._look(train), self._look(held_out)
        earlier = self._note(trained.count, evaluated.count)
        # reports first: what is searched for in them is known by the rows, which go last
        self.systems = trained.systems | evaluated.systems
        self.keys |= trained.keys
        for name in _LEFTOVERS:
            self._remove_folder(self.folder / name)
        for path in self._texts():
            self._text(path)
        if trained.count and not self.dry_run:  # nothing goes on from checkpoints that learned from them
            (self.folder / "identity.json").unlink(missing_ok=True)
        self._rewrite(held_out, evaluated.count)
        self._rewrite(train, trained.count)
        self._tell(trained, earlier)
        return self.found

    def _goes(self, row: str) -> bool:
        return self.match.row(json.loads(row), by_prompt=self.by_teacher)

    def _look(self, path: Path) -> _Rows:
        """What of a prepared file goes."""
        found, kept, systems, kept_systems = _Rows(), set[bytes](), set[str](), set[str]()
        if not path.exists():
            return found
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024, columns=["row"]):
                for text in batch.column(0).to_pylist():
                    shape: Shape = json.loads(text)
                    goes = self.match.row(shape, by_prompt=self.by_teacher)
                    found.count += goes
                    (found.keys if goes else kept).add(prompt_key(shape))
                    (systems if goes else kept_systems).add(system_prompt(shape))
        found.still_used = (found.keys | self.match.keys) & kept
        found.systems = systems - kept_systems - {""}
        return found

    def _note(self, train_rows: int, eval_rows: int) -> int:
        """Put on record that rows were erased, before they are; returns how many training rows were earlier."""
        path = self.folder / ERASURES
        known = read_erasures(json.loads(path.read_text())) if path.exists() else []
        self.name = self.name or next((entry.job for entry in known if entry.job), self.folder.name)
        if (train_rows or eval_rows) and not self.dry_run:
            entries = [*known, Erasure(at=now(), job=self.name, train_rows=train_rows, eval_rows=eval_rows)]
            write_text(path, json.dumps([entry.to_wire() for entry in entries], indent=1) + "\n")
        return sum(entry.train_rows for entry in known)

    def _rewrite(self, path: Path, count: int) -> None:
        """A prepared file without the rows, a window at a time."""
        if not count:
            return
        self._found(path, "rows", count)
        if self.dry_run:
            return
        partial = path.with_name(f".{path.name}.partial")
        with pq.ParquetFile(path) as file, pq.ParquetWriter(partial, file.schema_arrow, compression="zstd") as writer:
            for batch in file.iter_batches(batch_size=1024):
                stay = [not self._goes(row) for row in batch.column("row").to_pylist()]
                writer.write_batch(batch.filter(pa.array(stay, pa.bool_())))
        partial.replace(path)

    def _found(self, path: Path, what: Any, count: int, *, kept: bool = False) -> None:
        name = f"jobs/{self.folder.name}/{path.relative_to(self.folder)}"
        self.found.files.append(Erased(file=name, what=what, count=count, kept=kept))

    def _remove_folder(self, path: Path) -> None:
        count = sum(inner.is_file() for inner in path.rglob("*")) if path.is_dir() else 0
        if path.is_dir() and not self.dry_run:
            shutil.rmtree(path)
        if count:
            self._found(path, "leftovers", count)

    def _texts(self) -> Iterator[Path]:
        """Files with texts; pages after what they are made from."""
        for path in sorted(self.folder.rglob("*"), key=lambda path: (path.suffix == ".html", path)):
            inner = path.relative_to(self.folder)
            if path.is_symlink() or not path.is_file() or str(inner) in (ERASURES, "lock", "identity.json"):
                continue
            if inner.name in _TOLD_OF or (inner.parts[0] not in _SEALED and (path.suffix in _TEXTS or str(inner) in _MADE)):
                yield path

    def _text(self, path: Path) -> None:
        inner = path.relative_to(self.folder)
        name = f"jobs/{self.folder.name}/{inner}"
        if path.stat().st_size > _MOST_TEXT and inner.name != "teacher.jsonl":
            self.found.notes.append(f"{name} is over {_MOST_TEXT >> 20} MiB and was not looked into")
            return
        body = path.read_bytes()
        if inner.name in _TOLD_OF:
            if self.mentions(body.decode(errors="replace")):
                self._found(path, "mentions", 1, kept=True)
            return
        try:
            count, body = _MADE.get(str(inner), _lines if path.suffix != ".json" else _document)(self, path, body)
        except (ValueError, KeyError, TypeError, AttributeError) as failure:
            self.found.notes.append(f"{name} cannot be read ({type(failure).__name__}) and was not looked into")
            return
        if count:
            self.changed.add(path)
            self._found(path, _WHAT.get(inner.name, "mentions"), count)
            if not self.dry_run:
                write_bytes(path, body)

    def mentions(self, text: str) -> bool:
        """Whether a text shows one of the rows, or a system text that only they had."""
        return self.match.mentions(text) or any(system in text for system in self.systems)

    def scrubbed(self, value: Any) -> tuple[Any, int]:
        """A JSON value with every text that shows one of the rows replaced, and how many did."""
        if isinstance(value, str):
            return (ERASED, 1) if self.mentions(value) else (value, 0)
        if isinstance(value, dict):
            pairs = {key: self.scrubbed(inner) for key, inner in value.items()}
            return {key: inner for key, (inner, _) in pairs.items()}, sum(count for _, count in pairs.values())
        if isinstance(value, list):
            found = [self.scrubbed(inner) for inner in value]
            return [inner for inner, _ in found], sum(count for _, count in found)
        return value, 0

    def _tell(self, trained: _Rows, earlier: int) -> None:
        if trained.keys or trained.still_used:
            keys, used = (sorted(key.hex() for key in some) for some in (trained.keys, trained.still_used))
            self.found.trained = TrainedOn(job=self.folder.name[-8:], erased=keys, still_used=used)
        if trained.count or earlier:
            told = self.name if self.name == self.folder.name else f"{self.name} ({self.folder.name})"
            self.found.learned = Learned(job=told, rows=trained.count, earlier=earlier, published=_published(self.folder))


def _published(folder: Path) -> list[str]:
    """Of a local run: where its result went."""
    try:
        return [str(one["uri"]) for one in json.loads((folder / "status.json").read_text())["artifacts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


Made = tuple[int, bytes]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _document(job: _Folder, path: Path, body: bytes) -> Made:
    value, count = job.scrubbed(json.loads(body))
    return count, _json(value)


def _lines(job: _Folder, path: Path, body: bytes) -> Made:
    """Line by line: a log, or a JSON object a line."""
    lines = body.decode(errors="replace").splitlines(keepends=True)
    bad = [job.mentions(line) for line in lines]
    put = "" if path.suffix == ".jsonl" else f"{ERASED}\n"
    return sum(bad), "".join(put if goes else line for line, goes in zip(lines, bad, strict=True)).encode()


def _teacher(job: _Folder, path: Path, body: bytes) -> Made:
    """Answers by the digest of their prompt."""

    def goes(line: str) -> bool:
        try:
            told = json.loads(line)
        except ValueError:  # the last one, cut off
            return job.mentions(line)
        return job.match.digest(told["digest"]) or job.mentions(told["answer"])

    lines = body.decode(errors="replace").splitlines(keepends=True)
    stay = [line for line in lines if not goes(line)]
    return len(lines) - len(stay), "".join(stay).encode()


def _probes(job: _Folder, path: Path, body: bytes) -> Made:
    return erase_probes(job.match, body)


def erase_probes(match: Match, body: bytes) -> Made:
    """Probes without those of the rows: how many went, and the rest. Raises ValueError where it is none of ours."""
    probes = Probes.model_validate_json(body)
    stay = [one for one in probes.probes if not match.probe(one)]
    return len(probes.probes) - len(stay), _json(probes.model_copy(update={"probes": stay}).to_wire())


def erase_keys(keys: set[bytes], body: bytes) -> Made:
    """Digests of prompts, as in prompts/NUMBER.bin, without some: how many went, and the rest."""
    known = [body[at : at + 8] for at in range(0, len(body), 8)]
    stay = [key for key in known if key not in keys]
    return len(known) - len(stay), b"".join(stay)


def _parents(job: _Folder, path: Path, body: bytes) -> Made:
    return erase_keys(job.keys, body)


def _general(job: _Folder, path: Path, body: bytes) -> Made:
    """Tokens of evaluation.forgetting's texts, where the tokenizer is at hand."""
    from tokenizers import Tokenizer

    file = job.folder / "output" / "tokenizer.json"
    if not file.exists():
        job.found.notes.append(
            f"jobs/{job.folder.name}/{_GENERAL} holds tokens (evaluation.forgetting) and no tokenizer is there to read them"
        )
        return 0, body
    rows, tokenizer = json.loads(body), Tokenizer.from_file(str(file))
    stay = [row for row in rows if not job.mentions(tokenizer.decode(row["input_ids"]))]
    return len(rows) - len(stay), json.dumps(stay).encode()


def _baseline(job: _Folder, path: Path, body: bytes) -> Made:
    """Examples that the base was shown: rows of the training data."""
    told, gone = json.loads(body), 0
    for arm in told["arms"]:
        stay = [one for one in arm["examples"] if not job.mentions(_spoken(one))]
        gone += len(arm["examples"]) - len(stay)
        arm["examples"] = stay
    told, count = job.scrubbed(told)
    return gone + count, _json(told)


def _spoken(example: Any) -> str:
    return example if isinstance(example, str) else "\n".join(str(turn.get("content") or "") for turn in example)


def _data_report(job: _Folder, path: Path, body: bytes) -> Made:
    """Samples go; excerpts, and system texts that only these rows had, are replaced."""
    report = json.loads(body)
    samples = report.pop("samples", [])
    stay = [sample for sample in samples if not job.mentions("".join(piece for piece, _ in sample))]
    report, count = job.scrubbed(report)
    return count + len(samples) - len(stay), _json({**report, "samples": stay})


def _evaluation(job: _Folder, path: Path, body: bytes) -> Made:
    """Questions go with their answers where the row is one of these."""
    report = json.loads(body)
    samples = report.pop("samples", [])
    stay = [one for one in samples if not job.mentions(f"{one['prompt']}\n{one['expected']}") and not job.scrubbed(one["answers"])[1]]
    report, count = job.scrubbed(report)
    return count + len(samples) - len(stay), _json({**report, "samples": stay})


def _data_page(job: _Folder, path: Path, body: bytes) -> Made:
    def page(report: Any) -> str:
        return render_page("data.html.j2", job=_title(body), report=report, samples=report["samples"])

    return _page(job, path, body, _data_report, page)


def _evaluation_page(job: _Folder, path: Path, body: bytes) -> Made:
    def page(report: Any) -> str:
        metrics = list(dict.fromkeys(metric for arm in report["arms"] for metric in arm["metrics"]))
        told = {"status": report, "metrics": metrics, "message": report["message"], "samples": report["samples"]}
        return render_page("evaluation.html.j2", job=_title(body), **told)

    return _page(job, path, body, _evaluation, page)


def _page(job: _Folder, path: Path, body: bytes, made: Callable[[_Folder, Path, bytes], Made], page: Callable[[Any], str]) -> Made:
    """A page is made anew from its data where those changed, or where a try that was killed has left it as it was."""
    source = path.with_suffix(".json")
    if source not in job.changed and not job.mentions(html.unescape(re.sub("<[^>]+>", "", body.decode(errors="replace")))):
        return 0, body
    return 1, page(json.loads(made(job, source, source.read_bytes())[1])).encode()


def _title(body: bytes) -> str:
    found = re.search(r"<title>\w+ of (.*?)</title>", body.decode(errors="replace"))
    return html.unescape(found[1]) if found is not None else ""


_WHAT: dict[str, Any] = {"probes.json": "probes", "parents.bin": "prompt digests"}
_MADE: dict[str, Callable[[_Folder, Path, bytes], Made]] = {
    "data/teacher.jsonl": _teacher,
    "data/probes.json": _probes,
    "data/parents.bin": _parents,
    "data/baseline.json": _baseline,
    _GENERAL: _general,
    "reports/data.json": _data_report,
    "reports/data.html": _data_page,
    "reports/evaluation.json": _evaluation,
    "reports/evaluation.html": _evaluation_page,
}
