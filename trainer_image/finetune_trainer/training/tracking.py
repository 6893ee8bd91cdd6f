"""Trackers in which people watch a run (`tuning.tracking`). A run never depends on one."""

from __future__ import annotations

import logging
import os
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from ..job.context import Context
from ..process.redaction import redact

log = logging.getLogger("finetune.tracking")
_TRACKERS = {MLflowCallback: "MLflow", WandbCallback: "Weights & Biases", TensorBoardCallback: "TensorBoard"}


def report_to(context: Context) -> list[str]:
    """The trackers that are asked for by `tuning.tracking`, or by their own standard environment; their environment is set."""
    tracking, trackers = context.spec.tuning.tracking, []
    if tracking.mlflow is not None:
        os.environ["MLFLOW_TRACKING_URI"] = tracking.mlflow.tracking_uri
        os.environ["MLFLOW_EXPERIMENT_NAME"] = tracking.mlflow.experiment
        if (token := context.secret("mlflow")) is not None:
            os.environ["MLFLOW_TRACKING_TOKEN"] = token
    if tracking.wandb is not None:
        os.environ["WANDB_PROJECT"] = tracking.wandb.project
        os.environ.setdefault("WANDB_DIR", "/tmp")
        if tracking.wandb.entity:
            os.environ["WANDB_ENTITY"] = tracking.wandb.entity
        if (key := context.secret("wandb")) is not None:
            os.environ["WANDB_API_KEY"] = key
    if os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ.setdefault("HF_MLFLOW_LOG_ARTIFACTS", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # a run waits for it when it begins and when it ends
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # by default it waits for four minutes
        trackers.append("mlflow")
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") == "offline":
        os.environ.setdefault("WANDB_LOG_MODEL", "false")
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")
        trackers.append("wandb")
    if tracking.tensorboard:
        os.environ["TENSORBOARD_LOGGING_DIR"] = context.layout.tensorboard
        trackers.append("tensorboard")
    return trackers or ["none"]


class TolerantCallback(TrainerCallback):
    """A tracker's callback that is given up when it fails, as when its server is away: training goes on without it."""

    def __init__(self, tracker: TrainerCallback, name: str) -> None:
        self.tracker, self.name, self.failure = tracker, name, ""

    def _tell(self, event: str, *positional: Any, **named: Any) -> Any:
        if self.failure:
            return None
        try:
            return getattr(self.tracker, event)(*positional, **named)
        except Exception as failure:
            self.failure = redact(f"{type(failure).__name__}: {failure}".split("\n")[0])[:200]
            log.warning("training goes on without %s: %s", self.name, self.failure)
            return None


def _event(name: str) -> Any:
    return lambda self, *positional, **named: self._tell(name, *positional, **named)


for _name in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(TolerantCallback, _name, _event(_name))


def tolerate_trackers(trainer: Any) -> list[TolerantCallback]:
    """Put a TolerantCallback in the place of each tracker's own."""
    handler, made = trainer.callback_handler, []
    for place, callback in enumerate(handler.callbacks):
        if (name := _TRACKERS.get(type(callback))) is not None:
            handler.callbacks[place] = TolerantCallback(callback, name)
            made.append(handler.callbacks[place])
    return made
