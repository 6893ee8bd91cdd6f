"""distill: matching a teacher's distribution over the rows' answers (Hinton et al., https://arxiv.org/abs/1503.02531).

With mode generate the teacher's answers were written into the rows by prepare, and this is plain sft.
"""

from __future__ import annotations

from typing import Any

import torch

from finetune_api.spec import Distillation

from ...models.fetch import local_path
from ...models.load import compute_dtype, load_model
from .base import ObjectiveKind, TrainerSetup
from .sampler import GlobalBatchOrder
from .sft import arguments
from .sft import trainer as sft_trainer


def distillation_loss(student: torch.Tensor, taught: torch.Tensor, labels: torch.Tensor, settings: Distillation) -> torch.Tensor:
    """Sum over the learned tokens of alpha CE(labels) + (1 - alpha) T^2 KL(teacher || student).

    student, taught: logits [batch, length, vocabulary]; labels: [batch, length], -100 where nothing is learned. Models of one
    tokenizer may be padded to different sizes behind its last token: what both have is compared.
    """
    learned, shared = labels[:, 1:] != -100, min(student.shape[-1], taught.shape[-1])
    theirs, ours, targets = taught[:, :-1][learned].float(), student[:, :-1][learned].float(), labels[:, 1:][learned]
    temperature = settings.temperature
    gap = torch.nn.functional.kl_div(
        torch.log_softmax(ours[:, :shared] / temperature, -1),
        torch.log_softmax(theirs[:, :shared] / temperature, -1),
        log_target=True,
        reduction="sum",
    )
    return settings.alpha * torch.nn.functional.cross_entropy(ours, targets, reduction="sum") + (1 - settings.alpha) * temperature**2 * gap


def _trainer(setup: TrainerSetup) -> Any:
    from trl import SFTTrainer

    context, told = setup.context, setup.context.spec.tuning.distillation
    assert told is not None
    settings: Distillation = told
    if settings.mode == "generate":
        return sft_trainer(setup)
    cuda = setup.arguments.device.type == "cuda"
    dtype = compute_dtype(cuda, context.spec.tuning.hyperparameters.precision)
    taught = load_model(context, local_path(context, "teacher"), dtype=dtype, cuda=cuda).to(setup.arguments.device).eval()
    taught.requires_grad_(False)

    class Trainer(GlobalBatchOrder, SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            """The divergence, averaged over the learned tokens of the global batch."""
            given = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "position_ids")}
            with torch.no_grad():
                logits = taught(**given).logits
            outputs = model(**given)
            count = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"][:, 1:] != -100).sum()
            scale = self.accelerator.num_processes if num_items_in_batch is not None and self.args.average_tokens_across_devices else 1
            loss = distillation_loss(outputs.logits, logits, inputs["labels"], settings) / count * scale
            return (loss, outputs) if return_outputs else loss

    return Trainer(**setup.trainer_kwargs())


DISTILL = ObjectiveKind(("input_ids", "labels"), arguments, _trainer)
