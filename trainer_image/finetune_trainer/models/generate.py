"""Greedy answers of a model to prompts, in batches."""

from __future__ import annotations

from typing import Any

import torch


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompts: list[str], limit: int, batch: int = 8) -> list[str]:
    """One answer per prompt text, of at most `limit` tokens; prompts of like length share a batch."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, str] = {}
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            encoded = tokenizer([prompts[i] for i in part], add_special_tokens=False, return_tensors="pt", padding=True).to(model.device)
            encoded.pop("token_type_ids", None)
            output = model.generate(**encoded, max_new_tokens=limit, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            texts = tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
            found.update(zip(part, texts, strict=True))
    finally:
        tokenizer.padding_side = side
    return [found[i] for i in range(len(prompts))]
