"""Load models and tokenizers from a folder of the workspace, never from pickles."""

from __future__ import annotations

from typing import Any

import torch

from ..job.context import Context
from ..process.errors import UserError
from ..remote.retry import hub_host, unavailable_error
from .architecture import auto_class, check_loaded, dequantizing, model_class
from .fetch import local_path
from .kernels import pick_attention

_TEMPLATE_LIMIT = 256 * 1024


def load_tokenizer(context: Context, folder: str) -> Any:
    """The fast tokenizer, with a padding token, and with tuning.chatTemplate where that is set."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=context.spec.model.trust_remote_code)
    except Exception as failure:  # the Rust side raises bare Exceptions
        raise unavailable_error(failure, hub_host()) or UserError(
            "TokenizerNotReadable",
            f"the model's tokenizer cannot be loaded ({str(failure)[:400]}); put the tokenizer.json and tokenizer_config.json of the base beside its weights",
        ) from failure
    if not tokenizer.is_fast:
        raise UserError("SlowTokenizer", "the model has no fast tokenizer (tokenizer.json), which the loss mask needs")
    size = _embedded_tokens(context, folder)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= size:  # one that was added, and that the model has no embedding for
        if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= size:
            raise UserError(
                "TokenizerNotReadable",
                "the model's tokenizer has neither a padding nor an end token that the model knows; name its eos_token in tokenizer_config.json",
            )
        tokenizer.pad_token = tokenizer.eos_token
    if context.spec.tuning.chat_template is not None:
        tokenizer.chat_template = context.spec.tuning.chat_template
    if len(str(tokenizer.chat_template or "")) > _TEMPLATE_LIMIT:
        raise UserError("ChatTemplateTooLarge", f"the model's chat template is over {_TEMPLATE_LIMIT // 1024} KiB; set tuning.chatTemplate")
    return tokenizer


def _embedded_tokens(context: Context, folder: str) -> float:
    """Tokens that a model has an embedding for, by its configuration; no bound where that does not say."""
    config = context.read_json(f"{folder}/config.json")
    text = config.get("text_config")
    return float(config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None) or "inf")


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
    return str(context.read_json(f"{local_path(context)}/config.json").get("model_type", ""))


def load_model(
    context: Context,
    folder: str,
    *,
    dtype: torch.dtype,
    quantized: bool = False,
    device: str | None = None,
    reward: bool = False,
    cuda: bool = False,
    padding_free: bool = False,
) -> Any:
    """The causal language model, or the reward model over it; NF4 with double quantisation for qlora (https://arxiv.org/abs/2305.14314).

    `padding_free`: rows may come one behind the other, and an attention that can tell them apart is picked where there is one.
    """
    from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig

    hyper, trust = context.spec.tuning.hyperparameters, context.spec.model.trust_remote_code
    options: dict[str, Any] = {}
    if quantized:
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
    kind = auto_class(reward=reward)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    computed = compute_dtype(cuda, hyper.precision)  # weights in fp32 are computed with under autocast
    attention = pick_attention(
        hyper.attention, model_class(kind, config), config, computed, cuda=cuda, padding_free=padding_free, compiled=hyper.torch_compile
    )
    if (undone := dequantizing(config)) is not None:
        options["quantization_config"] = undone
    model, info = kind.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        attn_implementation=attention,
        trust_remote_code=trust,
        output_loading_info=True,
        generation_config=GenerationConfig(),  # the base's is for those who serve it: here it would change what is greedy, or not be saved
        **options,
    )
    check_loaded(model, info, folder)
    if undone is not None:
        model.__dict__.pop("_weight_conversions", None)  # by which it would be saved under the names of quantized weights
        model.to(dtype)  # what was turned back is 16 bit, whatever was asked for
    return model
