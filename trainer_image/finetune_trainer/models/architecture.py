"""What kind of model a folder holds, told from its configuration and the headers of its weights: no tensor is read.

Everything that loading it later would stumble over, or pass over in silence, is refused here, before a GPU is taken. `uri` is what
messages call the model: the field and its value.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..process.errors import UserError
from ..remote.retry import hub_host, unavailable_error
from .weights import shapes

_DEQUANTIZED = ("mxfp4", "fp8")
"""Formats that models are published in and that transformers turns back into 16 bit while loading."""
_ATTENTION = {"sdpa": "_supports_sdpa", "flash-attention-2": "_supports_flash_attn"}
_JUDGING = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|positions_embed|position_embeddings|pos_encoding)$")


def read_config(folder: str, uri: str, *, trust: bool) -> Any:
    """The model's configuration. Raises UserError when this transformers does not understand it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    except Exception as failure:  # whatever validation of a stranger's file raises
        raise unavailable_error(failure, hub_host()) or _not_understood(uri, failure) from failure


def _not_understood(uri: str, failure: BaseException) -> UserError:
    text = str(failure)
    if isinstance(failure, KeyError) and failure.args:  # a sentence, or one of its values
        text = str(failure.args[0]) if " " in str(failure.args[0]) else f"transformers knows no {failure}"
    return UserError("ModelNotReadable", f"{uri}: the model's config.json is not understood: {text[:500]}")


def model_class(auto: Any, config: Any) -> Any:
    """The class that an Auto class would load, or None for one that the model brings along."""
    found = auto._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, (tuple, list)) else found


def auto_class(*, reward: bool) -> Any:
    """The Auto class of what is trained: a causal language model, or a reward model over one."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if reward else AutoModelForCausalLM


def check_architecture(config: Any, uri: str, *, reward: bool) -> None:
    """Raise UserError for what is no causal language model: encoders, encoder-decoders, models of images or speech."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    kind = str(config.model_type)
    named = f"{uri} is {', '.join(getattr(config, 'architectures', None) or [f'a model of type {kind}'])}"
    heads = [str(name).partition("For")[2] for name in getattr(config, "architectures", None) or ()]
    instead = "name a decoder that writes text from left to right, such as Llama, Qwen, Mistral or Gemma"
    custom = bool(getattr(config, "auto_map", None))
    if getattr(config, "is_encoder_decoder", False):
        raise UserError("WrongArchitecture", f"{named}, an encoder-decoder, which is not trained here; {instead}")
    if getattr(config, "is_decoder", True) is False and type(config) in AutoModelForMaskedLM._model_mapping:
        raise UserError("WrongArchitecture", f"{named}, an encoder that sees what comes after a token as well; {instead}")
    if not custom and model_class(AutoModelForCausalLM, config) is None:
        raise UserError("WrongArchitecture", f"{named}, which transformers has no causal language model for; {instead}")
    if heads and not reward and all(head in _JUDGING for head in heads):
        raise UserError("WrongArchitecture", f"{named}, whose output are classes and not words; {instead}")
    if not custom and reward and model_class(auto_class(reward=True), config) is None:
        raise UserError(
            "WrongArchitecture", f"tuning.objective reward: transformers has no reward model for models of type {kind}; use another base"
        )


def quantization(config: Any) -> Any:
    """The quantization that the weights are stored in, or None: a dict, or transformers' own object."""
    return getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)


def _method(found: Any) -> str:
    method = found.get("quant_method", "") if isinstance(found, dict) else getattr(found, "quant_method", "")
    return str(getattr(method, "value", method)) or "an unnamed method"


def check_quantization(config: Any, uri: str) -> None:
    """Raise UserError for weights that are stored quantized in a way that cannot be undone while loading."""
    found = quantization(config)
    if found is not None and _method(found) not in _DEQUANTIZED:
        raise UserError(
            "QuantizedBase",
            f"{uri}: its weights are stored quantized ({_method(found)}), which cannot be trained; name the model that it was made "
            "from, in 16 bit. With tuning.method qlora it is quantized to 4 bit while it is loaded",
        )


def dequantizing(config: Any) -> Any:
    """What to load a model with that is published in 4 or 8 bit and trains in 16, or None."""
    found = quantization(config)
    if found is None:
        return None
    from transformers import FineGrainedFP8Config, Mxfp4Config

    return Mxfp4Config(dequantize=True) if _method(found) == "mxfp4" else FineGrainedFP8Config(dequantize=True)


def check_attention(wanted: str, kind: Any, config: Any) -> None:
    """Raise UserError for a kernel that was asked for by name and that the model's class does not run with."""
    flag = _ATTENTION.get(wanted)
    if flag is None or kind is None or supports(kind, flag):
        return
    raise UserError(
        "AttentionNotSupported",
        f"hyperparameters.attention {wanted} is not supported by models of type {config.model_type}; set it to auto",
    )


def supports(kind: Any, flag: str) -> bool:
    """Whether a model class runs with an attention, by transformers' flags. flash-attention is more than one implementation."""
    only = getattr(kind, "_compatible_flash_implementations", None)
    if flag == "_supports_flash_attn" and only is not None and "flash_attention_2" not in only:
        return False
    return bool(getattr(kind, flag, True))


def on_meta(config: Any, folder: str, uri: str, *, reward: bool, trust: bool) -> tuple[Any, list[str]]:
    """The model without memory, after its weights' names and shapes were matched with it as loading them would; and what was left over.

    Raises UserError when weights are missing, which transformers makes up at random, or have another shape.
    """
    auto = auto_class(reward=reward)
    kind = model_class(auto, config)
    if reward:
        config.num_labels = 1
    try:
        if kind is None:  # load_model looks for what is missing
            with torch.device("meta"):
                return auto.from_config(config, trust_remote_code=trust), []
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes(Path(folder), uri).items()}
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            device_map={"": "meta"},
            **({"quantization_config": undone} if (undone := dequantizing(config)) is not None else {}),
        )
    except UserError:
        raise
    except Exception as failure:  # a configuration that contradicts itself fails anywhere in the model's own code
        raise unavailable_error(failure, hub_host()) or _not_understood(uri, failure) from failure
    check_loaded(model, info, uri)
    return model, sorted(info["unexpected_keys"])


def check_loaded(model: Any, info: dict[str, Any], uri: str) -> None:
    """Raise UserError when loading left weights at random. `info`: transformers' own account of what it loaded."""
    missing = sorted(info["missing_keys"])
    if type(model).__name__.endswith("ForSequenceClassification"):  # a reward model's score is new, and learned
        missing = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
    if missing:
        more = f", {missing[1]}" if len(missing) > 1 else ""
        found = sorted(info["unexpected_keys"])
        instead = f"; {len(found)} tensors belong to no part of it, for example {found[0]}" if found else ""
        raise UserError(
            "WeightsMissing",
            f"{uri}: {len(missing)} weights of {type(model).__name__} are in no file, for example {missing[0]}{more}{instead}. They would start "
            "at random: download the whole model, or mend config.json",
        )
    wrong = sorted((str(name), tuple(stored), tuple(wanted)) for name, stored, wanted in info["mismatched_keys"])
    if wrong:
        name, stored, wanted = wrong[0]
        raise UserError(
            "WeightsMismatch",
            f"{uri}: {len(wrong)} weights have another shape than config.json says, for example {name}: {list(stored)} in the file, "
            f"{list(wanted)} by config.json; use the config.json that was saved with the weights",
        )


def positions(model: Any) -> int | None:
    """Tokens that a model has positions for and cannot go beyond; None for rotary, relative or no positions."""
    config = model.config.get_text_config()
    embeddings = model.get_input_embeddings()
    tables = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding) and module is not embeddings]
    tables += [name for name, _ in model.named_buffers()]
    if any(_POSITIONS.search(name) for name in tables):
        return int(config.max_position_embeddings)
    return int(config.max_seq_len) if config.model_type == "mpt" else None  # its ALiBi is a table as well


def context_length(config: Any) -> int | None:
    """Tokens that the model was made for: more can be computed with rotary positions, and are guesses."""
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or most <= 0:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    layers = [r for r in rope.values() if isinstance(r, dict)] if all(isinstance(r, dict) for r in rope.values()) else [rope]
    scaled = [float(r.get("factor") or 1) * float(r.get("original_max_position_embeddings") or most) for r in layers]
    return max(most, *(int(length) for length in scaled)) if scaled else most


def size(config: Any, *names: str) -> int | None:
    """A number of a configuration, by the first of its names that is set there; the largest, where layers differ in it."""
    for name in names:
        try:
            found = getattr(config, name, None)
        except RuntimeError:  # transformers' word for layers that differ
            found = [getattr(config.per_layer_config[layer], name, None) for layer in range(config.num_hidden_layers)]
        numbers = [number for number in (found if isinstance(found, list | tuple) else [found]) if isinstance(number, int)]
        if any(numbers):
            return max(numbers)
    return None


def vocabulary(model: Any) -> int:
    """Tokens that the model has an embedding for: IDs are smaller."""
    return int(model.get_input_embeddings().weight.shape[0])
