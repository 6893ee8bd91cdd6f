"""prepare: fetch the models, check and tokenize the data, fix the plan. CPU only; the last chance to refuse bad input.

    python -m finetune_trainer prepare --job job.json --workspace DIR

The one stage that asks hubs for models and data: what it leaves in the workspace is all that the others see. Loads no weights,
but for a teacher that writes answers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from typing import Any

from finetune_api.contract import Env, Identity, StageResult, read_identity
from finetune_api.status import DatasetStatus

from ..checkpointing.adoption import made_from, settle_checkpoints
from ..data.fetch import remove_downloads
from ..data.pipeline import Pipeline
from ..data.report import samples, write_report
from ..data.store import Store
from ..data.tokens import RowTokenizer
from ..evaluation import harness
from ..evaluation.arms import write_baseline
from ..evaluation.forgetting import write_general_rows
from ..export import forms
from ..job.context import Context
from ..models.fetch import base_reference, fetch_base_model
from ..models.load import load_tokenizer
from ..process.errors import UserError
from ..training import teacher
from ..training.adapter import fetch_adapter
from ..training.objectives.grpo import COMPARING
from ..training.plan import make_plan
from ..training.shape import describe_model, packs


def prepare(context: Context) -> StageResult:
    """Run the stage."""
    spec = context.spec
    evaluation, hyper = spec.evaluation, spec.tuning.hyperparameters

    # 1. What costs nothing to refuse
    _check_settings(context)

    # 2. The models: fetched, and looked at as far as their configuration tells
    folder = fetch_base_model(context)
    if spec.tuning.continue_from is not None:
        fetch_adapter(context)
    base = describe_model(context, folder)
    tokenizer = load_tokenizer(context, folder)
    resident = teacher.fetch_teacher(context, tokenizer)
    forms.check_convertible(context, folder, tokenizer, base.modules)

    # 3. What evaluate will need of the network
    if evaluation is not None and evaluation.harness_tasks:
        harness.fetch(evaluation.harness_tasks)
    if evaluation is not None and evaluation.forgetting is not None:
        write_general_rows(context, tokenizer, evaluation.forgetting)

    if os.environ.get(Env.RESUME) and (known := read_identity(context.layout.identity)) is not None:
        again = evaluation is not None and os.path.exists(context.layout.eval_rows)  # it may have changed: the rows are the same
        return _as_prepared(context, known, write_baseline(context, tokenizer, base.limits).notes if again else [])

    # 4. The rows: read, compared, counted; then the plan, and the rows written
    row_tokenizer = RowTokenizer(
        tokenizer,
        objective=spec.tuning.objective,
        max_length=hyper.max_length,
        assistant_only=spec.tuning.assistant_only_loss,
        needs_answer=_needs_answer(context),
    )
    store = Store(context.layout.data)
    try:
        pipeline = Pipeline(context, row_tokenizer, store, teacher.answer_writer(context, row_tokenizer))
        pipeline.read_all()
        pipeline.compare()
        pipeline.check_enough()
        pipeline.check_fits(base.limits)
        packed = pipeline.packed_sequences() if packs(spec, base) else None
        plan = make_plan(
            spec, pipeline.rows_per_epoch, base.shape, teacher=resident, tokens=pipeline.tokens, packed=packed, notes=base.notes
        )
        status = pipeline.write()
        notes = write_baseline(context, tokenizer, base.limits).notes if evaluation is not None else []
        context.write_json(context.layout.plan, plan.to_wire())
        write_report(context, pipeline.report(status, plan), samples(store, tokenizer))
    finally:
        store.close()
    remove_downloads(context)

    # 5. The checkpoints to go on from: those made from this, or what the job had saved that this one was restored from
    adopted = settle_checkpoints(context, made_from(context, status.digest, plan.strategy))
    message = "; ".join([_message(status), *notes]) + (
        f"; goes on from step {adopted} of the job that it was restored from" if adopted is not None else ""
    )
    return StageResult(reason="DataReady", message=message, result={**_base(context), "dataset": status.to_wire(), "plan": plan.to_wire()})


def _as_prepared(context: Context, known: Identity, notes: list[str]) -> StageResult:
    """Go on with the rows of this run; what they would be now does not count. Raises UserError when its model or settings changed."""
    dataset, plan = context.read_json(context.layout.data_report)["dataset"], context.read_json(context.layout.plan)
    found = made_from(context, known.made_from.rows, plan["strategy"])
    if found != known.made_from:
        what = " and ".join(found.differences(known.made_from))
        raise UserError(
            "RunChanged",
            f"{what} changed since run {context.job.run} was prepared, and it goes on with what it was made from alone: put that back, "
            "or leave --resume out: a new run begins, and this one is kept",
        )
    message = "; ".join([f"{_message(DatasetStatus.model_validate(dataset))}, as prepared for this run", *notes])
    return StageResult(reason="DataReady", message=message, result={**_base(context), "dataset": dataset, "plan": plan})


def _base(context: Context) -> dict[str, Any]:
    return {"base": base_reference(context).to_wire()}


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


def _needs_answer(context: Context) -> str | None:
    """What compares sampled answers with the rows' own."""
    grpo = context.spec.tuning.grpo
    comparing = [reward.type for reward in grpo.rewards if reward.type in COMPARING] if grpo is not None else []
    return f"tuning.grpo.rewards {comparing[0]}" if comparing else None


def _check_schema(place: str, text: str) -> None:
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    try:
        schema = json.loads(text)
        validator_for(schema).check_schema(schema)
    except (ValueError, TypeError, RecursionError, SchemaError) as failure:
        raise UserError("BadJSONSchema", f"{place} is no JSON Schema: {str(failure).splitlines()[0][:300]}") from None


def _message(status: DatasetStatus) -> str:
    gone = ", ".join(f"{count} {kind}" for kind, count in sorted(status.dropped.items()))
    odd = ", ".join(f"{count} {kind}" for kind, count in sorted(status.warnings.items()))
    unused = ", ".join(f"{key} ({count} rows)" for key, count in status.unused_keys.items())
    return (
        f"{status.train} rows to train on ({status.tokens} tokens, {status.format}), {status.eval} held out"
        + (f"; left out: {gone}" if gone else "")
        + (f"; kept but worth a look: {odd} (reports/data.html)" if odd else "")
        + (f"; not used: {unused}" if unused else "")
    )
