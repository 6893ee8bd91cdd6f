"""dpo, orpo, kto and reward: learning from answers that people preferred."""

from __future__ import annotations

from typing import Any

from finetune_api.spec import Preference

from ...job.context import Context
from .base import ObjectiveKind, Pretokenized, TrainerSetup
from .sampler import GlobalBatchOrder


def _settings(context: Context) -> Preference:
    return context.spec.tuning.preference or Preference()


def _dpo_arguments(context: Context, common: dict[str, Any]) -> Any:
    from trl import DPOConfig

    settings = _settings(context)
    length = context.spec.tuning.hyperparameters.max_length
    return DPOConfig(**common, beta=settings.beta, loss_type=[settings.loss_type], max_length=length, remove_unused_columns=True)


def _dpo(setup: TrainerSetup) -> Any:
    from trl import DPOTrainer

    class Trainer(GlobalBatchOrder, Pretokenized, DPOTrainer):  # type: ignore[misc]
        pass

    return Trainer(**setup.trainer_kwargs())


def _orpo_arguments(context: Context, common: dict[str, Any]) -> Any:
    from trl.experimental.orpo import ORPOConfig

    length = context.spec.tuning.hyperparameters.max_length
    return ORPOConfig(**common, beta=_settings(context).beta, max_length=length, remove_unused_columns=False)


def _orpo(setup: TrainerSetup) -> Any:
    from trl.experimental.orpo import ORPOTrainer

    class Trainer(GlobalBatchOrder, ORPOTrainer):  # type: ignore[misc]
        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            """Prepare's tokens under this trainer's names."""
            head = feature["prompt_ids"]
            row: dict[str, Any] = {"prompt_input_ids": head, "prompt_attention_mask": [1] * len(head)}
            for side in ("chosen", "rejected"):
                answer = feature[f"{side}_ids"]
                row[f"{side}_input_ids"] = head + answer
                row[f"{side}_attention_mask"] = [1] * (len(head) + len(answer))
                row[f"{side}_labels"] = [-100] * len(head) + answer
            return row

    made = Trainer(**setup.trainer_kwargs())
    for name in ("train_dataset", "eval_dataset"):  # the collator takes every column it is given
        dataset = getattr(made, name)
        if dataset is not None:
            setattr(
                made, name, dataset.remove_columns([c for c in ("prompt_ids", "chosen_ids", "rejected_ids") if c in dataset.column_names])
            )
    return made


def _kto_arguments(context: Context, common: dict[str, Any]) -> Any:
    from trl import KTOConfig

    length = context.spec.tuning.hyperparameters.max_length
    return KTOConfig(**common, beta=_settings(context).beta, max_length=length, remove_unused_columns=True)


def _with_mismatched(dataset: Any) -> Any:
    """Each row with another row's answer, from which KTO estimates its divergence term."""
    if dataset is None:
        return None
    answers = dataset["completion_ids"][:]
    return dataset.add_column("KL_completion_ids", [answers[-1], *answers[:-1]])


def _kto(setup: TrainerSetup) -> Any:
    from trl import KTOTrainer

    class Trainer(GlobalBatchOrder, Pretokenized, KTOTrainer):  # type: ignore[misc]
        pass

    return Trainer(
        **{**setup.trainer_kwargs(), "train_dataset": _with_mismatched(setup.train), "eval_dataset": _with_mismatched(setup.held_out)}
    )


def _reward_arguments(context: Context, common: dict[str, Any]) -> Any:
    from trl import RewardConfig

    length = context.spec.tuning.hyperparameters.max_length
    return RewardConfig(**common, max_length=length, center_rewards_coefficient=0.01, remove_unused_columns=True)


def _reward(setup: TrainerSetup) -> Any:
    from trl import RewardTrainer

    class Trainer(GlobalBatchOrder, RewardTrainer):  # type: ignore[misc]
        pass

    made = Trainer(**setup.trainer_kwargs())
    for name, parameter in made.model.named_parameters():
        if ".score." in name and parameter.requires_grad:  # of a 4-bit base TRL makes it bf16, which only works under autocast
            parameter.data = parameter.data.float()
    return made


_PAIR = ("prompt_ids", "chosen_ids", "rejected_ids")
DPO = ObjectiveKind(_PAIR, _dpo_arguments, _dpo)
ORPO = ObjectiveKind(_PAIR, _orpo_arguments, _orpo)
KTO = ObjectiveKind(("prompt_ids", "completion_ids", "label"), _kto_arguments, _kto)
REWARD = ObjectiveKind(("chosen_ids", "rejected_ids"), _reward_arguments, _reward, reward_model=True)
