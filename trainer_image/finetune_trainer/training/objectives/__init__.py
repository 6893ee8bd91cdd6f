"""The objectives (`tuning.objective`): one entry each. docs/extending.md shows how to add one."""

from __future__ import annotations

from finetune_api.spec import Objective

from .base import ObjectiveKind, TrainerSetup
from .distill import DISTILL
from .grpo import GRPO
from .preference import DPO, KTO, ORPO, REWARD
from .sft import SFT

OBJECTIVES: dict[Objective, ObjectiveKind] = {
    "sft": SFT,
    "pretrain": SFT,
    "dpo": DPO,
    "orpo": ORPO,
    "kto": KTO,
    "reward": REWARD,
    "grpo": GRPO,
    "distill": DISTILL,
}
__all__ = ["OBJECTIVES", "ObjectiveKind", "TrainerSetup"]
