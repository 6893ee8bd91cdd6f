"""The sizes of a model that memory and work depend on, read off its configuration: no weight is loaded."""

from __future__ import annotations

from typing import Any

import torch

from finetune_api.spec import VIRTUAL_TOKEN_METHODS, FineTuneJobSpec, VirtualTokens

from ..job.context import Context
from ..process.errors import UserError
from ..remote.retry import hub_host, unavailable_error
from .memory import ModelShape
from .methods import METHODS


def describe_model(context: Context, folder: str) -> ModelShape:
    """The model's sizes from its configuration alone: it is built without memory on the meta device, with its adapter."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    spec, trust = context.spec, context.spec.model.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        kind = AutoModelForSequenceClassification if spec.tuning.objective == "reward" else AutoModelForCausalLM
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=trust)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as failure:
        raise unavailable_error(failure, hub_host()) or UserError(
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
