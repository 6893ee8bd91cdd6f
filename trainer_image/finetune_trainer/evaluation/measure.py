"""One model measured on the held-out rows: token statistics, answers, preferences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from finetune_api.spec import Evaluation, Metric

from ..data.tokens import IGNORED
from ..models.generate import generate
from ..process.errors import UserError
from .metrics import METRICS, Values

_BATCH = 8
Row = dict[str, Any]


@dataclass
class Measured:
    """What one model did."""

    values: dict[Metric, Values] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)


def measure(model: Any, tokenizer: Any, rows: list[Row], prompts: list[tuple[str, str]], spec: Evaluation, *, reward: bool) -> Measured:
    """All metrics but the judge's. `prompts`: (prompt, wanted answer) of each row, empty when nothing is generated."""
    found = Measured()
    kinds = {METRICS[metric].needs for metric in spec.metrics}
    if "tokens" in kinds:
        loss, correct = token_values(model, _good(rows), tokenizer.pad_token_id)
        found.values |= {"loss": loss, "perplexity": loss, "token-accuracy": correct}
    if "pairs" in kinds:
        found.values["preference-accuracy"] = _preferences(model, rows, tokenizer.pad_token_id, reward=reward)
    if kinds & {"answers", "judge"}:
        found.answers = generate(model, tokenizer, [prompt for prompt, _ in prompts], spec.max_new_tokens)
        for metric in spec.metrics:
            score = METRICS[metric].score
            if score is not None:
                rate = score(spec)
                points = [rate(answer, wanted) for answer, (_, wanted) in zip(found.answers, prompts, strict=True)]
                found.values[metric] = np.array([[point, 1.0] for point in points])
    found.values = {metric: values for metric, values in found.values.items() if metric in spec.metrics}
    return found


def _good(rows: list[Row]) -> list[Row]:
    """Rows with an answer worth learning: not those labelled bad."""
    return [row for row in rows if row.get("label") is not False]


def _batches(rows: list[tuple[list[int], list[int]]], pad: int, device: Any) -> Any:
    """(ids, labels, mask) of rows of like length, with their places."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for start in range(0, len(order), _BATCH):
        part = order[start : start + _BATCH]
        width = max(len(rows[i][0]) for i in part)

        def padded(index: int, filler: int, part: list[int] = part, width: int = width) -> torch.Tensor:
            return torch.tensor([rows[i][index] + [filler] * (width - len(rows[i][index])) for i in part], device=device)

        ids, labels = padded(0, pad), padded(1, IGNORED)
        mask = torch.tensor([[1] * len(rows[i][0]) + [0] * (width - len(rows[i][0])) for i in part], device=device)
        yield part, ids, labels, mask


@torch.inference_mode()
def token_values(model: Any, rows: list[Row], pad: int) -> tuple[Values, Values]:
    """(negative log-likelihood, correct predictions) of each row's learned tokens, each with their count."""
    loss, correct = np.zeros((len(rows), 2)), np.zeros((len(rows), 2))
    pairs = [(row["input_ids"], row["labels"]) for row in rows]
    for part, ids, labels, mask in _batches(pairs, pad, model.device):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :][:, :-1].float()  # virtual tokens stand in front
        targets = labels[:, 1:]
        learned = targets != IGNORED
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        right = (logits.argmax(-1) == targets) & learned
        for place, index in enumerate(part):
            count = float(learned[place].sum())
            loss[index] = float(nll[place].double().sum()), count
            correct[index] = float(right[place].sum()), count
    return loss, correct


def _preferences(model: Any, rows: list[Row], pad: int, *, reward: bool) -> Values:
    """1 for each row whose chosen answer is preferred: scored higher by a reward model, else likelier per token.

    Of unpaired rows: for each good answer, the share of bad answers that are less likely.
    """
    if rows[0].get("label") is not None:
        found = _likelihoods(model, [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows], pad)
        good = np.array([bool(row["label"]) for row in rows])
        if good.all() or not good.any():
            raise UserError(
                "OneSided", "preference-accuracy needs held-out rows with label true and with label false; raise dataset.eval.splitFraction"
            )
        return np.array([[float((found[~good] < point).mean()), 1.0] for point in found[good]])
    scores = []
    for side in ("chosen_ids", "rejected_ids"):
        answers = [row[side] for row in rows]
        scores.append(_scores(model, answers, pad) if reward else _likelihoods(model, [row["prompt_ids"] for row in rows], answers, pad))
    return np.stack([(scores[0] > scores[1]).astype(float), np.ones(len(rows))], axis=1)


@torch.inference_mode()
def _scores(model: Any, sequences: list[list[int]], pad: int) -> np.ndarray[Any, Any]:
    points = np.zeros(len(sequences))
    for part, ids, _, mask in _batches([(s, s) for s in sequences], pad, model.device):
        points[part] = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().cpu().numpy()
    return points


def _likelihoods(model: Any, heads: list[list[int]], answers: list[list[int]], pad: int) -> np.ndarray[Any, Any]:
    """Mean log-likelihood per token of each answer after its prompt."""
    joined = [{"input_ids": head + answer, "labels": [IGNORED] * len(head) + answer} for head, answer in zip(heads, answers, strict=True)]
    loss, _ = token_values(model, joined, pad)
    return np.asarray(-loss[:, 0] / np.maximum(1, loss[:, 1]))
