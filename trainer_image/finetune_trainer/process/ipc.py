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

from finetune_api.contract import ExitCode, StageResult

from .errors import BY_CODE, InfrastructureError, StageError

Phase = Literal["start", "step", "evaluate", "save", "finish"]
IPC_DIR = "FINETUNE_IPC_DIR"
"""Environment variable: the folder."""


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of a training process."""

    pid: int
    rank: int
    step: int
    phase: Phase
    """What it has begun since."""
    at: float
    """time.monotonic(), which all processes of a pod share."""


class Channel:
    """The folder of one start of a pod's processes."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._error, self._result, self._stop = self.folder / "error.json", self.folder / "result.json", self.folder / "stop"

    @classmethod
    def from_environment(cls) -> Channel | None:
        """The folder that this process was given."""
        folder = os.environ.get(IPC_DIR)
        return cls(folder) if folder else None

    def request_stop(self) -> None:
        """Ask the processes to save and end."""
        self._stop.touch()

    @property
    def stop_requested(self) -> bool:
        """Whether the processes are to save and end."""
        return self._stop.exists()

    def send_heartbeat(self, rank: int, step: int, phase: Phase) -> None:
        """Give a sign of life."""
        partial = self.folder / f".beat-{rank}"
        partial.write_text(json.dumps({"pid": os.getpid(), "rank": rank, "step": step, "phase": phase, "at": time.monotonic()}))
        partial.rename(self.folder / f"beat-{rank}")

    def heartbeats(self) -> list[Heartbeat]:
        """The last sign of life of every process that gave one."""
        return [Heartbeat(**json.loads(path.read_text())) for path in sorted(self.folder.glob("beat-*"))]

    def stack(self, rank: int) -> Path:
        """Where a process writes its stacks when it is asked to."""
        return self.folder / f"stack-{rank}"

    def send_error(self, error: StageError) -> None:
        """Say why this process ends, unless another one did before."""
        try:
            with self._error.open("x") as sink:
                json.dump({"code": int(error.code), **error.result().to_wire()}, sink)
        except FileExistsError:  # the first process that failed knows best
            pass

    def error(self) -> StageError | None:
        """Why the first process that failed did so."""
        if not self._error.exists():
            return None
        document = json.loads(self._error.read_text())
        kind = BY_CODE.get(ExitCode(document["code"]), InfrastructureError)
        return kind(document["reason"], document["message"], document.get("result"))

    def send_result(self, result: StageResult) -> None:
        """Rank 0's result."""
        self._result.write_text(result.dumps())

    def result(self) -> StageResult | None:
        """Rank 0's result; None on pods where it does not run."""
        return StageResult.model_validate(json.loads(self._result.read_text())) if self._result.exists() else None
