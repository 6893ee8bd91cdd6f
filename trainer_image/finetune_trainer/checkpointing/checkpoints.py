"""Checkpoints on the volume: what makes one complete, which is the newest good one. Needs no torch.

transformers writes `checkpoint-N`; a manifest with every file's size and digest, written last, makes it count.
A folder without one, or whose files differ from it, was interrupted or damaged and is passed over. An attempt that
was replaced while it was out of reach (a node that came back) writes no checkpoint any more: the newest attempt's
number stands beside them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from finetune_api.contract import CHECKPOINT_MANIFEST

from ..job.files import write_text
from ..process.errors import Stopped

log = logging.getLogger("finetune.checkpoints")
MANIFEST = CHECKPOINT_MANIFEST
FENCE = "attempt"
"""File beside the checkpoints: the newest attempt's number"""


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST and not p.name.startswith(f".{MANIFEST}"))


def write_manifest(folder: Path, world_size: int) -> None:
    """Write the manifest that makes a checkpoint complete."""
    files = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in _files(folder)}
    write_text(folder / MANIFEST, json.dumps({"worldSize": world_size, "files": files}, indent=1, sort_keys=True))


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None when it is complete and undamaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return "it was not completed"
    except (OSError, ValueError) as failure:
        return f"its manifest cannot be read: {failure}"
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"] or _digest(path) != expected["sha256"]:
            return f"{name} is missing or damaged"
    return None


def list_checkpoints(root: str | Path) -> list[tuple[int, Path]]:
    """Steps and folders, complete or not, newest first."""
    found = [(int(m.group(1)), p) for p in Path(root).glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return sorted(found, reverse=True)


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins."""

    folder: str | None = None
    """The newest good checkpoint, or None for the start."""
    step: int = 0
    world_size: int = 0
    """Processes that wrote it."""
    skipped: tuple[int, ...] = ()
    """Steps of newer checkpoints that were passed over."""
    finished: bool = False
    """Whether its step is the last one: nothing is left to train."""


def find_latest(root: str) -> ResumePoint:
    """The newest good checkpoint. What is newer than it is removed: this run writes those steps again."""
    skipped: list[int] = []
    for step, folder in list_checkpoints(root):
        problem = find_damage(folder)
        if problem is None:
            world = int(json.loads((folder / MANIFEST).read_text())["worldSize"])
            return ResumePoint(str(folder), step, world, tuple(skipped), finished=step >= _last_step(folder))
        log.warning("checkpoint at step %d is passed over: %s", step, problem)
        skipped.append(step)
        remove(folder)
    return ResumePoint(skipped=tuple(skipped))


def _last_step(folder: Path) -> float:
    """The step that its run was to end at."""
    try:
        return int(json.loads((folder / "trainer_state.json").read_text())["max_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return float("inf")


def latest_step(root: str) -> int | None:
    """Step of the newest complete checkpoint."""
    return next((step for step, folder in list_checkpoints(root) if (folder / MANIFEST).exists()), None)


def remove(folder: Path) -> None:
    """Delete a checkpoint; whatever happens meanwhile, it never counts half deleted."""
    (folder / MANIFEST).unlink(missing_ok=True)  # first what makes it count
    shutil.rmtree(folder, ignore_errors=True)


class Fence:
    """Keeps an attempt that was replaced from writing: two gangs may run for a while when a node is out of reach."""

    def __init__(self, root: str, attempt: int) -> None:
        self._path, self._attempt = Path(root, FENCE), attempt

    def claim(self) -> None:
        """Put this attempt on record. Raises Stopped when a later one is."""
        self.check()
        write_text(self._path, str(self._attempt))

    def check(self) -> None:
        """Raise Stopped when a later attempt has begun."""
        try:
            found = int(self._path.read_text())
        except (OSError, ValueError):
            return
        if found > self._attempt:
            raise Stopped("Replaced", f"attempt {found} has begun, this is attempt {self._attempt}: it writes nothing more")
