"""Where an answer stops: the token that prepare found at the end of the chat template's turns, named wherever one is looked for.

The rows teach the model to end its turn with that token. It stops there only if the tokenizer's eos_token, generation_config.json
and Ollama's Modelfile name it; bases often name another (the end of a text, not that of a turn).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..job.context import Context
from ..process.errors import UserError
from .load import load_tokenizer


def load_served_tokenizer(context: Context, folder: str) -> Any:
    """After prepare: the tokenizer as it is trained with, evaluated and published, which stops where the rows' answers do."""
    tokenizer = load_tokenizer(context, folder)
    for token in _noted(context)[:1]:
        stop_with(tokenizer, token)
    return tokenizer


def _noted(context: Context) -> list[str]:
    """The tokens that prepare found at the end of turns; none where the rows are plain text."""
    report = Path(context.layout.data_report)
    return list(context.read_json(str(report)).get("stops") or []) if report.exists() else []


def stop_with(tokenizer: Any, token: str) -> None:
    """Make a token the tokenizer's eos_token. A template that writes eos_token itself goes on to write what it wrote before."""
    before, template = tokenizer.eos_token, tokenizer.chat_template
    if before == token:
        return
    if before is not None and isinstance(template, str) and "eos_token" in template:
        tokenizer.chat_template = f"{{%- set eos_token = {json.dumps(before, ensure_ascii=False)} -%}}{template}"
    tokenizer.eos_token = token


def stop_ids(context: Context, tokenizer: Any, folder: str) -> list[int]:
    """The tokens that an answer stops with: the tokenizer's own, those of the rows, those of the base; not one that is padded with."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    found += [int(tokenizer.convert_tokens_to_ids(token)) for token in _noted(context)]
    for name in ("generation_config.json", "config.json"):
        path = Path(folder, name)
        if path.exists() and (told := json.loads(path.read_text()).get("eos_token_id")) is not None:
            others = told if isinstance(told, list) else [told]
            found += [int(n) for n in others if n != tokenizer.pad_token_id and 0 <= int(n) < len(tokenizer)]
            break
    return list(dict.fromkeys(found))


def stop_model(context: Context, model: Any, tokenizer: Any, folder: str) -> None:
    """Make a model's generate stop there."""
    ids = stop_ids(context, tokenizer, folder)
    if ids and getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = _as_written(ids)


def write_generation_config(context: Context, tokenizer: Any, folder: str, target: Path) -> None:
    """The base's generation_config.json with the tokens to stop with. Raises UserError where the base's cannot be read."""
    source, ids = Path(folder, "generation_config.json"), stop_ids(context, tokenizer, folder)
    try:
        settings = json.loads(source.read_text()) if source.exists() else {}
    except ValueError as failure:
        raise UserError("ModelNotReadable", f"the model's generation_config.json is no JSON: {failure}") from None
    if ids:
        settings["eos_token_id"] = _as_written(ids)
    for name, token in (("bos_token_id", tokenizer.bos_token_id), ("pad_token_id", tokenizer.pad_token_id)):
        if token is not None:
            settings.setdefault(name, int(token))
    (target / "generation_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _as_written(ids: list[int]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else ids
