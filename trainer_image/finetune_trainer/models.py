"""Load tokenizers and models: safetensors only, remote code only when asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from finetune_api.uris import parse_uri

from .context import Context
from .errors import UserError


def resolve(context: Context, *, download: bool = False) -> str:
    """The folder that holds the base model. Only prepare downloads; later stages read what it left."""
    uri = parse_uri(context.spec.model.uri)
    if uri.scheme == "pvc":
        folder = context.mounted(uri)
        if not (folder / "config.json").is_file():
            raise UserError(
                "ModelNotFound", f"{context.spec.model.uri} holds no config.json; name the folder that from_pretrained would load"
            )
        _require_safetensors(folder)
        return str(folder)
    if not download:
        return str(context.read_json(context.layout.model_reference)["path"])
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *(["*.py"] if context.spec.model.trust_remote_code else [])]
    folder = snapshot_download(
        uri.name,
        revision=uri.revision or None,
        token=context.secret("model"),
        allow_patterns=patterns,
        cache_dir=f"{context.layout.cache}/models",
    )
    _require_safetensors(Path(folder))
    return str(folder)


def _require_safetensors(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    others = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf")]
    found = f"it has {', '.join(sorted(others)[:3])}, which can run code when loaded" if others else "it has none"
    raise UserError("NoSafetensors", f"the model's weights must be .safetensors files; {found}. Convert it with save_pretrained")


def fingerprint(folder: str) -> str:
    """A digest of the model's configuration and of its files' names and sizes: tells one base from another."""
    digest = hashlib.sha256()
    root = Path(folder)
    digest.update((root / "config.json").read_bytes())
    for file in sorted(root.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def load_tokenizer(context: Context, folder: str) -> Any:
    """The fast tokenizer, with a padding token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=context.spec.model.trust_remote_code)
    if not tokenizer.is_fast:
        raise UserError("SlowTokenizer", "the model has no fast tokenizer (tokenizer.json), which the loss mask needs")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def compute_dtype(cuda: bool) -> torch.dtype:
    """bfloat16 where the GPU has it, float16 on older GPUs, float32 on CPU."""
    if not cuda:
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def load_model(context: Context, folder: str, *, dtype: torch.dtype, quantised: bool = False, device: str | None = None) -> Any:
    """The causal language model; NF4 with double quantisation for QLoRA (https://arxiv.org/abs/2305.14314)."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {}
    if quantised:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        options["device_map"] = {"": device or "cpu"}
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        attn_implementation="sdpa",
        trust_remote_code=context.spec.model.trust_remote_code,
        **options,
    )
