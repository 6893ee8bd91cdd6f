"""What many sequences begin with is computed once: the system text and the examples of a prompt, for all rows of an evaluation.

Only where a model keeps nothing but keys and values of every position. Recurrent states, sliding windows and quantized caches depend
on where padding stands, so there each row is computed whole.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .likelihood import causal_model

_WORTH = 16
"""Tokens from which on sharing saves more than it costs."""


@dataclass(frozen=True)
class SharedPrefix:
    """Tokens that all sequences begin with, and their keys and values in each layer, of one sequence."""

    ids: list[int]
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def __len__(self) -> int:
        return len(self.ids)

    def lent(self) -> Any:
        """A cache that is read and not written to: for one forward pass over any number of sequences."""
        return _cache([_lent_layer(keys, values) for keys, values in self.layers])

    def copied(self, sequences: int) -> Any:
        """A cache that grows, for the generation of so many answers."""
        return _cache([_grown_layer(keys, values, sequences) for keys, values in self.layers])


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many tokens all sequences begin with; each keeps one of its own."""
    if len(sequences) < 2:
        return 0
    return min(len(os.path.commonprefix(sequences)), min(map(len, sequences)) - 1)  # noqa: RUF071 - no paths


@torch.inference_mode()
def share(model: Any, sequences: Sequence[list[int]]) -> SharedPrefix | None:
    """The common prefix of the sequences, computed; None where there is little to share, or the model does not allow it."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    length = common_prefix(sequences)
    if length < _WORTH or getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return None
    ids = list(sequences[0][:length])
    head = {"logits_to_keep": 1} if _takes(model, "logits_to_keep") else {}
    cache: Any = getattr(model(input_ids=torch.tensor([ids], device=model.device), use_cache=True, **head), "past_key_values", None)
    if type(cache) is not DynamicCache or not all(type(layer) is DynamicLayer for layer in cache.layers):
        return None
    if any(layer.get_seq_length() != length for layer in cache.layers):
        return None
    return SharedPrefix(ids, tuple((layer.keys, layer.values) for layer in cache.layers))


def _takes(model: Any, argument: str) -> bool:
    import inspect

    return argument in inspect.signature(causal_model(model).forward).parameters


def _cache(layers: list[Any]) -> Any:
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    cache.layers = layers
    return cache


def _layer(kind: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
    layer = kind()
    layer.keys, layer.values = keys, values
    layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    return layer


def _grown_layer(keys: torch.Tensor, values: torch.Tensor, sequences: int) -> Any:
    from transformers.cache_utils import DynamicLayer

    return _layer(DynamicLayer, *(part.expand(sequences, -1, -1, -1) for part in (keys, values)))


def _lent_layer(keys: torch.Tensor, values: torch.Tensor) -> Any:
    from transformers.cache_utils import DynamicLayer

    class Lent(DynamicLayer):
        """Joins what it holds with what comes, for one use, and keeps nothing of it."""

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
            sequences = key_states.shape[0]
            held = (part.expand(sequences, -1, -1, -1) for part in (self.keys, self.values))
            joined = [torch.cat(pair, dim=-2) for pair in zip(held, (key_states, value_states), strict=True)]
            return joined[0], joined[1]

    return _layer(Lent, keys, values)
