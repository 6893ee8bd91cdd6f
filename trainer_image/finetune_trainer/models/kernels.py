"""Which kernels compute the model: its attention, and Liger's fused layers. Picked where the GPU is; the stage's result says which.

Rows without padding (packed, or one behind the other) need an attention that knows where each begins. `sdpa` gets a dense
mask over all of them, which costs the square of their tokens together; flash-attention and PyTorch's own `varlen_attn` cost
the sum of the rows' squares. The latter comes with torch, needs an Ampere GPU or a later one, and is registered here with
transformers under the name `varlen`.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .architecture import size, supports

VARLEN = "varlen"
PADDING_FREE = ("flash_attention_2", VARLEN)
"""Attentions that tell rows apart without a mask."""
LARGEST_HEAD = 256
_AMPERE = (8, 0)


class PackedRows(NamedTuple):
    """Where the rows of one sequence begin: what layers get in place of a mask."""

    cu_seqlens: torch.Tensor
    """Cumulative lengths, int32 [rows + 1]."""
    max_seqlen: int
    window: int | None
    """Tokens that a token sees, itself included; None for all before it."""


def pick_attention(
    wanted: str, kind: Any, config: Any, dtype: torch.dtype, *, cuda: bool, padding_free: bool, compiled: bool = False
) -> str:
    """The attention's transformers name, for `hyperparameters.attention` and a model class.

    `padding_free`: whether rows may come one behind the other, without padding; `compiled`: whether torch.compile is used.
    """
    from transformers.utils import is_flash_attn_2_available

    if wanted != "auto":
        return {"flash-attention-2": "flash_attention_2"}.get(wanted, wanted)
    half = cuda and dtype != torch.float32
    if half and is_flash_attn_2_available() and supports(kind, "_supports_flash_attn"):
        return "flash_attention_2"
    if half and padding_free and not compiled and supports_varlen(kind, config) and torch.cuda.get_device_capability() >= _AMPERE:
        register_varlen()
        return VARLEN
    return "sdpa" if supports(kind, "_supports_sdpa") else "eager"


def supports_varlen(kind: Any, config: Any) -> bool:
    """Whether a model's attention is of the kind that `varlen_attn` computes, and this torch has it."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    if "window_size" not in inspect.signature(varlen_attn).parameters:  # torch before 2.11
        return False
    if not all(getattr(kind, f"_supports_{what}", False) for what in ("flash_attn", "sdpa", "attention_backend")):
        return False
    text = config.get_text_config()
    head = size(text, "head_dim") or (size(text, "hidden_size") or 0) // (size(text, "num_attention_heads") or 1)
    special = ("attn_logit_softcapping", "v_head_dim", "attention_dropout", "attn_pdrop")
    return 0 < head <= LARGEST_HEAD and head % 8 == 0 and not any(getattr(text, name, None) for name in special)


def keeps_rows_apart(wanted: str, kind: Any, config: Any, *, compiled: bool = False) -> bool:
    """Whether, on a GPU of today, an attention is picked that tells rows of one sequence apart without a mask.

    Asked in prepare, which has no GPU: on one before Ampere, `pick_attention` picks another after all.
    """
    from transformers.utils import is_flash_attn_2_available

    if wanted == "flash-attention-2" or (wanted == "auto" and is_flash_attn_2_available() and supports(kind, "_supports_flash_attn")):
        return True
    return wanted == "auto" and not compiled and supports_varlen(kind, config)


def register_varlen() -> None:
    """Tell transformers of `varlen`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, varlen_mask)


def varlen_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Any = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    **more: Any,
) -> Any:
    """`PackedRows` for rows behind each other, and the mask of `sdpa` for all else. transformers calls it once a forward pass."""
    from transformers.masking_utils import sdpa_mask

    plain = attention_mask is None and batch_size == 1 and q_length == kv_length > 1
    if plain and not allow_is_causal_skip and not use_vmap:
        rows = _rows(mask_function, q_length, device, local_size)
        if rows is not None:
            return rows
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        local_size=local_size,
        use_vmap=use_vmap,
        device=device,
        **more,
    )


def _rows(mask_function: Callable[..., Any], length: int, device: Any, window: int | None) -> PackedRows | None:
    """Read the rows off the mask's own function: one begins where a token does not see the token before it.

    So nothing depends on which keyword arguments a model hands down to its layers. None where a token sees the one after it.
    """
    place = torch.arange(length, device=device)
    none, before, after = torch.zeros_like(place[1:]), place[:-1], place[1:]
    if bool(mask_function(none, none, before, after).any()):
        return None
    breaks = after[~mask_function(none, none, after, before).expand(length - 1)]
    cu_seqlens = torch.cat([place[:1], breaks, place[-1:] + 1]).to(torch.int32)
    return PackedRows(cu_seqlens, int(cu_seqlens.diff().max()), window)


def varlen_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, dropout: float = 0.0, scaling: float | None = None, **more: Any
) -> tuple[Any, None]:
    """Attention within `PackedRows`; with any other mask, that of `sdpa`. Tensors are [batch, heads, tokens, head size]."""
    if not isinstance(attention_mask, PackedRows):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)  # type: ignore[no-any-return]
    if dropout:
        raise ValueError("varlen_attn has no dropout; set hyperparameters.attention to sdpa")
    half = _half(query, value)
    query, key, value = (part[0].transpose(0, 1).to(half) for part in (query, key, value))
    return _varlen(query, key, value, attention_mask, scaling)[None], None


def _half(query: torch.Tensor, value: torch.Tensor) -> torch.dtype:
    """What to compute in: rotary embeddings and norms leave fp32 behind under autocast, which custom operators do not undo."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return value.dtype if query.dtype == torch.float32 else query.dtype


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: PackedRows, scale: float | None) -> torch.Tensor:
    """The kernel. Tensors are [tokens, heads, head size]."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = query.shape[1] != key.shape[1]
    options = {"enable_gqa": grouped} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    window = (-1 if rows.window is None else rows.window - 1, 0)
    return varlen_attn(  # type: ignore[no-any-return]
        query, key, value, rows.cu_seqlens, rows.cu_seqlens, rows.max_seqlen, rows.max_seqlen, scale=scale, window_size=window, **options
    )


def use_liger_kernels(wanted: str, model_type: str, *, cuda: bool) -> bool:
    """Whether Liger's kernels are used, for `hyperparameters.fusedKernels`: on a GPU, for models that Liger knows."""
    if wanted == "off" or not cuda or importlib.util.find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


def describe_kernels(model: Any, arguments: Any) -> str:
    """For people: the kernels that a trainer uses."""
    attention = str(getattr(model.config, "_attn_implementation", "") or "unknown")
    return f"{attention} attention{', Liger kernels' if arguments.use_liger_kernel else ''}"
