"""What prepare knows of the base: its sizes, what it can take, what is adapted. Read off its configuration and its files' headers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune_api.spec import LORA_METHODS, VIRTUAL_TOKEN_METHODS, FineTuneJobSpec, Lora, VirtualTokens

from ..data.limits import Limits
from ..job.context import Context
from ..models import architecture
from ..models.fetch import shown
from ..models.kernels import keeps_rows_apart
from ..process.errors import UserError
from .adapter import adapt
from .memory import ModelShape
from .methods import METHODS, adapter_dropout


@dataclass(frozen=True)
class Base:
    """A base model with what is to learn."""

    shape: ModelShape
    limits: Limits
    modules: tuple[str, ...]
    """Names of the parameters that learn."""
    keeps_rows_apart: bool
    """Whether an attention computes it, on some GPU, that knows where each of several rows in a sequence begins."""
    notes: tuple[str, ...] = ()
    """What is done otherwise than it was asked for, and why: goes into the plan."""


def describe_model(context: Context, folder: str) -> Base:
    """The base, built without memory on the meta device, with its adapter. Raises UserError for one that cannot be trained so."""
    spec, uri = context.spec, shown("model", context.spec.model.uri)
    reward, trust = spec.tuning.objective == "reward", spec.model.trust_remote_code
    config = architecture.read_config(folder, uri, trust=trust)
    architecture.check_architecture(config, uri, reward=reward)
    architecture.check_quantization(config, uri)
    if spec.tuning.method == "qlora" and architecture.quantization(config) is not None:
        raise UserError(
            "QuantizedBase", f"tuning.method qlora: the weights of {uri} are stored quantized already; set tuning.method to lora"
        )
    kind = architecture.model_class(architecture.auto_class(reward=reward), config)
    hyper = spec.tuning.hyperparameters
    architecture.check_attention(hyper.attention, kind, config)
    model, unused = architecture.on_meta(config, folder, uri, reward=reward, trust=trust)
    limits = Limits(
        vocabulary=architecture.vocabulary(model),
        positions=architecture.positions(model),
        context=architecture.context_length(config),
        front=_virtual_tokens(spec),
        sampled=spec.tuning.grpo.max_new_tokens if spec.tuning.grpo is not None else None,
    )
    shape = shape_of(spec, config.get_text_config(), model)
    if hyper.gradient_checkpointing and not shape.recomputes:
        raise UserError(
            "MethodNotSupported",
            f"hyperparameters.gradientCheckpointing: models of type {config.model_type} cannot compute activations again; set it to false",
        )
    learns = adapt(context, model) if spec.tuning.continue_from is not None else METHODS[spec.tuning.method].apply(spec.tuning, model)
    trainable = {name: p.numel() for name, p in learns.named_parameters() if p.requires_grad}
    asked, notes = (spec.tuning.lora or Lora()).dropout, []
    if spec.tuning.method in LORA_METHODS and spec.tuning.continue_from is None and adapter_dropout(learns) != asked:
        notes.append(f"lora.dropout is 0 instead of {asked:g}: the experts of a mixture are adapted as parameters, which have none")
    if unused:
        notes.append(
            f"{len(unused)} tensors of the base's files belong to no part of the model by its config.json, for example {unused[0]}"
        )
    return Base(
        shape=replace(shape, trainable=sum(trainable.values())),
        limits=limits,
        modules=tuple(trainable),
        keeps_rows_apart=keeps_rows_apart(hyper.attention, kind, config, compiled=hyper.torch_compile),
        notes=tuple(notes),
    )


def packs(spec: FineTuneJobSpec, base: Base) -> bool:
    """Whether rows are packed where that is asked for: with an attention that keeps them apart, or one that was asked for by name.

    objectives/sft.py sees to it.
    """
    hyper = spec.tuning.hyperparameters
    return hyper.packing and (hyper.attention != "auto" or (spec.distribution.gpus_per_node > 0 and base.keeps_rows_apart))


def _virtual_tokens(spec: FineTuneJobSpec) -> int:
    return (spec.tuning.virtual_tokens or VirtualTokens()).count if spec.tuning.method in VIRTUAL_TOKEN_METHODS else 0


def shape_of(spec: FineTuneJobSpec, config: Any, model: Any) -> ModelShape:
    """The sizes of a loaded or meta model; what learns is not known yet."""
    size = architecture.size
    hidden = size(config, "hidden_size") or int(model.get_input_embeddings().weight.shape[1])
    heads = size(config, "num_attention_heads") or 1  # a state-space model has none
    head = size(config, "head_dim") or hidden // heads
    experts = size(config, "num_experts_per_tok") or 1
    width = size(config, "moe_intermediate_size", "intermediate_size") or 4 * hidden
    output = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not output and m.out_features > 1)
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=0,
        linear=linear,
        hidden=hidden,
        layers=size(config, "num_hidden_layers") or 1,
        attention=heads * head,
        intermediate=experts * width,
        vocabulary=0 if spec.tuning.objective == "reward" else architecture.vocabulary(model),
        position=_virtual_tokens(spec),
        recomputes=bool(model.supports_gradient_checkpointing),
    )
