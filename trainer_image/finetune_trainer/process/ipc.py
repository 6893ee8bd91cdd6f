"""What the processes of one pod say to the process that started them, and the other way round: files in a folder.

Signals would reach launchers and libraries that have handlers of their own; a file is seen by those who look.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Doing = Literal["start", "step", "evaluate", "save", "finish"]
ENVIRONMENT = "FINETUNE_SCRATCH"


@dataclass(frozen=True)
class Beat:
    """The last sign of life of a training process."""

    pid: int
    rank: int
    step: int
    doing: Doing
    """What it has begun since."""
    at: float
    """time.monotonic(), which all processes of a pod share."""


class Scratch:
    """The folder of one start of a pod's processes."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.error = self.folder / "error.json"
        """Why the first process that failed did so."""
        self.result = self.folder / "result.json"
        """Rank 0's result."""
        self.stop = self.folder / "stop"
        """Exists when the processes are to save and end."""

    @classmethod
    def mine(cls) -> Scratch | None:
        """The folder that this process was given."""
        folder = os.environ.get(ENVIRONMENT)
        return cls(folder) if folder else None

    def stack(self, rank: int) -> Path:
        """Where a process writes its stacks when it is asked to."""
        return self.folder / f"stack-{rank}"

    def beat(self, rank: int, step: int, doing: Doing) -> None:
        """Give a sign of life."""
        partial = self.folder / f".beat-{rank}"
        partial.write_text(json.dumps({"pid": os.getpid(), "rank": rank, "step": step, "doing": doing, "at": time.monotonic()}))
        partial.rename(self.folder / f"beat-{rank}")

    def beats(self) -> list[Beat]:
        """The last sign of life of every process that gave one."""
        return [Beat(**json.loads(path.read_text())) for path in sorted(self.folder.glob("beat-*"))]
