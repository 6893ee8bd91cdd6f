"""When checkpoints are taken, and the agreement of all ranks on it."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from finetune_api.scalars import seconds
from finetune_api.spec import Checkpoint

from ..process import ranks
from ..process.ipc import Channel
from .checkpoints import MANIFEST, Fence, list_checkpoints, remove, write_manifest

_NODE_MTBF = 24 * 3600.0
"""Seconds between two interruptions of one node, preemptions included: a shared cluster's, not the hardware's alone."""
_FIRST, _SHORTEST, _LONGEST = 120.0, 60.0, 3600.0


def best_interval(cost: float, nodes: int) -> float:
    """Seconds between two checkpoints that cost `cost` seconds each: sqrt(2 * cost * MTBF).

    J. W. Young, A first order approximation to the optimum checkpoint interval (1974); J. T. Daly (2006).
    """
    return min(_LONGEST, max(_SHORTEST, math.sqrt(2.0 * cost * _NODE_MTBF / nodes)))


class CheckpointCallback(TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint in time and when the pod is asked to stop, seals it, and keeps the newest ones.

    All ranks must save, and stop, at the same step: they agree on it after every step. The digests are computed beside
    the training that goes on.
    """

    def __init__(self, settings: Checkpoint, root: str, *, nodes: int, fence: Fence, channel: Channel | None) -> None:
        self._settings, self._nodes, self._fence, self._channel = settings, nodes, fence, channel
        self._root, self._last, self._last_step = Path(root), time.monotonic(), 0
        self._begun = self._last
        self._stopping = False
        self._sealing: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="seal")
        self.interval = seconds(settings.every) if settings.every is not None else _FIRST
        """Seconds between two checkpoints."""
        self.stopped_at: int | None = None
        """The step at which the run was stopped on request."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count from the step that is resumed from."""
        self._last, self._last_step = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide whether to save now. Rank 0's clock counts, and a stop of any rank."""
        due = time.monotonic() - self._last >= self.interval or state.global_step >= state.max_steps
        if self._settings.every_steps is not None and state.global_step - self._last_step >= self._settings.every_steps:
            due = True
        stop = self._channel is not None and self._channel.stop_requested
        due, stop = ranks.any_rank(args.device, due and state.is_world_process_zero, stop)
        self._stopping = self._stopping or stop
        # where the trainer decides otherwise (an evaluation that is not the best), it is still due at the next step
        if due or self._stopping:
            self._begun = time.monotonic()
            control.should_save = True
            if state.is_world_process_zero:
                self._settle()
                self._fence.check()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal the checkpoint once every rank has written its part, then drop the oldest but the best."""
        ranks.barrier()
        self._last, self._last_step = time.monotonic(), state.global_step
        if self._settings.every is None:
            self.interval = best_interval(self._last - self._begun, self._nodes)
        if state.is_world_process_zero:
            self._fence.check()
            best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None
            self._sealing = self._pool.submit(self._seal, state.global_step, args.world_size, best)
        if self._stopping and state.global_step < state.max_steps:
            self._settle()
            ranks.barrier()  # no process may end before the checkpoint counts: launchers kill the others
            self.stopped_at = state.global_step
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last checkpoint counts before the result is written."""
        self._settle()

    def _seal(self, step: int, world_size: int, best: str | None) -> None:
        write_manifest(self._root / f"checkpoint-{step}", world_size)
        sealed = [folder for _, folder in list_checkpoints(self._root) if (folder / MANIFEST).exists()]
        for old in sealed[self._settings.keep :]:
            if old.name != best:
                remove(old)

    def _settle(self) -> None:
        """Wait for the digests. Raises what went wrong with them."""
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            sealing.result()
