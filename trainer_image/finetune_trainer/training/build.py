"""TRL's trainer for a job: its model, its rows, its callbacks."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from transformers import EarlyStoppingCallback

from finetune_api.status import Plan

from ..job.context import Context
from ..models.fetch import local_path
from ..models.stopping import load_served_tokenizer, stop_model
from ..process.ipc import IPC_DIR
from . import methods
from .objectives import OBJECTIVES, TrainerSetup


def build_trainer(context: Context, plan: Plan, arguments: Any, cuda: bool, callbacks: list[Any]) -> Any:
    """TRL's trainer for the objective, over the tokens that prepare wrote."""
    tuning, kind = context.spec.tuning, OBJECTIVES[context.spec.tuning.objective]
    folder = local_path(context)
    tokenizer = load_served_tokenizer(context, folder)
    model = methods.build_model(context, plan, folder, arguments, reward=kind.reward_model, cuda=cuda)
    model.config.pad_token_id = tokenizer.pad_token_id
    stop_model(context, model, tokenizer, folder)
    stopping = tuning.hyperparameters.early_stopping
    if stopping is not None:
        callbacks = [*callbacks, EarlyStoppingCallback(stopping.patience, stopping.min_delta)]
    return kind.trainer(
        TrainerSetup(
            context=context,
            arguments=arguments,
            model=model,
            tokenizer=tokenizer,
            train=_dataset(context.layout.train_rows, kind.columns),
            held_out=_dataset(context.layout.eval_rows, kind.columns) if stopping is not None else None,
            callbacks=callbacks,
            optimizers=(methods.loraplus_optimizer(tuning, arguments, model), None),
        )
    )


def _dataset(path: str, columns: tuple[str, ...]) -> Any:
    from datasets import Dataset

    folder = os.environ.get(IPC_DIR) or tempfile.gettempdir()  # which the supervisor removes, however this process ends: they are rows
    return Dataset.from_parquet(path, columns=list(columns), cache_dir=f"{folder}/rows-{os.getpid()}")


def stopped_early(trainer: Any) -> bool:
    """Whether early stopping ended the run: its patience is used up."""
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
    return any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in found)
