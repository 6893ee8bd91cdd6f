"""evaluate: base and tuned model on the held-out rows, with the same prompts and greedy decoding."""

from __future__ import annotations

import json
import logging
from typing import Any

import torch

from finetune_api.contract import StageResult
from finetune_api.spec import ANSWER_METRICS, WHOLE_MODEL_METHODS, Evaluation, Metric
from finetune_api.status import EvaluationStatus

from ..data.store import read_rows
from ..data.tokens import Tokeniser
from ..evaluation import forgetting, harness, judge
from ..evaluation.measure import Measured, measure
from ..evaluation.metrics import improvement, interval, value, verdict
from ..job.context import Context, render_page, write_text
from ..models import load as models
from ..process.errors import UserError
from ..remote import chat
from ..training.objectives import OBJECTIVES

log = logging.getLogger("finetune.evaluate")
_COLUMNS = ("row", "input_ids", "labels", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "label")
_SHOWN = 20


def evaluate(context: Context) -> StageResult:
    """Run the stage."""
    spec = context.spec.evaluation
    assert spec is not None
    if spec.judge is not None:
        chat.look(spec.judge)
    cuda = torch.cuda.is_available()
    folder = models.noted(context)
    tokenizer = models.load_tokenizer(context, folder)
    rows = read_rows(context.layout.eval_rows, _COLUMNS, spec.max_examples)
    if all(row.get("label") is False for row in rows):
        raise UserError("NoEvalRows", "no held-out row has a good answer (label true) to compare on")
    prompts = _prompts(context, tokenizer, rows) if set(spec.metrics) & set(ANSWER_METRICS) else []
    desk = _Desk(context, spec, tokenizer, rows, prompts)

    torch.manual_seed(context.spec.tuning.hyperparameters.seed)
    model = _load(context, folder, cuda)
    base, base_scores = desk.run(model)
    model = _tuned(context, model, cuda)
    tuned, tuned_scores = desk.run(model)
    if spec.judge is not None:
        found = judge.compare(spec.judge, context.secret("judge"), prompts, base.answers, tuned.answers)
        base.values["judge-win-rate"], tuned.values["judge-win-rate"] = found
    status, message = _verdict(context, spec, base, tuned, base_scores, tuned_scores)
    _report(context, status, message, prompts, base, tuned)
    return StageResult(reason="Compared", message=message, result=status.to_wire())


class _Desk:
    """What both models are put through."""

    def __init__(
        self, context: Context, spec: Evaluation, tokenizer: Any, rows: list[dict[str, Any]], prompts: list[tuple[str, str]]
    ) -> None:
        self.context, self.spec, self.tokenizer, self.rows, self.prompts = context, spec, tokenizer, rows, prompts
        self.general = forgetting.general_rows(context) if spec.forgetting is not None else None

    def run(self, model: Any) -> tuple[Measured, dict[str, float]]:
        """The metrics on the held-out rows, and the scores on other texts."""
        reward = OBJECTIVES[self.context.spec.tuning.objective].reward_model
        found = measure(model, self.tokenizer, self.rows, self.prompts, self.spec, reward=reward)
        scores: dict[str, float] = {}
        if self.general is not None:
            scores[forgetting.NAME] = round(forgetting.general_loss(model, self.general, self.tokenizer.pad_token_id), 6)
        if self.spec.harness_tasks:
            seed = self.context.spec.tuning.hyperparameters.seed
            scores |= harness.run_tasks(model, self.tokenizer, self.spec.harness_tasks, self.spec.harness_limit, seed)
        log.info("%s %s", {m: value(m, v) for m, v in found.values.items()}, scores)
        return found, scores


def _prompts(context: Context, tokenizer: Any, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    tokeniser = Tokeniser(tokenizer, max_length=context.spec.tuning.hyperparameters.max_length, assistant_only=True)
    shapes = [json.loads(row["row"]) for row in rows if row.get("label") is not False]
    if any("text" in shape for shape in shapes):
        raise UserError(
            "NoAnswers", "evaluation.metrics asks for answers, but the rows are plain text; use loss, perplexity or token-accuracy"
        )
    return [tokeniser.prompt_and_answer(shape) for shape in shapes]


def _load(context: Context, folder: str, cuda: bool) -> Any:
    reward = OBJECTIVES[context.spec.tuning.objective].reward_model
    model = models.load_model(context, folder, dtype=models.compute_dtype(cuda), reward=reward, cuda=cuda)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = models.load_tokenizer(context, folder).pad_token_id
    return model.to("cuda" if cuda else "cpu").eval()


def _tuned(context: Context, base: Any, cuda: bool) -> Any:
    if context.spec.tuning.method in WHOLE_MODEL_METHODS:
        del base
        return _load(context, context.layout.output, cuda)
    from peft import PeftModel

    return PeftModel.from_pretrained(base, context.layout.output).to(base.device).eval()


def _verdict(
    context: Context, spec: Evaluation, base: Measured, tuned: Measured, base_scores: dict[str, float], tuned_scores: dict[str, float]
) -> tuple[EvaluationStatus, str]:
    metric: Metric = spec.gate.metric if spec.gate is not None else spec.metrics[0]
    before: dict[str, float] = {m: round(value(m, base.values[m]), 6) for m in spec.metrics}
    after: dict[str, float] = {m: round(value(m, tuned.values[m]), 6) for m in spec.metrics}
    gain = improvement(metric, value(metric, base.values[metric]), value(metric, tuned.values[metric]))
    confidence = spec.gate.confidence if spec.gate is not None else 0.95
    low, high = interval(metric, base.values[metric], tuned.values[metric], confidence, context.spec.tuning.hyperparameters.seed)
    rows = len(base.values[metric])
    message = f"base -> tuned on {rows} held-out rows: " + ", ".join(f"{m} {before[m]:.4g} -> {after[m]:.4g}" for m in spec.metrics)
    gate = "None"
    if spec.gate is not None:
        passed, why = verdict(gain, low, high, spec.gate.min_improvement)
        message += f"; gate on {metric}: {why}"
        gate = "Passed" if passed else "NotPassed"
    elif low <= 0 <= high:
        message += f"; {metric}: no measurable difference, the improvement is {gain:.4g} [{low:.4g}, {high:.4g}]"
    for name in base_scores:
        message += f"; {name} {base_scores[name]:.4g} -> {tuned_scores[name]:.4g}"
    if spec.forgetting is not None and spec.forgetting.max_increase is not None:
        rise = (tuned_scores[forgetting.NAME] - base_scores[forgetting.NAME]) / max(1e-9, base_scores[forgetting.NAME])
        if not rise <= spec.forgetting.max_increase:
            gate = "NotPassed"
            message += f": it rose by {rise:.1%}, evaluation.forgetting.maxIncrease is {spec.forgetting.max_increase:.1%}"
    status = EvaluationStatus(
        base={**before, **base_scores}, tuned={**after, **tuned_scores}, examples=rows, improvement=round(gain, 6),
        interval=[round(low, 6), round(high, 6)], gate=gate,  # type: ignore[arg-type]
    )  # fmt: skip
    return status, message


def _report(
    context: Context, status: EvaluationStatus, message: str, prompts: list[tuple[str, str]], base: Measured, tuned: Measured
) -> None:
    samples = [
        {"prompt": prompt, "expected": wanted, "base": old, "tuned": new}
        for (prompt, wanted), old, new in list(zip(prompts, base.answers, tuned.answers, strict=True))[:_SHOWN]
    ]
    context.write_json(context.layout.evaluation_report, {**status.to_wire(), "message": message, "samples": samples})
    page = render_page("evaluation.html.j2", job=context.job.name, status=status.to_wire(), message=message, samples=samples)
    write_text(context.layout.evaluation_page, page)
