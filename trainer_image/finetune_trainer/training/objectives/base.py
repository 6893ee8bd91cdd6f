"""What an objective is: the columns it reads from the prepared rows, its arguments, its trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...job.context import Context


@dataclass(frozen=True)
class TrainerSetup:
    """Everything a trainer is made of."""

    context: Context
    arguments: Any
    """The objective's own subclass of transformers.TrainingArguments."""
    model: Any
    tokenizer: Any
    train: Any
    """datasets.Dataset of the training rows."""
    held_out: Any
    """datasets.Dataset of the held-out rows, or None when they are not looked at during training."""
    callbacks: list[Any]
    optimizers: tuple[Any, Any] = (None, None)

    def trainer_kwargs(self) -> dict[str, Any]:
        """What every trainer of TRL takes by the same names."""
        return {
            "model": self.model,
            "args": self.arguments,
            "train_dataset": self.train,
            "eval_dataset": self.held_out,
            "processing_class": self.tokenizer,
            "callbacks": self.callbacks,
            "optimizers": self.optimizers,
        }


@dataclass(frozen=True)
class ObjectiveKind:
    """One way to learn."""

    columns: tuple[str, ...]
    """Columns of the prepared rows (data.tokens) that it reads."""
    arguments: Callable[[Context, dict[str, Any]], Any]
    """Its TrainingArguments, from those that all share."""
    trainer: Callable[[TrainerSetup], Any]
    """TRL's trainer for it."""
    reward_model: bool = False
    """Whether the model has a score for a head instead of a vocabulary."""


class Pretokenized:
    """Mixed into trainers of TRL that would tokenise again: prepare did."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset
