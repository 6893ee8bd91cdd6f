"""Signs of life of a training process, and its stacks when it is asked for them."""

from __future__ import annotations

import faulthandler
import os
import signal
from typing import Any

from transformers import TrainerCallback

from .ipc import Channel, Phase


class HeartbeatCallback(TrainerCallback):  # type: ignore[misc]
    """Tells what is done and what is begun. Comes after the callbacks that decide what is begun."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self._rank = channel, int(os.environ.get("RANK", "0"))
        self._stacks = channel.stack(self._rank).open("w")
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)  # needs no debugger's rights

    def _beat(self, state: Any, control: Any, *, evaluated: bool = False) -> None:
        phase: Phase = "evaluate" if control.should_evaluate and not evaluated else "save" if control.should_save else "step"
        self._channel.send_heartbeat(self._rank, state.global_step, phase)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From here on there is something to save."""
        self._channel.send_heartbeat(self._rank, state.global_step, "start")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step is done."""
        self._beat(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An evaluation is done."""
        self._beat(state, control, evaluated=True)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint is written."""
        self._channel.send_heartbeat(self._rank, state.global_step, "step")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The result is written next."""
        self._channel.send_heartbeat(self._rank, state.global_step, "finish")
