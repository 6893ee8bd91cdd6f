"""A model's files as they lie on disk: whole, complete and told apart by content. Reads headers, no tensor; starts no torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..process.errors import UserError

MODEL, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf")
_POINTER = b"version https://git-lfs.github.com/spec/"
_EXPONENTS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF0 << 48)}
"""Of safetensors' types: how a number lies in the file, and the bits that are all set where it is none."""
_LOOKED_AT = 1 << 30
"""Bytes of a model that are looked at for such numbers."""
_CHUNK = 4 << 20
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt")


def weight_files(folder: Path, uri: str, config: str = "config.json") -> list[Path]:
    """The files that transformers or PEFT would load. Raises UserError when there are none, or some are not there."""
    whole = ADAPTER if config == ADAPTER_CONFIG else MODEL
    if (folder / whole).is_file():
        return [folder / whole]
    if whole == MODEL and (folder / INDEX).is_file():
        names = sorted(set(_index(folder, uri).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                "WeightsMissing",
                f"{uri}: {INDEX} names {len(names)} files, of which {len(missing)} are not there: {', '.join(missing[:3])}; copy or download the model again",
            )
        return [folder / name for name in names]
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if found:
        raise UserError(
            "WeightsMissing",
            f"{uri} holds no {whole}, only {', '.join(found[:3])}; name the files as save_pretrained does",
        )
    others = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    told = f"it has {', '.join(others[:3])}, which can run code when loaded" if others else "it has none"
    raise UserError("NoSafetensors", f"the model's weights must be .safetensors files; {told}. Convert it with save_pretrained")


def shapes(folder: Path, uri: str, config: str = "config.json") -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, from the headers. Raises UserError for a file that is cut off or is none."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder, uri, config):
        try:
            with safe_open(file, "np") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError, ValueError) as failure:
            raise UserError(
                "WeightsNotReadable",
                f"{uri}: {file.name} ({file.stat().st_size} bytes) is no whole .safetensors file ({failure}); copy or download the model again",
            ) from None
    if config == "config.json" and (folder / INDEX).is_file() and not (folder / MODEL).is_file():
        lost = sorted(set(_index(folder, uri)) - set(found))
        if lost:
            raise UserError("WeightsMissing", f"{uri}: {INDEX} names {len(lost)} tensors that no file holds, for example {lost[0]}")
    return found


def check_whole(folder: Path, uri: str, config: str = "config.json") -> None:
    """Raise UserError for a model that was cloned without its large files, or whose weights are missing or cut off."""
    for file in sorted({*folder.glob("*.safetensors"), *(f for pattern in _SMALL for f in folder.glob(pattern))}):
        with file.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                raise UserError(
                    "LFSPointer",
                    f"{uri}: {file.name} is a Git LFS pointer, not the file itself; run `git lfs pull` in that folder, or download the model with `hf download`",
                )
    shapes(folder, uri, config)
    check_numbers(folder, uri, config)


def check_numbers(folder: Path, uri: str, config: str = "config.json") -> None:
    """Raise UserError where weights are no numbers, of which a model makes nothing else. Reads the beginning of each tensor alone."""
    files = weight_files(folder, uri, config)
    for file in files:
        if (name := not_finite(file, _LOOKED_AT // len(files))) is not None:
            raise UserError(
                "WeightsNotFinite",
                f"{uri}: {file.name}: tensor {name} holds values that are no numbers (NaN or infinite), so the loss would be none; "
                "copy or download the model again, or convert it anew, in bfloat16",
            )


def not_finite(file: Path, most: int | None = None) -> str | None:
    """The first tensor of a file that holds values which are no numbers. Looks at that many bytes, the same of each tensor; None: at all."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        tensors = json.loads(stream.read(size))
        each = None if most is None else max(4096, most // len(tensors) // 4096 * 4096)
        for name, tensor in tensors.items():
            kind = _EXPONENTS.get(tensor.get("dtype", ""))
            if kind is None:
                continue
            begin, end = tensor["data_offsets"]
            stream.seek(8 + size + begin)
            left = end - begin if each is None else min(end - begin, each)
            while left > 0:
                words = np.frombuffer(stream.read(min(left, _CHUNK)), kind[0])
                if ((words & kind[1]) == kind[1]).any():
                    return str(name)
                left -= _CHUNK
    return None


def fingerprint(folder: Path, config: str = "config.json") -> str:
    """A digest of the model's configuration and of all its weights: tells one base from another, wherever they lie."""
    digest = hashlib.sha256((folder / config).read_bytes())
    files = weight_files(folder, str(folder), config)
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        for file, content in zip(files, pool.map(_content_digest, files), strict=True):
            digest.update(f"{file.name} {content}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _content_digest(file: Path) -> str:
    """SHA-256 of a file; the hub's cache names its files so."""
    name = file.resolve().name
    if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", name):
        return name
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _index(folder: Path, uri: str) -> dict[str, str]:
    try:
        return {str(key): os.path.basename(str(name)) for key, name in json.loads((folder / INDEX).read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError("WeightsNotReadable", f"{uri}: {INDEX} is no index of weights; copy or download the model again") from None
