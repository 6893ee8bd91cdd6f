"""evaluate: base and tuned model on the held-out rows, with the same prompts and greedy decoding.

    python -m finetune_trainer evaluate --job job.json --workspace DIR

Needs what prepare and train wrote. Does not decide what is enough: that is evaluation/gate.py, which sees numbers alone.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import torch

from finetune_api.contract import StageResult
from finetune_api.spec import ANSWER_METRICS, WHOLE_MODEL_METHODS

from ..data.store import read_rows
from ..data.tokens import RowTokenizer
from ..evaluation import forgetting, gate, harness, judge
from ..evaluation.measure import Measured, measure
from ..evaluation.metrics import value
from ..job.context import Context
from ..job.files import write_text
from ..job.pages import render_page
from ..models.fetch import local_path
from ..models.load import compute_dtype, load_model
from ..models.stopping import load_served_tokenizer, stop_model
from ..process.errors import UserError
from ..remote.chat import check_reachable
from ..training.objectives import OBJECTIVES

log = logging.getLogger("finetune.evaluate")
_COLUMNS = ("row", "input_ids", "labels", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "label")
_SHOWN = 20
Rows = list[dict[str, Any]]
Prompts = list[tuple[str, str]]
"""(prompt, wanted answer) of each row."""


def evaluate(context: Context) -> StageResult:
    """Run the stage."""
    spec, seed = context.spec.evaluation, context.spec.tuning.hyperparameters.seed
    assert spec is not None

    # 1. What both models are asked
    if spec.judge is not None:
        check_reachable(spec.judge)
    folder = local_path(context)
    tokenizer = load_served_tokenizer(context, folder)
    rows = read_rows(context.layout.eval_rows, _COLUMNS, spec.max_examples)
    if all(row.get("label") is False for row in rows):
        raise UserError("NoEvalRows", "no held-out row has a good answer (label true) to compare on")
    prompts = _prompts(context, tokenizer, rows) if set(spec.metrics) & set(ANSWER_METRICS) else []

    # 2. The base, then what was made of it
    cuda = torch.cuda.is_available()
    torch.manual_seed(seed)
    model = _load(context, folder, cuda)
    base, base_scores = _measure(context, model, tokenizer, rows, prompts)
    model = _tuned(context, model, cuda)
    tuned, tuned_scores = _measure(context, model, tokenizer, rows, prompts)
    if spec.judge is not None:
        found = judge.compare(spec.judge, context.secret("judge"), prompts, base.answers, tuned.answers)
        base.values["judge-win-rate"], tuned.values["judge-win-rate"] = found

    # 3. Whether that is enough
    status, message = gate.decide(spec, seed, base, tuned, base_scores, tuned_scores)
    told = status.model_dump(by_alias=True, exclude_none=True)  # numbers: text they are in the Kubernetes API alone
    _report(context, told, message, prompts, base, tuned)
    return StageResult(reason="Compared", message=message, result=told)


def _prompts(context: Context, tokenizer: Any, rows: Rows) -> Prompts:
    row_tokenizer = RowTokenizer(tokenizer, max_length=context.spec.tuning.hyperparameters.max_length, assistant_only=True)
    shapes = [json.loads(row["row"]) for row in rows if row.get("label") is not False]
    if any("text" in shape for shape in shapes):
        raise UserError(
            "NoAnswers", "evaluation.metrics asks for answers, but the rows are plain text; use loss, perplexity or token-accuracy"
        )
    return [row_tokenizer.prompt_and_answer(shape) for shape in shapes]


def _load(context: Context, folder: str, cuda: bool) -> Any:
    reward = OBJECTIVES[context.spec.tuning.objective].reward_model
    model = load_model(context, folder, dtype=compute_dtype(cuda), reward=reward, cuda=cuda)
    tokenizer = load_served_tokenizer(context, local_path(context))
    stop_model(context, model, tokenizer, local_path(context))
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.to("cuda" if cuda else "cpu").eval()


def _tuned(context: Context, base: Any, cuda: bool) -> Any:
    if context.spec.tuning.method in WHOLE_MODEL_METHODS:
        del base
        return _load(context, context.layout.output, cuda)
    from peft import PeftModel

    return PeftModel.from_pretrained(base, context.layout.output).to(base.device).eval()


def _measure(context: Context, model: Any, tokenizer: Any, rows: Rows, prompts: Prompts) -> tuple[Measured, dict[str, float]]:
    """The metrics on the held-out rows, and the scores on other texts."""
    spec = context.spec.evaluation
    assert spec is not None
    general = forgetting.read_general_rows(context) if spec.forgetting is not None else None
    reward = OBJECTIVES[context.spec.tuning.objective].reward_model
    found = measure(model, tokenizer, rows, prompts, spec, reward=reward)
    scores: dict[str, float] = {}
    if general is not None:
        scores[forgetting.GENERAL_LOSS] = round(forgetting.general_loss(model, general, tokenizer.pad_token_id), 6)
    if spec.harness_tasks:
        seed = context.spec.tuning.hyperparameters.seed
        scores |= harness.run_tasks(model, tokenizer, spec.harness_tasks, spec.harness_limit, seed)
    log.info("%s %s", {m: value(m, v) for m, v in found.values.items()}, scores)
    return found, scores


def _report(context: Context, told: dict[str, Any], message: str, prompts: Prompts, base: Measured, tuned: Measured) -> None:
    samples = [
        {"prompt": prompt, "expected": wanted, "base": old, "tuned": new}
        for (prompt, wanted), old, new in list(zip(prompts, base.answers, tuned.answers, strict=True))[:_SHOWN]
    ]
    context.write_json(context.layout.evaluation_report, {**told, "message": message, "samples": samples})
    page = render_page("evaluation.html.j2", job=context.job.name, status=told, message=message, samples=samples)
    write_text(context.layout.evaluation_page, page)
