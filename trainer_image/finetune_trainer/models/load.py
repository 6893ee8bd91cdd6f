"""Find, load and describe models and tokenizers: safetensors only, remote code only when asked for and allowed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from finetune_api.spec import VIRTUAL_TOKEN_METHODS, FineTuneJobSpec, VirtualTokens
from finetune_api.uris import parse_uri

from ..job.context import Context
from ..process.errors import UserError
from ..remote.retry import hub_host, patiently, unavailable
from ..training.memory import ModelShape
from .kernels import pick_attention

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf")
_TEMPLATE_LIMIT = 256 * 1024
_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json")


def fetch(context: Context, name: str, uri: str, *, remote_code: bool = False, config: str = "config.json") -> str:
    """In prepare: find or download a model or adapter (`name`: model, teacher, adapter), check it, and note where it is."""
    parsed = parse_uri(uri)
    if parsed.scheme == "pvc":
        folder = context.mounted(parsed)
        if not (folder / config).is_file():
            raise UserError("ModelNotFound", f"{uri} holds no {config}; name the folder that from_pretrained would load")
    else:
        folder = _fetched(context, name, uri, config) or _download(context, name, uri, remote_code)
    _require_safetensors(folder)
    if not remote_code:
        _refuse_code(folder, uri)
    context.write_json(context.layout.reference(name), {"path": str(folder), "uri": uri, "fingerprint": fingerprint(folder, config)})
    return str(folder)


def fetch_base(context: Context) -> str:
    """In prepare: the folder of the base model."""
    model = context.spec.model
    return fetch(context, "model", model.uri, remote_code=model.trust_remote_code)


def noted(context: Context, name: str = "model") -> str:
    """The folder of a model or adapter that prepare fetched."""
    return str(context.read_json(context.layout.reference(name))["path"])


def _fetched(context: Context, name: str, uri: str, config: str) -> Path | None:
    """What an earlier try of this job fetched whole: a branch that has moved since does not move the job."""
    try:
        known = context.read_json(context.layout.reference(name))
        folder = Path(known["path"])
        return folder if known["uri"] == uri and (folder / config).is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _download(context: Context, name: str, uri: str, remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    parsed = parse_uri(uri)
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *(["*.py"] if remote_code else [])]
    secret = context.secret("teacher" if name == "teacher" else "model")

    def refused(why: str) -> UserError:
        return UserError("SourceNotFound", f"{uri}: {why}; check the uri and its revision, and secretRef if it is gated or private")

    def download() -> str:
        cache = f"{context.layout.cache}/models"
        found: str = snapshot_download(
            parsed.name, revision=parsed.revision or None, token=secret, allow_patterns=patterns, cache_dir=cache
        )
        return found

    return Path(patiently(download, hub_host(), refused))


def _require_safetensors(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    others = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    found = f"it has {', '.join(others[:3])}, which can run code when loaded" if others else "it has none"
    raise UserError("NoSafetensors", f"the model's weights must be .safetensors files; {found}. Convert it with save_pretrained")


def _refuse_code(folder: Path, uri: str) -> None:
    """A model that names code of its own is refused before any library reads its configuration (case A7)."""
    for name in _CONFIGS:
        try:
            document = json.loads((folder / name).read_text())
        except FileNotFoundError:
            continue
        except (ValueError, RecursionError):
            raise UserError("ModelNotReadable", f"{uri}: {name} is no JSON") from None
        if isinstance(document, dict) and document.get("auto_map"):
            raise UserError(
                "RemoteCode",
                f"{uri} brings Python code ({name}: auto_map). Read that code, then set model.trustRemoteCode: true; an administrator must allow it for the namespace",
            )


def fingerprint(folder: Path, config: str = "config.json") -> str:
    """A digest of the model's configuration and of its files' names and sizes: tells one base from another."""
    digest = hashlib.sha256((folder / config).read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def load_tokenizer(context: Context, folder: str) -> Any:
    """The fast tokenizer, with a padding token, and with tuning.chatTemplate where that is set."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=context.spec.model.trust_remote_code)
    except (OSError, ValueError, KeyError) as failure:
        raise unavailable(failure, hub_host()) or UserError(
            "TokenizerNotReadable", f"the model's tokenizer cannot be loaded: {str(failure)[:500]}"
        ) from failure
    if not tokenizer.is_fast:
        raise UserError("SlowTokenizer", "the model has no fast tokenizer (tokenizer.json), which the loss mask needs")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if context.spec.tuning.chat_template is not None:
        tokenizer.chat_template = context.spec.tuning.chat_template
    if len(str(tokenizer.chat_template or "")) > _TEMPLATE_LIMIT:
        raise UserError("ChatTemplateTooLarge", f"the model's chat template is over {_TEMPLATE_LIMIT // 1024} KiB; set tuning.chatTemplate")
    return tokenizer


def compute_dtype(cuda: bool, precision: str = "auto") -> torch.dtype:
    """bfloat16 where the GPU has it, float16 on older GPUs, float32 on CPU; or as `hyperparameters.precision` says."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision in named:
        return named[precision]
    if not cuda:
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def model_type(context: Context) -> str:
    """The base model's `model_type`, by which libraries know what they support."""
    return str(context.read_json(f"{noted(context)}/config.json").get("model_type", ""))


def load_model(
    context: Context,
    folder: str,
    *,
    dtype: torch.dtype,
    quantised: bool = False,
    device: str | None = None,
    reward: bool = False,
    cuda: bool = False,
    padding_free: bool = False,
) -> Any:
    """The causal language model, or the reward model over it; NF4 with double quantisation for qlora (https://arxiv.org/abs/2305.14314).

    `padding_free`: rows may come one behind the other, and an attention that can tell them apart is picked where there is one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    hyper, trust = context.spec.tuning.hyperparameters, context.spec.model.trust_remote_code
    options: dict[str, Any] = {}
    if quantised:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head", "score"],
        )
        options["device_map"] = {"": device or "cpu"}
    if reward:
        options["num_labels"] = 1
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    computed = compute_dtype(cuda, hyper.precision)  # weights in fp32 are computed with under autocast
    attention = pick_attention(
        hyper.attention, _class(kind, config), config, computed, cuda=cuda, padding_free=padding_free, compiled=hyper.torch_compile
    )
    return kind.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, attn_implementation=attention, trust_remote_code=trust, **options
    )


def _class(auto: Any, config: Any) -> Any:
    """The class that an Auto class would load, or None for one that the model brings along."""
    found = auto._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, (tuple, list)) else found


def describe(context: Context, folder: str) -> ModelShape:
    """The model's sizes from its configuration alone: it is built without memory on the meta device, with its adapter."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from ..training.methods import METHODS

    spec, trust = context.spec, context.spec.model.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        kind = AutoModelForSequenceClassification if spec.tuning.objective == "reward" else AutoModelForCausalLM
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=trust)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as failure:
        raise unavailable(failure, hub_host()) or UserError(
            "ModelNotReadable", f"the model's config.json is not understood: {str(failure)[:500]}"
        ) from failure
    return shape_of(spec, config.get_text_config(), model, METHODS[spec.tuning.method].trainable(spec.tuning, model))


def shape_of(spec: FineTuneJobSpec, config: Any, model: Any, trainable: int) -> ModelShape:
    """The sizes of a loaded or meta model."""
    hidden = int(config.hidden_size)
    heads = int(config.num_attention_heads)
    head = int(getattr(config, "head_dim", None) or hidden // heads)
    experts = int(getattr(config, "num_experts_per_tok", None) or 1)
    width = int(getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None) or 4 * hidden)
    output = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not output and m.out_features > 1)
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=trainable,
        linear=linear,
        hidden=hidden,
        layers=int(config.num_hidden_layers),
        attention=heads * head,
        intermediate=experts * width,
        vocabulary=0 if spec.tuning.objective == "reward" else int(config.vocab_size),
        position=(spec.tuning.virtual_tokens or VirtualTokens()).count if spec.tuning.method in VIRTUAL_TOKEN_METHODS else 0,
    )
