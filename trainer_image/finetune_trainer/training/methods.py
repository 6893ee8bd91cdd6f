"""The methods (`tuning.method`): which weights learn, one entry each. docs/extending.md shows how to add one.

A method either gives PEFT a configuration, or freezes and releases weights of the model itself.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_api.spec import LORA_METHODS, VIRTUAL_TOKEN_METHODS, Lora, Method, Objective, Partial, Tuning, VirtualTokens
from finetune_api.status import Plan

from ..job.context import Context
from ..models.architecture import size
from ..models.fetch import local_path
from ..models.load import compute_dtype, load_model
from ..process.errors import UserError


@dataclass(frozen=True)
class MethodKind:
    """One way to choose what learns."""

    config: Callable[[Tuning, str, Any], Any] | None = None
    """The adapter's PEFT configuration for a task type (CAUSAL_LM or SEQ_CLS) and a model, or None."""
    set_trainable: Callable[[Tuning, Any], None] = lambda _tuning, _model: None
    """Set `requires_grad` of the model's own weights."""
    quantized: bool = False
    """Whether the frozen base is held in 4 bit."""

    def apply(self, tuning: Tuning, model: Any) -> Any:
        """The model (on the meta device) with what learns released, or with its adapter. Raises UserError when that cannot be."""
        if self.config is None:
            self.set_trainable(tuning, model)
            return model
        from peft import get_peft_model

        kind = model.config.model_type
        if tuning.method in ("prompt", "p-tuning") and any(name.endswith("embed_tokens_per_layer") for name, _ in model.named_modules()):
            message = f"tuning.method {tuning.method} does not work on models of type {kind}, whose layers look tokens up by number"
            raise UserError("MethodNotSupported", f"{message}; set tuning.method to lora")
        try:
            made = get_peft_model(model, self.config(tuning, task_type(tuning), model), autocast_adapter_dtype=False)
            if tuning.method == "prefix":
                rehearse(made)
            return made
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as failure:  # NotImplementedError is one of the last
            # PEFT has tables of models, and looks for what it needs in the rest
            linear = f"tuning.lora.targetModules to linear layers of the model ({_linear_names(model)}), or tuning.method to another"
            raise UserError(
                "MethodNotSupported",
                f"tuning.method {tuning.method} does not work on models of type {kind}: {_words(failure)}. "
                f"Set {linear if tuning.method in LORA_METHODS else 'tuning.method to lora'}",
            ) from failure


def rehearse(model: Any) -> None:
    """One forward pass without memory. Learned keys and values fit where each layer keeps those of its heads, and nothing else:
    not one set for all heads, compressed ones, states, or scores of experts. What they do not fit raises anything.
    """
    import torch

    ids = torch.ones((2, 4), dtype=torch.long, device="meta")
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


def _words(failure: Exception) -> str:
    """A library's message, without its advice about its own names."""
    text = str(failure) if not isinstance(failure, KeyError) else f"no setting for {failure}"
    if text.startswith("Please specify"):
        text = "PEFT has no setting for them"
    return text.partition("\n")[0].partition(" Please ")[0].strip().rstrip(".")[:400] or type(failure).__name__


def _linear_names(model: Any) -> str:
    """The last part of the names of linear layers, most frequent first."""
    import torch
    from transformers.pytorch_utils import Conv1D

    found = Counter(name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D))
    return ", ".join(name for name, _ in found.most_common(16) if name not in ("lm_head", "default")) or "it has none"


def task_type(tuning: Tuning) -> str:
    """PEFT's name for what the model does."""
    return "SEQ_CLS" if tuning.objective == "reward" else "CAUSAL_LM"


_UNADAPTED = {kind: ["out_proj", "conv1d"] for kind in ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")}
"""Linear layers that the model reads the weights of itself, past any adapter: PEFT refuses them by name."""


def _lora(**options: Any) -> Callable[[Tuning, str, Any], Any]:
    def config(tuning: Tuning, task: str, model: Any) -> Any:
        from peft import LoraConfig

        lora = tuning.lora or Lora()
        every = lora.target_modules == ["all-linear"]
        made = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules="all-linear" if every else lora.target_modules,
            exclude_modules=_not_adapted(model) if every else None,
            task_type=task,
            **options,
        )
        modules, parameters = _targets(made, model)
        if not every:
            _check_targets(modules, model, tuning.objective)
        if parameters:  # an input cannot be dropped in front of what is no layer
            if options.get("use_dora"):
                raise UserError(
                    "MethodNotSupported",
                    "tuning.method dora does not work on the experts of a mixture; set tuning.lora.targetModules to the layers of the attention "
                    "(q_proj, k_proj, v_proj, o_proj), or method to lora",
                )
            made.lora_dropout = 0.0
        return made

    return config


def _not_adapted(model: Any) -> list[str] | str | None:
    """What `all-linear` leaves out, as PEFT takes it."""
    names = [*_UNADAPTED.get(model.config.model_type, ()), *_other_forwards(model)]
    others = [rf"({'|'.join(map(re.escape, parts))})\..*"] if (parts := _besides_language(model)) else []
    return "|".join([*others, *(rf"(.*\.)?{re.escape(name)}" for name in names)]) if others else names or None


def _other_forwards(model: Any) -> list[str]:
    """Last names of linear layers that give something else than a tensor, such as a router its choice as well: an adapter adds to a tensor."""
    import torch

    known: dict[type, bool] = {}
    found = set()
    for name, module in model.named_modules():
        kind = type(module)
        if isinstance(module, torch.nn.Linear) and kind.__module__.startswith(("transformers.models.", "transformers_modules.")):
            if kind not in known:
                known[kind] = _gives_more(module)
            if known[kind]:
                found.add(name.rpartition(".")[2])
    return sorted(found)


def _gives_more(module: Any) -> bool:
    """Whether a linear layer's class gives something else than a tensor; asked without its weights, which may lie in parts."""
    import torch

    weights = {
        name: torch.empty(module.out_features, *([module.in_features] if name == "weight" else []), device="meta")
        for name, _ in module.named_parameters(recurse=False)
    }
    try:
        given = torch.func.functional_call(module, weights, (torch.empty(1, module.in_features, device="meta"),))
    except Exception:  # it takes more than one argument, or reads numbers
        return False
    return not isinstance(given, torch.Tensor)


def _besides_language(model: Any) -> list[str]:
    """The parts of a model of text and images that text never passes: they have no gradient, for which DDP would wait."""
    if model.config.get_text_config() is model.config:
        return []
    decoder = model.get_decoder()
    place = next((name for name, module in model.named_modules() if module is decoder), "")
    if not place:
        return []
    depth, head = place.count(".") + 1, model.get_output_embeddings()
    parts = {
        ".".join(name.split(".")[:depth]) for name, module in model.named_modules() if name.count(".") >= depth - 1 and module is not head
    }
    return sorted(parts - {place})


def _full(_: Tuning, model: Any) -> None:
    """Release every weight that text passes."""
    parts = tuple(f"{part}." for part in _besides_language(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (parts and name.startswith(parts)))


def _targets(config: Any, model: Any) -> tuple[set[str], set[str]]:
    """(modules, parameters that are no module's own) that an adapter changes, by PEFT's names for this model.

    The experts of a mixture are one parameter in transformers, whatever the names in the files; PEFT knows both names.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    found = copy.deepcopy(config)
    convert_peft_config_for_transformers(found, model, None)
    modules = {found.target_modules} if isinstance(found.target_modules, str) else set(found.target_modules or ())
    names = [name for name, _ in model.named_parameters()]
    return modules, {p for p in found.target_parameters or () if any(name.endswith(f".{p}") for name in names)}


def _check_targets(wanted: set[str], model: Any, objective: Objective) -> None:
    """Raise UserError for a name that no module has: PEFT passes over it when another one is found; and for the output head."""
    head = model.get_output_embeddings()
    names = [name for name, _ in model.named_modules()]
    missing = sorted(w for w in wanted if not any(name == w or name.endswith(f".{w}") for name in names))
    heads = [name for name, module in model.named_modules() if module is head and head is not None]
    if objective != "orpo" and (on_head := sorted(w for w in wanted if any(name == w or name.endswith(f".{w}") for name in heads))):
        raise UserError(
            "MethodNotSupported",
            f"tuning.lora.targetModules: {past_the_head(objective, on_head[0])}; remove it from the list",
        )
    if on_other := sorted(wanted & set(_other_forwards(model))):
        raise UserError(
            "MethodNotSupported",
            f"tuning.lora.targetModules: {on_other[0]} of models of type {model.config.model_type} is no plain linear layer, which an adapter "
            "could add to; remove it from the list",
        )
    if missing:
        raise UserError(
            "NoSuchModule",
            f"tuning.lora.targetModules: no module of this model ({model.config.model_type}) is named {', '.join(missing)}; its linear layers are "
            f"{_linear_names(model)}. Name some of these, or all-linear",
        )


def past_the_head(objective: Objective, head: str) -> str:
    """For people: why an adapter on the output head would learn nothing."""
    return (
        f"with objective {objective} the loss is computed from the weights of {head} directly, past an adapter, which would learn nothing"
    )


def adapter_dropout(model: Any) -> float:
    """The dropout that an adapter came to have."""
    return max((float(getattr(c, "lora_dropout", 0.0) or 0.0) for c in getattr(model, "peft_config", {}).values()), default=0.0)


def _ia3(_: Tuning, task: str, __: Any) -> Any:
    from peft import IA3Config

    return IA3Config(task_type=task)


def _prompt(tuning: Tuning, task: str, _: Any) -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(num_virtual_tokens=(tuning.virtual_tokens or VirtualTokens()).count, task_type=task)


def _prefix(tuning: Tuning, task: str, _: Any) -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(num_virtual_tokens=(tuning.virtual_tokens or VirtualTokens()).count, task_type=task)


def _p_tuning(tuning: Tuning, task: str, _: Any) -> Any:
    from peft import PromptEncoderConfig

    return PromptEncoderConfig(num_virtual_tokens=(tuning.virtual_tokens or VirtualTokens()).count, encoder_hidden_size=128, task_type=task)


def _partial(tuning: Tuning, model: Any) -> None:
    """Release the last layers with the final norm and the head, and what else is named; freeze the rest."""
    partial = tuning.partial or Partial()
    layers = size(model.config.get_text_config(), "num_hidden_layers") or 0
    last = {str(index) for index in range(max(0, layers - partial.last_layers), layers)}
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    others = tuple(f"{part}." for part in _besides_language(model))
    found = 0
    for name, parameter in model.named_parameters():
        layer = re.search(r"\.(?:layers|h|blocks|block)\.(\d+)\.", name)
        learns = (
            (layer is not None and layer.group(1) in last)
            or (partial.last_layers > 0 and layer is None and id(parameter) not in embeddings)
            or (partial.embeddings and id(parameter) in embeddings)
            or (partial.norms and "norm" in name.lower())
            or any(module in name for module in partial.modules)
        )
        learns = learns and not (others and name.startswith(others))
        parameter.requires_grad_(learns)
        found += learns
    missing = [module for module in partial.modules if not any(module in name for name, _ in model.named_parameters())]
    if missing or not found:
        raise UserError("NoSuchModule", f"tuning.partial.modules: no parameter is named like {', '.join(missing) or 'that'}")


METHODS: dict[Method, MethodKind] = {
    "full": MethodKind(set_trainable=_full),
    "partial": MethodKind(set_trainable=_partial),
    "lora": MethodKind(_lora()),
    "qlora": MethodKind(_lora(), quantized=True),
    "dora": MethodKind(_lora(use_dora=True)),
    "rslora": MethodKind(_lora(use_rslora=True)),
    "ia3": MethodKind(_ia3),
    "prompt": MethodKind(_prompt),
    "prefix": MethodKind(_prefix),
    "p-tuning": MethodKind(_p_tuning),
}


def build_model(context: Context, plan: Plan, folder: str, arguments: Any, *, reward: bool, cuda: bool) -> Any:
    """The model as it is trained: loaded, frozen where the method says so, with its adapter (or that of `continueFrom`)."""
    import torch
    from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

    tuning = context.spec.tuning
    kind, dtype = METHODS[tuning.method], compute_dtype(cuda, tuning.hyperparameters.precision)
    load = torch.float32 if kind.config is None else dtype  # the optimizer needs full-precision weights
    device = f"cuda:{torch.cuda.current_device()}" if cuda else "cpu"
    flat = tuning.objective in ("sft", "pretrain") and tuning.method not in VIRTUAL_TOKEN_METHODS
    model = load_model(context, folder, dtype=load, quantized=kind.quantized, device=device, reward=reward, cuda=cuda, padding_free=flat)
    model.config.use_cache = False
    if kind.quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=arguments.gradient_checkpointing)
    if kind.config is None:
        kind.set_trainable(tuning, model)
        return model
    sharded = plan.strategy == "deepspeed-zero3"  # gathers parameters of one dtype only
    if tuning.continue_from is not None:
        adapter = local_path(context, "adapter")
        return PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=not sharded)
    return get_peft_model(model, kind.config(tuning, task_type(tuning), model), autocast_adapter_dtype=not sharded)


def loraplus_optimizer(tuning: Tuning, arguments: Any, model: Any) -> Any:
    """The optimizer of LoRA+, or None for the one that the arguments name."""
    if tuning.lora is None or tuning.lora.plus_ratio is None:
        return None
    from peft.optimizers import create_loraplus_optimizer
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    rate = options.pop("lr")
    return create_loraplus_optimizer(
        model,
        kind,
        lr=rate,
        loraplus_lr_ratio=tuning.lora.plus_ratio,
        loraplus_weight_decay=arguments.weight_decay,
        **options,
    )
