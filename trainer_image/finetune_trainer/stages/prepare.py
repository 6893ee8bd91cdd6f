"""prepare: fetch the models, check and tokenise the data, fix the plan. CPU only; the last chance to refuse bad input."""

from __future__ import annotations

import importlib.util
import json
import re

from finetune_api.contract import StageResult
from finetune_api.status import DatasetStatus

from ..data.fetch import forget_downloads
from ..data.pipeline import Desk
from ..data.report import samples, write_report
from ..data.store import Store
from ..data.tokens import Tokeniser
from ..evaluation import harness
from ..evaluation.forgetting import keep_general_rows
from ..export import forms
from ..job.context import Context
from ..models import load as models
from ..process.errors import UserError
from ..training import teacher
from ..training.plan import make_plan


def prepare(context: Context) -> StageResult:
    """Run the stage."""
    spec = context.spec
    _check_settings(context)
    folder = models.fetch_base(context)
    tokeniser = Tokeniser(
        models.load_tokenizer(context, folder),
        objective=spec.tuning.objective,
        max_length=spec.tuning.hyperparameters.max_length,
        assistant_only=spec.tuning.assistant_only_loss,
    )
    teacher.fetch(context, tokeniser.tokenizer)
    shape = models.describe(context, folder)
    forms.check(context, folder)
    if spec.tuning.continue_from is not None:
        _check_adapter(context)
    if spec.evaluation is not None and spec.evaluation.harness_tasks:
        harness.fetch(spec.evaluation.harness_tasks)
    if spec.evaluation is not None and spec.evaluation.forgetting is not None:
        keep_general_rows(context, tokeniser.tokenizer, spec.evaluation.forgetting)
    store = Store(context.layout.data)
    try:
        desk = Desk(context, tokeniser, store)
        desk.read_all()
        desk.compare()
        desk.check_enough()
        plan = make_plan(spec, desk.rows_per_epoch, shape, teacher=teacher.parameters(context), tokens=desk.tokens)
        status = desk.write()
        context.write_json(context.layout.plan, plan.to_wire())
        write_report(context, desk.report(status, plan), samples(store, tokeniser.tokenizer))
    finally:
        store.close()
    forget_downloads(context)
    return StageResult(reason="DataReady", message=_message(status), result={"dataset": status.to_wire(), "plan": plan.to_wire()})


def _message(status: DatasetStatus) -> str:
    gone = ", ".join(f"{count} {kind}" for kind, count in sorted(status.dropped.items()))
    odd = ", ".join(f"{count} {kind}" for kind, count in sorted(status.warnings.items()))
    return (
        f"{status.train} rows to train on ({status.tokens} tokens, {status.format}), {status.eval} held out"
        + (f"; left out: {gone}" if gone else "")
        + (f"; kept but worth a look: {odd} (reports/data.html)" if odd else "")
    )


def _check_settings(context: Context) -> None:
    """What the schema cannot see, before anything is downloaded."""
    spec = context.spec
    grpo = spec.tuning.grpo.rewards if spec.tuning.grpo is not None else []
    schemas = [("tuning.grpo.rewards.jsonSchema", r.json_schema) for r in grpo]
    patterns = [("tuning.grpo.rewards.pattern", r.pattern) for r in grpo]
    if spec.evaluation is not None:
        schemas.append(("evaluation.jsonSchema", spec.evaluation.json_schema))
        patterns.append(("evaluation.regex", spec.evaluation.regex))
    for place, text in schemas:
        if text is not None:
            _check_schema(place, text)
    for place, text in patterns:
        try:
            re.compile(text or "")
        except re.error as failure:
            raise UserError("BadRegex", f"{place} is no regular expression: {failure}") from None
    if spec.tuning.hyperparameters.attention == "flash-attention-2" and importlib.util.find_spec("flash_attn") is None:
        raise UserError(
            "NoFlashAttention", "hyperparameters.attention is flash-attention-2, which this image does not have; set it to auto or sdpa"
        )


def _check_schema(place: str, text: str) -> None:
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    try:
        schema = json.loads(text)
        validator_for(schema).check_schema(schema)
    except (ValueError, TypeError, RecursionError, SchemaError) as failure:
        raise UserError("BadJSONSchema", f"{place} is no JSON Schema: {str(failure).splitlines()[0][:300]}") from None


def _check_adapter(context: Context) -> None:
    """The adapter of `continueFrom` is of the method asked for."""
    uri = str(context.spec.tuning.continue_from)
    folder = models.fetch(context, "adapter", uri, config="adapter_config.json")
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
