"""One model measured on the held-out rows, asked in one way: token statistics, answers, preferences, and what a request costs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch

from finetune_api.evaluation_status import ArmName
from finetune_api.spec import Evaluation, Metric

from ..data.chat_template import ChatTemplate
from ..data.tokens import IGNORED
from ..models.generate import batches, encode, generate, latency
from ..models.likelihood import learned_values
from ..models.shared_prefix import share
from .answers import final_answer
from .metrics import METRICS, Values

_TIMED, _TIMED_TOKENS = 3, 16
"""Requests and tokens of each that the latency is measured on"""
Row = dict[str, Any]


@dataclass
class Asked:
    """The held-out rows as one arm is asked them."""

    name: ArmName
    rows: list[Row]
    """Tokens of each row: what is asked, what is learned, what is preferred."""
    prompts: list[tuple[str, str]] = field(default_factory=list)
    """(prompt, wanted answer) of each row that has an answer worth giving; empty where rows have none."""
    shots: int = 0
    """Examples before each question."""


@dataclass
class Measured:
    """What one arm did."""

    name: ArmName
    values: dict[Metric, Values] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    shots: int = 0
    prompt_tokens: float | None = None
    answer_tokens: float | None = None
    latency: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    """Of the model, on other texts than the rows."""
    against: dict[ArmName, dict[Metric, Values]] = field(default_factory=dict)
    """Of the tuned model: metrics that are a comparison with one of the other arms."""
    likelihoods: np.ndarray[Any, Any] | None = None
    """Of unpaired preferences: of each row's answer, those labelled bad, too; its preference is one over all of them."""


def measure(model: Any, tokenizer: Any, asked: Asked, spec: Evaluation, *, reward: bool) -> Measured:
    """All metrics but the judge's."""
    found = Measured(asked.name, shots=asked.shots)
    kinds = {METRICS[metric].needs for metric in spec.metrics}
    if "tokens" in kinds:
        loss, correct = token_values(model, good_rows(asked.rows), tokenizer.pad_token_id)
        found.values |= {"loss": loss, "perplexity": loss, "token-accuracy": correct}
    if "pairs" in kinds:
        if asked.rows[0].get("label") is not None:
            heads, answers = ([row[column] for row in asked.rows] for column in ("prompt_ids", "completion_ids"))
            found.likelihoods = _likelihoods(model, heads, answers, tokenizer.pad_token_id)
            found.values["preference-accuracy"] = _unpaired(found.likelihoods, asked.rows)
        else:
            found.values["preference-accuracy"] = _preferences(model, asked.rows, tokenizer.pad_token_id, reward=reward)
    if kinds & {"answers", "judge"}:
        lead = ChatTemplate(tokenizer).answer_lead
        found.answers = generate(model, tokenizer, [prompt for prompt, _ in asked.prompts], spec.max_new_tokens, lead)
        for metric in spec.metrics:
            score = METRICS[metric].score
            if score is not None:
                rate = score(spec)
                points = [
                    rate(final_answer(answer), final_answer(wanted))
                    for answer, (_, wanted) in zip(found.answers, asked.prompts, strict=True)
                ]
                found.values[metric] = np.array([[point, 1.0] for point in points])
    found.values = {metric: values for metric, values in found.values.items() if metric in spec.metrics}
    if asked.prompts and not reward:
        _cost(model, tokenizer, asked, spec, found)
    return found


def _cost(model: Any, tokenizer: Any, asked: Asked, spec: Evaluation, found: Measured) -> None:
    """What a request costs: the tokens that it sends and gets back, and the time that it takes."""
    sent = encode(tokenizer, [prompt for prompt, _ in asked.prompts])
    given = found.answers or [wanted for _, wanted in asked.prompts]
    found.prompt_tokens = usual = fmean(map(len, sent))
    found.answer_tokens = fmean(map(len, encode(tokenizer, given)))
    typical = sorted(sent, key=lambda ids: abs(len(ids) - usual))[:_TIMED]
    found.latency = latency(model, tokenizer.pad_token_id, typical, found.answer_tokens, min(_TIMED_TOKENS, spec.max_new_tokens))


def good_rows(rows: list[Row]) -> list[Row]:
    """Rows with an answer worth learning: not those labelled bad."""
    return [row for row in rows if row.get("label") is not False]


def part_asked(name: ArmName, asked: Asked, places: Collection[int]) -> Asked:
    """Some of the rows, as another arm."""
    prompts = [asked.prompts[at] for at in _good_places(asked.rows, places)] if asked.prompts else []
    return Asked(name, [asked.rows[place] for place in sorted(places)], prompts, asked.shots)


def part_measured(found: Measured, rows: list[Row], places: Collection[int]) -> Measured:
    """What was measured on some of the rows, as if they had been asked alone. `rows`: all that were asked."""
    good = _good_places(rows, places)
    values = {metric: numbers[good] for metric, numbers in found.values.items()}
    if found.likelihoods is not None:
        values["preference-accuracy"] = _unpaired(found.likelihoods[sorted(places)], [rows[place] for place in sorted(places)])
    return replace(found, values=values, answers=[found.answers[at] for at in good] if found.answers else [], against={})


def _good_places(rows: list[Row], places: Collection[int]) -> list[int]:
    """Where these rows stand among those with an answer worth learning."""
    good = [place for place, row in enumerate(rows) if row.get("label") is not False]
    return [at for at, place in enumerate(good) if place in set(places)]


def _padded(rows: list[list[int]], filler: int, device: Any) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=device)


@torch.inference_mode()
def token_values(model: Any, rows: list[Row], pad: int) -> tuple[Values, Values]:
    """(negative log-likelihood, correct predictions) of each row's learned tokens, each with their count.

    What all rows begin with and do not learn is computed once.
    """
    loss, correct = np.zeros((len(rows), 2)), np.zeros((len(rows), 2))
    unlearned = [row["input_ids"][: max(1, _first_learned(row["labels"]))] for row in rows]
    prefix = share(model, unlearned)
    shared = len(prefix) if prefix is not None else 0
    for part in batches([len(row["input_ids"]) for row in rows]):
        ids = [rows[i]["input_ids"][shared:] for i in part]
        labels = _padded([[*rows[i]["labels"][shared + 1 :], IGNORED] for i in part], IGNORED, model.device)
        mask = _padded([[1] * (shared + len(row)) for row in ids], 0, model.device)
        more: dict[str, Any] = {}
        if prefix is not None:
            width = max(map(len, ids))
            places = torch.arange(shared, shared + width, device=model.device).expand(len(part), -1)
            more = {"past_key_values": prefix.lent(), "use_cache": True, "position_ids": places}
        learned = labels != IGNORED
        nll, right = learned_values(model, labels, learned, input_ids=_padded(ids, pad, model.device), attention_mask=mask, **more)
        counts = learned.sum(dim=1).tolist()
        for index, row_nll, row_right in zip(part, nll.split(counts), right.split(counts), strict=True):
            count = float(len(row_nll))
            loss[index] = float(row_nll.double().sum()), count
            correct[index] = float(row_right.sum()), count
    return loss, correct


def _first_learned(labels: list[int]) -> int:
    return next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))


def _preferences(model: Any, rows: list[Row], pad: int, *, reward: bool) -> Values:
    """1 for each row whose chosen answer is preferred: scored higher by a reward model, else likelier per token."""
    scores = []
    for side in ("chosen_ids", "rejected_ids"):
        answers = [row[side] for row in rows]
        scores.append(_scores(model, answers, pad) if reward else _likelihoods(model, [row["prompt_ids"] for row in rows], answers, pad))
    return np.stack([(scores[0] > scores[1]).astype(float), np.ones(len(rows))], axis=1)


def _unpaired(likelihoods: np.ndarray[Any, Any], rows: list[Row]) -> Values:
    """For each good answer, the share of bad answers that are less likely; no number where there are none."""
    good = np.array([bool(row["label"]) for row in rows])
    return np.array([[float((likelihoods[~good] < point).mean()) if not good.all() else np.nan, 1.0] for point in likelihoods[good]])


@torch.inference_mode()
def _scores(model: Any, sequences: list[list[int]], pad: int) -> np.ndarray[Any, Any]:
    points = np.zeros(len(sequences))
    for part in batches([len(s) for s in sequences]):
        ids = _padded([sequences[i] for i in part], pad, model.device)
        mask = _padded([[1] * len(sequences[i]) for i in part], 0, model.device)
        points[part] = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().cpu().numpy()
    return points


def _likelihoods(model: Any, heads: list[list[int]], answers: list[list[int]], pad: int) -> np.ndarray[Any, Any]:
    """Mean log-likelihood per token of each answer after its prompt."""
    joined = [{"input_ids": head + answer, "labels": [IGNORED] * len(head) + answer} for head, answer in zip(heads, answers, strict=True)]
    loss, _ = token_values(model, joined, pad)
    return np.asarray(-loss[:, 0] / np.maximum(1, loss[:, 1]))
