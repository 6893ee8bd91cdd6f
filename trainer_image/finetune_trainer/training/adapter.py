"""The adapter that a job goes on from (`tuning.continueFrom`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..job.context import Context
from ..models.fetch import fetch_model, local_path
from ..models.weights import ADAPTER_CONFIG, shapes
from ..process.errors import UserError
from .methods import past_the_head, rehearse, task_type


def fetch_adapter(context: Context) -> None:
    """In prepare: fetch the adapter of `continueFrom`. Raises UserError when it is not of the method asked for."""
    uri = str(context.spec.tuning.continue_from)
    folder = fetch_model(context, "adapter", uri, config=ADAPTER_CONFIG)
    try:
        kind = context.read_json(f"{folder}/{ADAPTER_CONFIG}")
        found = {
            "LORA": "dora" if kind.get("use_dora") else "rslora" if kind.get("use_rslora") else "lora",
            "IA3": "ia3",
            "PROMPT_TUNING": "prompt",
        }
        found |= {"PREFIX_TUNING": "prefix", "P_TUNING": "p-tuning"}
        method = found.get(str(kind.get("peft_type")), "another method")
    except (OSError, ValueError, AttributeError):
        raise UserError("AdapterNotReadable", f"tuning.continueFrom: {uri} has no readable adapter_config.json") from None
    wanted = "lora" if context.spec.tuning.method == "qlora" else context.spec.tuning.method
    if method != wanted:
        raise UserError(
            "WrongAdapter",
            f"tuning.continueFrom: {uri} is an adapter of {method}, tuning.method is {context.spec.tuning.method}; set method to {method}",
        )


def adapt(context: Context, model: Any) -> Any:
    """In prepare: a model on the meta device with the adapter of `continueFrom`. Raises UserError when it was made on another base."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuning, folder = context.spec.tuning, local_path(context, "adapter")
    uri = str(tuning.continue_from)
    try:
        config = PeftConfig.from_pretrained(folder)
        if config.task_type not in (None, task_type(tuning)):
            raise UserError(
                "WrongAdapter",
                f"tuning.continueFrom: {uri} was made for another task ({config.task_type}) than tuning.objective {tuning.objective}; "
                "name an adapter of a like objective: those of reward models go on with reward, all others with all others",
            )
        config.inference_mode = False
        made = get_peft_model(model, config, autocast_adapter_dtype=False)
        wanted = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(made, save_embedding_layers=False).items()}
        if tuning.method == "prefix":
            rehearse(made)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as failure:
        raise UserError("WrongAdapter", f"tuning.continueFrom: {uri} does not fit this base: {str(failure)[:400]}; {_BASE}") from failure
    stored = shapes(Path(folder), uri, ADAPTER_CONFIG)
    odd = sorted(name for name in wanted if name in stored and stored[name] != wanted[name])
    lost = sorted(set(wanted) - set(stored)) if not getattr(config, "target_parameters", None) else []  # experts have two names
    if odd:
        found = f"{odd[0]} is {list(stored[odd[0]])} in the adapter and would be {list(wanted[odd[0]])} here"
        raise UserError("WrongAdapter", f"tuning.continueFrom: {uri} was made on another base: {found}; {_BASE}")
    if lost:
        raise UserError(
            "WrongAdapter", f"tuning.continueFrom: {uri} lacks {len(lost)} weights that this base needs, such as {lost[0]}; {_BASE}"
        )
    if tuning.objective != "orpo" and isinstance(made.get_output_embeddings(), BaseTunerLayer):
        raise UserError("WrongAdapter", f"tuning.continueFrom: {uri}: {past_the_head(tuning.objective, 'the head')}; name another adapter")
    return made


_BASE = "set model.uri to the base that it was made on"
