"""evaluate: base and tuned model on the held-out rows, with the same prompts and greedy decoding."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch

from finetune_api.contract import StageResult
from finetune_api.spec import Evaluation, Metric
from finetune_api.status import EvaluationStatus

from . import models
from .context import Context
from .data.tokens import IGNORED, Tokeniser
from .errors import UserError

log = logging.getLogger("finetune.evaluate")
_BATCH = 8


def evaluate(context: Context) -> StageResult:
    """Run the stage."""
    spec = context.spec.evaluation
    assert spec is not None
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    folder = models.resolve(context)
    tokenizer = models.load_tokenizer(context, folder)
    rows = [json.loads(line) for line in Path(context.layout.eval_rows).read_text().splitlines()][: spec.max_examples]
    tokeniser = Tokeniser(
        tokenizer, max_length=context.spec.tuning.hyperparameters.max_length, assistant_only=context.spec.tuning.assistant_only_loss
    )
    if "exact-match" in spec.metrics and rows and "text" in rows[0]:
        raise UserError("NoAnswers", "evaluation.metrics exact-match needs answers, but the rows are plain text; use loss")

    model = models.load_model(context, folder, dtype=models.compute_dtype(cuda)).to(device).eval()
    base, before = _measure(model, tokeniser, rows, spec, device)
    log.info("base: %s", base)
    model = _tuned(context, model, cuda).to(device).eval()
    tuned, after = _measure(model, tokeniser, rows, spec, device)
    log.info("tuned: %s", tuned)

    metric: Metric = spec.gate.metric if spec.gate is not None else spec.metrics[0]
    gain = improvement(metric, base[metric], tuned[metric])
    verdict = "None" if spec.gate is None else "Passed" if gain >= spec.gate.min_improvement else "NotPassed"
    status = EvaluationStatus(base=base, tuned=tuned, examples=len(rows), improvement=round(gain, 6), gate=verdict)  # type: ignore[arg-type]
    samples = [{"prompt": p, "expected": e, "base": b, "tuned": t} for (p, e, b), (_, _, t) in zip(before, after, strict=True)]
    context.write_json(context.layout.evaluation_report, {**status.to_wire(), "samples": samples[:20]})
    shown = ", ".join(f"{name} {base[name]:.4g} -> {tuned[name]:.4g}" for name in spec.metrics)
    gate = "" if spec.gate is None else f"; gate {metric} improvement {gain:.4g}, at least {spec.gate.min_improvement:g} wanted: {verdict}"
    return StageResult(reason="Compared", message=f"base -> tuned on {len(rows)} held-out rows: {shown}{gate}", result=status.to_wire())


def improvement(metric: Metric, base: float, tuned: float) -> float:
    """How much better the tuned model is: relative for loss (lower is better), absolute for exact-match.

    A tuned model whose metric is no number is infinitely worse.
    """
    if not math.isfinite(tuned):
        return -1e9
    if metric == "loss":
        return (base - tuned) / base if math.isfinite(base) and base > 0 else 0.0
    return tuned - base


def _tuned(context: Context, base: Any, cuda: bool) -> Any:
    if context.spec.tuning.method == "full":
        del base
        return models.load_model(context, context.layout.output, dtype=models.compute_dtype(cuda))
    from peft import PeftModel

    return PeftModel.from_pretrained(base, context.layout.output)


def _measure(
    model: Any, tokeniser: Tokeniser, rows: list[dict[str, Any]], spec: Evaluation, device: torch.device
) -> tuple[dict[str, float], list[tuple[str, str, str]]]:
    values: dict[str, float] = {}
    answers: list[tuple[str, str, str]] = []
    if "loss" in spec.metrics:
        values["loss"] = round(_loss(model, tokeniser, rows, device), 6)
    if "exact-match" in spec.metrics:
        answers = _answers(model, tokeniser, rows, spec.max_new_tokens, device)
        values["exact-match"] = round(sum(expected.strip() == given.strip() for _, expected, given in answers) / len(answers), 6)
    return values, answers


@torch.inference_mode()
def _loss(model: Any, tokeniser: Tokeniser, rows: list[dict[str, Any]], device: torch.device) -> float:
    """Mean negative log-likelihood per answer token, over all rows (not a mean of means)."""
    total, count = 0.0, 0
    pad = tokeniser.tokenizer.pad_token_id
    for start in range(0, len(rows), _BATCH):
        batch = [tokeniser(row) for row in rows[start : start + _BATCH]]
        width = max(len(t["input_ids"]) for t in batch)
        ids = torch.tensor([t["input_ids"] + [pad] * (width - len(t["input_ids"])) for t in batch], device=device)
        labels = torch.tensor([t["labels"] + [IGNORED] * (width - len(t["labels"])) for t in batch], device=device)
        mask = torch.tensor([[1] * len(t["input_ids"]) + [0] * (width - len(t["input_ids"])) for t in batch], device=device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="sum"))
        count += int((labels[:, 1:] != IGNORED).sum())
    return total / max(1, count)


@torch.inference_mode()
def _answers(model: Any, tokeniser: Tokeniser, rows: list[dict[str, Any]], limit: int, device: torch.device) -> list[tuple[str, str, str]]:
    """(prompt, expected, given) of each row, by greedy decoding."""
    tokenizer = tokeniser.tokenizer
    found = []
    tokenizer.padding_side = "left"
    try:
        for start in range(0, len(rows), _BATCH):
            pairs = [tokeniser.prompt_text(row) for row in rows[start : start + _BATCH]]
            encoded = tokenizer([prompt for prompt, _ in pairs], add_special_tokens=False, return_tensors="pt", padding=True).to(device)
            encoded.pop("token_type_ids", None)
            output = model.generate(**encoded, max_new_tokens=limit, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            given = tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
            found += [(prompt, expected, text) for (prompt, expected), text in zip(pairs, given, strict=True)]
    finally:
        tokenizer.padding_side = "right"
    return found
