"""Greedy answers of a model to prompts, in batches."""

from __future__ import annotations

from typing import Any

import torch

from .architecture import positions


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompts: list[str], limit: int, batch: int = 8) -> list[str]:
    """One answer per prompt text, of at most `limit` tokens, fewer where the model's positions end; prompts of like length share a batch."""
    most = positions(model)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, str] = {}
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            encoded = tokenizer([prompts[i] for i in part], add_special_tokens=False, return_tensors="pt", padding=True).to(model.device)
            encoded.pop("token_type_ids", None)
            asked = encoded["input_ids"].shape[1]
            if most is not None and asked >= most:
                found.update(dict.fromkeys(part, ""))
                continue
            room = limit if most is None else min(limit, most - asked)
            output = model.generate(**encoded, max_new_tokens=room, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            texts = tokenizer.batch_decode(output[:, asked:], skip_special_tokens=True)
            found.update(zip(part, texts, strict=True))
    finally:
        tokenizer.padding_side = side
    return [found[i] for i in range(len(prompts))]
