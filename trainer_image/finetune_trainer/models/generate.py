"""Greedy answers of a model to prompts, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

import torch

from .architecture import positions
from .shared_prefix import SharedPrefix, share

MOST_TOKENS, MOST_ROWS = 16_384, 64
"""Of one batch, padding counted."""


def batches(lengths: Sequence[int], extra: int = 0) -> Iterator[list[int]]:
    """Places of sequences of like length, as many as fit into a batch; each takes `extra` tokens more than its length."""
    part: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if part and (len(part) == MOST_ROWS or (len(part) + 1) * (lengths[place] + extra) > MOST_TOKENS):
            yield part
            part = []
        part.append(place)
    if part:
        yield part


def encode(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """The tokens of each prompt, with no special token but those that it holds."""
    return [list(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompts: list[str], limit: int, lead: str = "") -> list[str]:
    """One answer per prompt text, of at most `limit` tokens, fewer where the model's positions end. `lead`: see `spoken`.

    Prompts of like length share a batch, and all of them what they begin with.
    """
    if not prompts:
        return []
    sequences = encode(tokenizer, prompts)
    prefix = share(model, sequences)
    found: dict[int, str] = {}
    most = positions(model)
    for part in batches([len(s) for s in sequences], limit):
        longest = max(len(sequences[i]) for i in part)
        room = limit if most is None else min(limit, most - longest)
        if room <= 0:
            found.update(dict.fromkeys(part, ""))
            continue
        output, start = _continued(model, tokenizer.pad_token_id, [sequences[i] for i in part], prefix, room)
        found.update(zip(part, spoken(tokenizer, output[:, start:].tolist(), lead), strict=True))
    return [found[i] for i in range(len(prompts))]


def spoken(tokenizer: Any, sequences: list[list[int]], lead: str = "") -> list[str]:
    """The text of each answer. What stands before `lead`, with which a template opens the answer itself, is put between <think> and </think>.

    Tokens that keep thoughts and answer apart are special, and are in no text.
    """
    opened = encode(tokenizer, [lead])[0] if lead else []
    found = []
    for ids in sequences:
        last = len(ids) - len(opened)
        place = next((i for i in range(last, -1, -1) if ids[i : i + len(opened)] == opened), None) if opened else None
        parts = [ids] if place is None else [ids[:place], ids[place + len(opened) :]]
        *thoughts, answer = tokenizer.batch_decode(parts, skip_special_tokens=True)
        found.append(f"<think>{thoughts[0]}</think>{answer}" if thoughts and thoughts[0].strip() else answer)
    return found


def _continued(model: Any, pad: int, sequences: list[list[int]], prefix: SharedPrefix | None, limit: int) -> tuple[torch.Tensor, int]:
    """(the sequences with their answers, where those begin). Padding stands before what a sequence does not share."""
    shared, more = 0, {}
    if prefix is not None:
        shared, more = len(prefix), {"past_key_values": prefix.copied(len(sequences))}
    width = max(map(len, sequences))
    gaps = [width - len(s) for s in sequences]
    ids = [s[:shared] + [pad] * gap + s[shared:] for s, gap in zip(sequences, gaps, strict=True)]
    mask = [[1] * shared + [0] * gap + [1] * (width - shared - gap) for gap in gaps]
    output = model.generate(
        input_ids=torch.tensor(ids, device=model.device), attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=limit, do_sample=False, pad_token_id=pad, **more,
    )  # fmt: skip
    return output, width


@torch.inference_mode()
def latency(model: Any, pad: int, sequences: list[list[int]], tokens: float, limit: int) -> float:
    """Seconds until a request that is alone has an answer of so many tokens: the time to the first, and the time of each more.

    The quickest of the sequences counts: whatever else the machine does makes others slower.
    """
    first, each = [], []
    _continued(model, pad, sequences[:1], None, 2)  # whatever is set up once
    for ids in sequences:
        began = perf_counter()
        _continued(model, pad, [ids], None, 1)
        once = perf_counter() - began
        began = perf_counter()
        output, start = _continued(model, pad, [ids], None, limit)
        made = output.shape[1] - start
        first.append(once)
        if made > 1:
            each.append(max(0.0, perf_counter() - began - once) / (made - 1))
    return min(first) + (min(each) if each else 0.0) * max(0.0, tokens - 1)
