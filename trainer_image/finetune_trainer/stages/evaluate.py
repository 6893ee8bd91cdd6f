"""evaluate: the tuned model and its base, as it is and as it would be used, on the held-out rows with greedy decoding.

    python -m finetune_trainer evaluate --job job.json --workspace DIR

Needs what prepare and train wrote. Does not decide what is enough: that is evaluation/gate.py, which sees numbers alone.
"""

from __future__ import annotations

import gc
import json
import logging
from pathlib import Path
from typing import Any

import torch

from finetune_api import probing
from finetune_api.contract import StageResult
from finetune_api.spec import WHOLE_MODEL_METHODS, Output

from ..data.store import read_rows
from ..evaluation import forgetting, gate, harness, judge, probes
from ..evaluation.arms import asked_rows, read_baseline
from ..evaluation.champion import Challenge
from ..evaluation.measure import Asked, Measured, good_rows, measure
from ..evaluation.metrics import value
from ..job.context import Context
from ..job.files import write_text
from ..job.pages import render_page
from ..models.architecture import positions
from ..models.fetch import base_reference, local_path
from ..models.load import compute_dtype, load_model
from ..models.stopping import load_served_tokenizer, stop_model
from ..remote.chat import check_reachable
from ..training.objectives import OBJECTIVES

log = logging.getLogger("finetune.evaluate")
_COLUMNS = ("row", "group_id", "input_ids", "labels", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "label")
_SHOWN = 20
Rows = list[dict[str, Any]]


def evaluate(context: Context) -> StageResult:
    """Run the stage."""
    spec, seed = context.spec.evaluation, context.spec.tuning.hyperparameters.seed
    assert spec is not None

    # 1. What is asked, in each arm
    if spec.judge is not None:
        check_reachable(spec.judge)
    folder, whole = local_path(context), context.spec.tuning.method in WHOLE_MODEL_METHODS
    tokenizer = load_served_tokenizer(context, folder)
    rows = read_rows(context.layout.eval_rows, _COLUMNS, spec.max_examples)
    baseline = read_baseline(context)
    answers = context.spec.tuning.objective != "reward" and not any("text" in json.loads(row["row"]) for row in rows)
    *before, after = asked_rows(context, tokenizer, rows, baseline, answers=answers)

    # 2. The base in all its arms, the champion, then what was made of the base; one after the other, in the memory of one
    cuda = torch.cuda.is_available()
    torch.manual_seed(seed)
    challenge = Challenge(context, after)
    if challenge.whole is not None:
        champion = challenge.whole
        challenge.ask(lambda asked: _measure(context, _load(context, champion, tokenizer, cuda), tokenizer, asked))
        gc.collect()
    model = _load(context, folder, tokenizer, cuda)
    arms = [_measure(context, model, tokenizer, asked) for asked in before]
    arms[0].scores = _scores(context, model, tokenizer)
    if challenge.adapter is not None and not _ask_adapter(context, challenge, model, tokenizer) and not whole:
        del model  # something of the champion may be left on it
        gc.collect()
        model = _load(context, folder, tokenizer, cuda)
    if whole:
        del model  # memory for two of them was not asked for
        gc.collect()
        model = _load(context, context.layout.output, tokenizer, cuda)
    else:
        model = _with_adapter(model, context.layout.output)
    tuned = _measure(context, model, tokenizer, after)
    tuned.scores = _scores(context, model, tokenizer)
    if spec.judge is not None:
        for arm in arms:
            _judge(context, after, arm, tuned)
    challenged = challenge.against(tuned, lambda asked, arm, same: _judge(context, asked, arm, same))

    # 3. What tells the two apart, wherever they are served
    Path(context.layout.probes).unlink(missing_ok=True)
    if _wants_probes(context):
        chosen = probes.candidates(tokenizer, positions(model), after, arms[0], tuned)
        by_tuned = probes.ask(model, chosen)
        if whole:
            del model
            gc.collect()
            by_base = probes.ask(_load(context, folder, tokenizer, cuda), chosen)
        else:
            with model.disable_adapter():
                by_base = probes.ask(model.get_base_model(), chosen)
        made = probes.make_probes(chosen, by_tuned, by_base, base_reference(context).fingerprint)
        log.info("%d probes: %s", len(made.probes), probing.judge(made.probes, [[a.tuned for a in p.answers] for p in made.probes]).message)
        context.write_json(context.layout.probes, made.to_wire())
    arms.append(tuned)

    # 4. Whether that is enough
    groups = [row["group_id"] for row in good_rows(rows)] if "group_id" in rows[0] else None
    verdict = gate.decide(spec, seed, arms, groups, challenged)
    told = verdict.status.model_dump(by_alias=True, exclude_none=True)  # numbers: text they are in the Kubernetes API alone
    message = "; ".join([verdict.message, *baseline.notes])
    report = {**told, "reason": verdict.reason, "message": message, "systemPrompt": baseline.system}
    _report(context, report, after, arms, challenge.answers())
    return StageResult(reason=verdict.reason, message=message, result=told)


def _wants_probes(context: Context) -> bool:
    """Whether the result is to be recognised later: as a version of a model, or in another form."""
    spec = context.spec
    return spec.tuning.objective != "reward" and (spec.output != Output() or any(target.model is not None for target in spec.publish))


def _with_adapter(model: Any, folder: str) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).to(model.device).eval()


def _ask_adapter(context: Context, challenge: Challenge, model: Any, tokenizer: Any) -> bool:
    """Ask the champion's adapter on the base. Whether the base is as it was afterwards."""
    folder, clean = str(challenge.adapter), False

    def ask(asked: Asked) -> Measured:
        nonlocal clean
        wrapped = _with_adapter(model, folder)
        try:
            return _measure(context, wrapped, tokenizer, asked)
        finally:
            if hasattr(wrapped.base_model, "unload"):  # virtual tokens leave the base as it is
                wrapped.base_model.unload()
            clean = True

    challenge.ask(ask)
    return clean


def _judge(context: Context, asked: Asked, arm: Measured, tuned: Measured) -> None:
    spec = context.spec.evaluation
    assert spec is not None and spec.judge is not None
    found = judge.compare(spec.judge, context.secret("judge"), asked.prompts, arm.answers, tuned.answers)
    arm.values["judge-win-rate"], tuned.against[arm.name] = found[0], {"judge-win-rate": found[1]}


def _load(context: Context, folder: str, tokenizer: Any, cuda: bool) -> Any:
    reward = OBJECTIVES[context.spec.tuning.objective].reward_model
    model = load_model(context, folder, dtype=compute_dtype(cuda), reward=reward, cuda=cuda)
    stop_model(context, model, tokenizer, local_path(context))
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False  # for a loss that is not asked for, over all tokens at once
    return model.to("cuda" if cuda else "cpu").eval()


def _measure(context: Context, model: Any, tokenizer: Any, asked: Asked) -> Measured:
    """The metrics of one arm on the held-out rows."""
    spec = context.spec.evaluation
    assert spec is not None
    reward = OBJECTIVES[context.spec.tuning.objective].reward_model
    found = measure(model, tokenizer, asked, spec, reward=reward)
    log.info("%s %s", asked.name, {m: value(m, v) for m, v in found.values.items()})
    return found


def _scores(context: Context, model: Any, tokenizer: Any) -> dict[str, float]:
    """The scores of a model on other texts."""
    spec = context.spec.evaluation
    assert spec is not None
    scores: dict[str, float] = {}
    if spec.forgetting is not None:
        general = forgetting.read_general_rows(context)
        scores[forgetting.GENERAL_LOSS] = round(forgetting.general_loss(model, general, tokenizer.pad_token_id), 6)
    if spec.harness_tasks:
        seed = context.spec.tuning.hyperparameters.seed
        scores |= harness.run_tasks(model, tokenizer, spec.harness_tasks, spec.harness_limit, seed)
    return scores


def _report(context: Context, told: dict[str, Any], asked: Asked, arms: list[Measured], champion: dict[int, str]) -> None:
    """`champion`: its answers, by the place of their prompt."""
    names, given = [arm.name for arm in arms], [arm.answers for arm in arms]
    samples = [
        {
            "prompt": prompt,
            "expected": wanted,
            "answers": dict(zip(names, answers, strict=True)) | ({"Champion": champion[place]} if place in champion else {}),
        }
        for place, ((prompt, wanted), *answers) in enumerate(list(zip(asked.prompts, *given, strict=False))[:_SHOWN])
    ]
    context.write_json(context.layout.evaluation_report, {**told, "samples": samples})
    metrics = list(dict.fromkeys(metric for arm in told["arms"] for metric in arm["metrics"]))
    page = render_page("evaluation.html.j2", job=context.job.name, status=told, metrics=metrics, message=told["message"], samples=samples)
    write_text(context.layout.evaluation_page, page)
