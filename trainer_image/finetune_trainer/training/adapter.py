"""The adapter that a job goes on from (`tuning.continueFrom`)."""

from __future__ import annotations

from ..job.context import Context
from ..models.fetch import fetch_model
from ..process.errors import UserError


def fetch_adapter(context: Context) -> None:
    """In prepare: fetch the adapter of `continueFrom`. Raises UserError when it is not of the method asked for."""
    uri = str(context.spec.tuning.continue_from)
    folder = fetch_model(context, "adapter", uri, config="adapter_config.json")
    try:
        kind = context.read_json(f"{folder}/adapter_config.json")
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
