"""A LoRA adapter as GGUF, after llama.cpp's format: no package has its converter of adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..process.errors import UserError

_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Model types whose adapters are converted: their names in GGUF. Llama's rotary layout differs from transformers'."""


def check_adapter(config: dict[str, Any], parameters: Sequence[str]) -> None:
    """Raise UserError where the adapter of a base with that config.json, by the names of its parameters, cannot be converted."""
    kind = str(config.get("model_type"))
    if kind not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise UserError("NoGGUF", f"output.ggufAdapter: models of type {kind} are not supported, only {known}; use output.gguf")
    names = _gguf_names(config)
    for name in parameters:
        _gguf_name(names, name.replace(".default", ""))


def _interleave(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a query or key projection in the order of llama.cpp's rotary embedding: [heads * d, ...] -> the same shape."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _gguf_names(config: dict[str, Any]) -> Any:
    """The names of a model's tensors in GGUF."""
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[_ARCHITECTURES[str(config["model_type"])]], int(config["num_hidden_layers"]))


def _gguf_name(names: Any, key: str) -> tuple[str, str, str]:
    """(module, lora_A or lora_B, its name in GGUF) of an adapter's tensor. Raises UserError for one that llama.cpp has no place for."""
    module, _, part = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
    if part not in ("lora_A", "lora_B") or name is None:
        raise UserError(
            "NoGGUF", f"output.ggufAdapter: {key} has no place in a GGUF adapter; use output.gguf, or adapt linear layers alone"
        )
    return module, part, str(name)


def write_adapter(adapter: Path, config: dict[str, Any], target: Path) -> None:
    """A LoRA adapter as GGUF: `adapter.type=lora`, `*.lora_a`, `*.lora_b`. Raises UserError for what llama.cpp cannot load."""
    import gguf
    from safetensors.numpy import load_file

    settings = json.loads((adapter / "adapter_config.json").read_text())
    kind = str(config["model_type"])
    heads = int(config["num_attention_heads"])
    alpha, rank = float(settings["lora_alpha"]), int(settings["r"])
    if settings.get("use_rslora"):  # llama.cpp scales by alpha / r
        alpha *= math.sqrt(rank)
    arch, names = gguf.MODEL_ARCH[_ARCHITECTURES[kind]], _gguf_names(config)
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for key, tensor in sorted(load_file(adapter / "adapter_model.safetensors").items()):
        module, part, name = _gguf_name(names, key)
        weight = tensor.astype(np.float32)
        if part == "lora_B" and _ARCHITECTURES[kind] == "LLAMA" and module.endswith(("q_proj", "k_proj")):
            weight = _interleave(weight, heads if module.endswith("q_proj") else int(config.get("num_key_value_heads") or heads))
        writer.add_tensor(f"{name}.{part.lower()}", weight.astype(np.float16 if np.abs(weight).max() < 6e4 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
