"""The runs of `finetune run --local` in a workspace: one folder each, none of which is ever deleted or taken for another."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from finetune_api.contract import CHECKPOINT_MANIFEST, Identity, JobFile, Layout, read_identity
from finetune_api.scalars import human_duration

from .output import Output, dump

STATUS = "status.json"
_JOB = "job.json"
_MATTERS = ("model", "dataset", "tuning", "distribution")
"""Blocks of the spec that a run cannot go on without: evaluation, output and publish may change."""


class NoSuchRun(ValueError):
    """`--resume` names a run that is not there, that is of another job, or that was made from something else."""


@dataclass(frozen=True)
class Run:
    """A run as it lies in its folder."""

    folder: Path
    job: dict[str, Any]
    """Its job.json."""

    @property
    def id(self) -> str:
        """What `--resume` takes."""
        return str(self.job.get("run") or str(self.job["uid"])[:8])

    @property
    def name(self) -> str:
        """Namespace and name of its job."""
        return f"{self.job['namespace']}/{self.job['name']}"

    @property
    def identity(self) -> Identity | None:
        """What it was made from; None until its data was looked at, and of runs of an older version."""
        return read_identity(self.folder / "identity.json")

    @property
    def step(self) -> int | None:
        """Step of its newest checkpoint."""
        sealed = (self.folder / "checkpoints").glob(f"checkpoint-*/{CHECKPOINT_MANIFEST}")
        steps = [int(m.group(1)) for path in sealed if (m := re.fullmatch(r"checkpoint-(\d+)", path.parent.name))]
        return max(steps, default=None)

    @property
    def begun(self) -> float:
        """When it was last gone on with."""
        return (self.folder / _JOB).stat().st_mtime

    @property
    def phase(self) -> str:
        """How it ended, or that it goes on."""
        if Lock.path(self.folder).exists():
            with contextlib.closing(Lock(self.folder)) as lock:
                if not lock.taken:
                    return "Running"
        try:
            return str(json.loads((self.folder / STATUS).read_text())["phase"])
        except (OSError, ValueError, KeyError, TypeError):
            return "Interrupted"

    def holds_nothing(self) -> bool:
        """Whether it never came as far as to have anything to lose."""
        made = any(any((self.folder / name).glob("*")) for name in ("checkpoints", "output"))
        return self.identity is None and not made

    def facts(self) -> dict[str, Any]:
        """For lists."""
        known = self.identity
        return {
            "run": self.id,
            "job": self.name,
            "phase": self.phase,
            "step": self.step,
            "rows": known.made_from.rows if known is not None else None,
            "model": known.made_from.model if known is not None else None,
            "tuning": known.made_from.tuning if known is not None else None,
            "begun": datetime.fromtimestamp(self.begun, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "folder": str(self.folder),
        }


class Lock:
    """Held by the process that runs a run: two of them would write the same checkpoints."""

    def __init__(self, folder: Path) -> None:
        import fcntl  # the commands for clusters run where there is none, too

        self._file: TextIO | None = self.path(folder).open("a")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()

    @staticmethod
    def path(folder: Path) -> Path:
        """The file that is locked."""
        return folder / "lock"

    @property
    def taken(self) -> bool:
        """Whether it is ours."""
        return self._file is not None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """For the processes that we start: it is held until the last of them has ended, though we are killed."""
        return (self._file.fileno(),) if self._file is not None else ()

    def close(self) -> None:
        """Let it go."""
        if self._file is not None:
            self._file.close()
            self._file = None


def runs_in(workspace: Path) -> list[Run]:
    """All runs of a workspace, the latest first."""
    found = []
    for path in workspace.glob(f"jobs/*/{_JOB}"):
        try:
            job = json.loads(path.read_text())
            found.append(Run(path.parent, {**job, "name": job["name"], "namespace": job["namespace"], "uid": job["uid"]}))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no run's folder, or one that is being made
    return sorted(found, key=lambda run: run.begun, reverse=True)


def runs_of(job: JobFile, workspace: Path) -> list[Run]:
    """The runs of one job, the latest first."""
    return [run for run in runs_in(workspace) if run.name == f"{job.namespace}/{job.name}"]


def new_run(job: JobFile, workspace: Path) -> tuple[JobFile, Lock]:
    """A run of its own for the job: the next number, or that of one which never came as far as to have anything to lose."""
    for run in reversed(runs_of(job, workspace)):
        if run.job.get("run") and run.holds_nothing():
            lock = Lock(run.folder)
            if lock.taken and run.holds_nothing():
                _clear(run.folder)
                return job.model_copy(update={"run": run.id}), lock
            lock.close()
    for number in range(1, 1_000_000):
        made = job.model_copy(update={"run": str(number)})
        folder = Path(made.layout(str(workspace)).job)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return made, Lock(folder)
    raise RuntimeError("a million runs in one workspace")


def _clear(folder: Path) -> None:
    """What an unfinished look at the data has left: it is looked at anew. What a teacher wrote is paid for, and stays."""
    for path in (folder / "data").glob("*"):
        if path.name != "teacher.jsonl":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def named_run(job: JobFile, workspace: Path, wanted: str) -> tuple[JobFile, Lock]:
    """The run that `--resume` names. Raises NoSuchRun."""
    known = runs_of(job, workspace)
    run = next((run for run in known if wanted in (run.id, run.folder.name)), None)
    if run is None:
        there = "; ".join(f"{r.id} ({r.phase}, step {r.step or 0})" for r in known) or "none"
        raise NoSuchRun(f"--resume {wanted}: {job.name} has no such run in {workspace}; there are: {there}")
    told = [text for block in _MATTERS for text in _changes(run.job["spec"].get(block), job.spec.to_wire().get(block), f"spec.{block}")]
    if told:
        raise NoSuchRun(
            f"--resume {run.id}: this run was made from another manifest, and goes on with what it was made from alone: "
            f"{'; '.join(told[:5])}{f'; and {len(told) - 5} more' if len(told) > 5 else ''}. Put that back, or leave --resume out: "
            f"a new run begins, and run {run.id} is kept"
        )
    lock = Lock(run.folder)
    if not lock.taken:
        raise NoSuchRun(f"--resume {run.id}: another process runs it; wait for its end, or begin another with --fresh")
    return job.model_copy(update={"run": run.job.get("run"), "uid": run.job["uid"]}), lock


def _changes(old: Any, new: Any, path: str) -> Iterator[str]:
    """What differs between two documents, by path."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _changes(old.get(key), new.get(key), f"{path}.{key}")
    elif old != new:
        yield f"{path} was {json.dumps(old)} and is {json.dumps(new)}"


def carry_answers(target: Layout, known: list[Run]) -> None:
    """What a teacher wrote for an earlier run is not asked again; prepare takes only what the same teacher wrote."""
    path = Path(target.teacher_answers)
    earlier = next((p for run in known if (p := run.folder / "data" / path.name).exists()), None)
    if earlier is not None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(earlier, path)


def take_over(prepared: Layout, run: Run) -> None:
    """Put what was prepared in place of the same in an earlier run's folder, and drop the folder that it was prepared in."""
    for name in ("data", "reports", "logs"):
        target = run.folder / name
        target.mkdir(exist_ok=True)
        for path in (Path(prepared.job) / name).glob("*"):
            if path.is_file():
                path.replace(target / path.name)
    shutil.rmtree(prepared.job)


def list_runs(workspace: Path, phase: str | None, output: Output, console: Console) -> None:
    """Write the runs of a workspace, those of one phase where one is given."""
    found = [run for run in runs_in(workspace) if phase is None or run.phase.lower() == phase.lower()]
    if output is Output.TABLE:
        console.print(table(found) if found else f"no runs in {workspace}", soft_wrap=True)
    elif output is Output.NAME:
        for run in found:
            print(run.id)
    else:
        dump([run.facts() for run in found], output)


def table(found: list[Run]) -> Table:
    """One line per run."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("RUN", "JOB", "PHASE", "STEP", "ROWS", "MODEL", "SETTINGS", "AGE"):
        drawn.add_column(column)
    now = datetime.now(UTC).timestamp()
    for run in found:
        facts = run.facts()
        short = [str(facts[name] or "").removeprefix("sha256:")[:8] for name in ("rows", "model", "tuning")]
        age = human_duration(max(0.0, now - run.begun))
        drawn.add_row(run.id, run.name, facts["phase"], "" if run.step is None else str(run.step), *short, age)
    return drawn
