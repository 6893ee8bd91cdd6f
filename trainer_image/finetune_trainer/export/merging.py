"""The base with the adapter merged into it, in 16 bit, checked against base and adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ..data.store import read_rows
from ..job.context import Context
from ..models.load import load_model
from ..models.stopping import load_served_tokenizer, write_generation_config
from ..process.errors import UserError

_COMPARED_ROWS, _COMPARED_TOKENS = 4, 128
_TOLERANCE = 1e-3
"""Largest difference of logits after merging in fp32, of the largest logit."""


def load_tuned(context: Context, folder: str) -> Any:
    """The base with the adapter on it, in fp32 (never the 4-bit base: that would stay 4 bit)."""
    from peft import PeftModel

    base = load_model(context, folder, dtype=torch.float32, reward=context.spec.tuning.objective == "reward")
    return PeftModel.from_pretrained(base, context.layout.output).eval()


def merge(context: Context, model: Any, folder: str, target: Path) -> Any:
    """Merge the adapter of `load_tuned` and save the model in 16 bit; the model as it is saved.

    Raises UserError when the merged model says anything else than base and adapter do.
    """
    from transformers import AutoConfig

    _untie(model)
    texts = _texts(context)
    wanted = _logits(model, texts)
    merged = model.merge_and_unload()
    _compare(wanted, _logits(merged, texts))
    stored = getattr(AutoConfig.from_pretrained(folder), "dtype", None)
    dtype = stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
    shutil.rmtree(target, ignore_errors=True)
    merged.to(dtype).save_pretrained(target)
    tokenizer = load_served_tokenizer(context, folder)
    tokenizer.save_pretrained(target)
    if context.spec.tuning.objective != "reward":
        write_generation_config(context, tokenizer, folder, target)
    return merged


def _untie(model: Any) -> None:
    """Give the output head weights of its own where it shares the embedding's and an adapter changes one of the two alone."""
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    sides = [side for side in (head, embedding) if hasattr(side, "base_layer")]
    if head is None or len(sides) != 1:
        return
    own, shared = (getattr(side, "base_layer", side) for side in (head, embedding))
    if own.weight is shared.weight:
        own.weight = torch.nn.Parameter(own.weight.detach().clone(), requires_grad=False)
        for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
            config.tie_word_embeddings = False


def _texts(context: Context) -> list[list[int]]:
    """The first tokens of some prepared rows."""
    rows = read_rows(context.layout.train_rows, ("input_ids",), _COMPARED_ROWS)
    return [row["input_ids"][:_COMPARED_TOKENS] for row in rows]


@torch.inference_mode()
def _logits(model: Any, texts: list[list[int]]) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([ids], device=model.device)).logits.float() for ids in texts]


def _compare(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    """Raise UserError when merged logits are not those of base and adapter, within what fp32 leaves to the order of sums."""
    for before, after in zip(wanted, found, strict=True):
        apart, scale = float((before - after).abs().max()), max(1.0, float(before.abs().max()))
        if not apart <= _TOLERANCE * scale:
            raise UserError(
                "MergeDiffers",
                f"output.merged: the merged model is not what was trained: its logits are up to {apart:.3g} apart from those of base and adapter "
                f"(which go up to {scale:.3g}). Publish the adapter alone: remove output.merged and output.gguf, or adapt other modules "
                "(tuning.lora.targetModules)",
            )
