"""sft and pretrain: next-token prediction on the labels that prepare set."""

from __future__ import annotations

import logging
from typing import Any

from finetune_api.spec import VIRTUAL_TOKEN_METHODS

from ...job.context import Context
from ...models.kernels import PADDING_FREE
from .base import ObjectiveKind, TrainerSetup
from .sampler import GlobalBatchOrder

log = logging.getLogger("finetune.worker")


def arguments(context: Context, common: dict[str, Any]) -> Any:
    """SFTConfig; rows come tokenised, cut and masked."""
    from trl import SFTConfig

    hyper = context.spec.tuning.hyperparameters
    return SFTConfig(
        **common,
        max_length=hyper.max_length,
        packing=hyper.packing,
        packing_strategy="bfd",
        eval_packing=False,
        padding_free=False,
        completion_only_loss=False,
        assistant_only_loss=False,
        remove_unused_columns=True,
    )


def trainer(setup: TrainerSetup) -> Any:
    """TRL's SFTTrainer. An attention that tells rows apart makes batches padding-free, packed or not; without one, `auto` packs nothing."""
    import transformers
    from trl import SFTTrainer

    # virtual tokens would stand in front of the first row alone
    flat = (
        setup.context.spec.tuning.method not in VIRTUAL_TOKEN_METHODS
        and getattr(setup.model.config, "_attn_implementation", "") in PADDING_FREE
    )
    by_length = setup.arguments.packing and not flat and setup.context.spec.tuning.hyperparameters.attention == "auto"
    if by_length:
        log.info("no attention here keeps packed rows apart without a mask: rows are sorted by length instead of packed")
        setup.arguments.packing = False
    elif not setup.arguments.packing and flat:
        setup.arguments.padding_free, setup.arguments.max_length = True, None  # rows are cut already

    class Trainer(GlobalBatchOrder, SFTTrainer):  # type: ignore[misc]
        sorts_by_length = by_length

        def compute_loss(self, *arguments: Any, **more: Any) -> Any:
            """Without a GPU's kernels TRL's chunked loss is slower than the model's own and keeps eight copies of the logits."""
            kind = SFTTrainer if self.args.device.type == "cuda" else transformers.Trainer
            return kind.compute_loss(self, *arguments, **more)

    return Trainer(**setup.trainer_kwargs())


SFT = ObjectiveKind(("input_ids", "labels"), arguments, trainer)
