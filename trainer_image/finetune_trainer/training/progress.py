"""Progress: the full history in the workspace, and rank 0's reports to the operator, which training never waits for."""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import threading
import time
import urllib.error
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from finetune_api.contract import Env, ProgressReport

from ..checkpointing.checkpoint_schedule import CheckpointCallback
from ..checkpointing.checkpoints import ResumePoint, latest_step
from ..job.context import Context
from ..process.errors import UserError
from ..remote.operator import post

log = logging.getLogger("finetune.progress")
_INTERVAL = 1.0


class ProgressReporter(TrainerCallback):  # type: ignore[misc]
    """Writes history.jsonl and sends the newest state, at most once a second, from a thread of its own."""

    def __init__(self, context: Context, checkpointing: CheckpointCallback, resume: ResumePoint, attempt: int) -> None:
        self._context, self._checkpointing, self._resume, self._attempt = context, checkpointing, resume, attempt
        self._started = time.monotonic()
        self._first_step = self._first_tokens = 0
        self.tokens_per_second: float | None = None
        self._eval_loss: float | None = None
        self._outbox: queue.Queue[ProgressReport] = queue.Queue(maxsize=1)
        self._sender: threading.Thread | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the sender on rank 0."""
        self._started, self._first_step = time.monotonic(), state.global_step
        self._first_tokens = int(state.num_input_tokens_seen or 0)
        if state.is_world_process_zero and os.environ.get(Env.PROGRESS_URL):
            self._sender = threading.Thread(target=self._send_forever, daemon=True)
            self._sender.start()
        if state.is_world_process_zero:
            self._report(state, {})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Take a logged step. A loss that is no number stops the run: more steps only make it worse."""
        logs = logs or {}
        if "eval_loss" in logs:
            self._eval_loss = float(logs["eval_loss"])
        if "loss" not in logs:
            return
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm") or 0.0)
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
            advice = "lower hyperparameters.learningRate or maxGradNorm"
            if state.global_step <= 1:  # nothing has been learned yet
                advice = "the base itself makes it so: set hyperparameters.precision to bf16 or fp32, or use another copy of the base"
            raise UserError(
                "NonFiniteLoss",
                f"{what} at step {state.global_step}; {advice}, and look at the rows of that step. "
                f"The last good checkpoint is of step {latest_step(self._context.layout.checkpoints) or 0}",
            )
        if state.is_world_process_zero:
            self._report(state, logs)

    def _report(self, state: Any, logs: dict[str, Any]) -> None:
        elapsed = time.monotonic() - self._started
        steps = state.global_step - self._first_step
        tokens = int(state.num_input_tokens_seen or 0) - self._first_tokens
        if steps > 0 and elapsed > 0:
            self.tokens_per_second = round(tokens / elapsed, 1)
        report = ProgressReport(
            attempt=self._attempt,
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=round(float(state.epoch or 0), 4),
            loss=float(logs["loss"]) if "loss" in logs else None,
            eval_loss=self._eval_loss,
            learning_rate=float(logs["learning_rate"]) if "learning_rate" in logs else None,
            tokens_per_second=self.tokens_per_second,
            eta_seconds=round((state.max_steps - state.global_step) * elapsed / steps, 1) if steps > 0 else None,
            checkpoint_step=latest_step(self._context.layout.checkpoints),
            checkpoint_every=round(self._checkpointing.interval, 1),
            resumed_from=self._resume.step,
            skipped_checkpoints=list(self._resume.skipped[:8]),
        )
        more = {k: v for k, v in logs.items() if k not in ("loss", "learning_rate", "grad_norm", "epoch") and isinstance(v, int | float)}
        line = {**report.to_wire(), "gradNorm": logs.get("grad_norm"), "seconds": round(elapsed, 2), "tokens": tokens, "metrics": more}
        with Path(self._context.layout.history).open("a") as sink:
            sink.write(json.dumps(line) + "\n")
        if self._sender is not None:
            try:
                self._outbox.get_nowait()  # only the newest state is worth sending
            except queue.Empty:
                pass
            self._outbox.put(report)

    def _send_forever(self) -> None:
        job = self._context.job
        path = f"/v1/namespaces/{job.namespace}/finetunejobs/{job.name}/progress"
        failures = 0
        while True:
            report = self._outbox.get()
            try:
                post(path, report.to_wire(), timeout=5)
                failures = 0
            except (OSError, ValueError) as failure:
                failures += 1
                if failures in (1, 10, 100, 1000):
                    detail = failure.read(200).decode(errors="replace") if isinstance(failure, urllib.error.HTTPError) else ""
                    log.warning("progress report %d not delivered: %s %s", failures, failure, detail)
            time.sleep(min(30.0, _INTERVAL * (1 + failures)))


def plot_history(history: str, target: str) -> None:
    """Draw loss, held-out loss and learning rate over the steps, as SVG. A plot that fails is no reason to fail."""
    try:
        import matplotlib

        matplotlib.use("svg")
        from matplotlib import pyplot

        entries = [json.loads(line) for line in Path(history).read_text().splitlines()]
        figure, axis = pyplot.subplots(figsize=(8, 4))
        for key, label in (("loss", "loss"), ("evalLoss", "held-out loss")):
            points = [(e["step"], e[key]) for e in entries if e.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label)
        axis.set_xlabel("step")
        axis.legend(loc="upper right")
        rates = [(e["step"], e["learningRate"]) for e in entries if e.get("learningRate") is not None]
        if rates:
            other = axis.twinx()
            other.plot(*zip(*rates, strict=True), color="gray", linewidth=0.8, linestyle=":")
            other.set_ylabel("learning rate")
        figure.savefig(target, bbox_inches="tight")
        pyplot.close(figure)
    except Exception as failure:  # matplotlib raises anything
        log.warning("no plot: %s", failure)
