"""Checkpoints: when they are taken, what makes one complete, which is the newest good one.

transformers writes `checkpoint-N`; a manifest with every file's size and digest, written last, makes it count.
A folder without one, or whose files differ from it, was interrupted or damaged and is passed over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from finetune_api.scalars import seconds
from finetune_api.spec import Checkpoint
from finetune_api.status import Plan

from .context import write_text

log = logging.getLogger("finetune.checkpoints")
MANIFEST = "finetune-manifest.json"


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST and not p.name.startswith(f".{MANIFEST}"))


def seal(folder: Path, world_size: int) -> None:
    """Write the manifest that makes a checkpoint complete."""
    files = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in _files(folder)}
    write_text(folder / MANIFEST, json.dumps({"worldSize": world_size, "files": files}, indent=1, sort_keys=True))


def intact(folder: Path, world_size: int | None = None) -> bool:
    """Whether a checkpoint is complete and undamaged, and of this world size when one is given."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    if world_size is not None and manifest.get("worldSize") != world_size:
        return False
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"] or _digest(path) != expected["sha256"]:
            log.warning("checkpoint %s: %s is missing or damaged", folder.name, name)
            return False
    return True


def _folders(root: str) -> list[tuple[int, Path]]:
    found = [(int(m.group(1)), p) for p in Path(root).glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return sorted(found, reverse=True)


def newest(root: str, plan: Plan) -> str | None:
    """Folder of the newest checkpoint that can be resumed from.

    DeepSpeed's optimizer state belongs to one world size; the others resume in any.
    """
    world = plan.world_size if plan.strategy.startswith("deepspeed") else None
    for _, folder in _folders(root):
        if intact(folder, world):
            return str(folder)
        log.warning("checkpoint %s is passed over: incomplete, damaged, or of another world size", folder.name)
    return None


def newest_step(root: str) -> int | None:
    """Step of the newest complete checkpoint."""
    return next((step for step, folder in _folders(root) if (folder / MANIFEST).exists()), None)


class Keeper(TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint in time, seals it, and keeps the newest ones.

    Time is rank 0's: all ranks must save at the same step, so its decision is broadcast.
    """

    def __init__(self, settings: Checkpoint, root: str) -> None:
        self._every, self._steps, self._keep = seconds(settings.every), settings.every_steps, settings.keep
        self._root, self._last, self._last_step = Path(root), time.monotonic(), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide whether to save now."""
        due = time.monotonic() - self._last >= self._every
        if self._steps is not None and state.global_step - self._last_step >= self._steps:
            due = True
        due = due or state.global_step >= state.max_steps
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = args.device if args.device.type == "cuda" else "cpu"
            flag = torch.tensor([int(due)], device=device)
            torch.distributed.broadcast(flag, src=0)
            due = bool(flag.item())
        if due:  # where the trainer decides otherwise (an evaluation that is not the best), it is still due at the next step
            control.should_save = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count from the step that is resumed from."""
        self._last_step = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal the checkpoint once every rank has written its part, then drop the oldest but the best."""
        self._last, self._last_step = time.monotonic(), state.global_step
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if not state.is_world_process_zero:
            return
        seal(self._root / f"checkpoint-{state.global_step}", args.world_size)
        sealed = [folder for _, folder in _folders(str(self._root)) if (folder / MANIFEST).exists()]
        best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None
        for old in sealed[self._keep :]:
            if old.name == best:
                continue
            (old / MANIFEST).unlink(missing_ok=True)  # first what makes it count
            shutil.rmtree(old, ignore_errors=True)
