"""One model measured on the held-out rows: token statistics, answers, preferences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from finetune_api.spec import Evaluation, Metric

from ..data.tokens import IGNORED
from ..generate import generate
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
        loss, correct = token_values(model, rows, tokenizer.pad_token_id)
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


@torch.inference_mode()
def _preferences(model: Any, rows: list[Row], pad: int, *, reward: bool) -> Values:
    """1 where the chosen answer is preferred: scored higher, or likelier per token."""
    scores = []
    for side in ("chosen_ids", "rejected_ids"):
        if reward:
            sequences = [(row[side], row[side]) for row in rows]
            points = np.zeros(len(rows))
            for part, ids, _, mask in _batches(sequences, pad, model.device):
                points[part] = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().cpu().numpy()
        else:
            joined = [
                {"input_ids": row["prompt_ids"] + row[side], "labels": [IGNORED] * len(row["prompt_ids"]) + row[side]} for row in rows
            ]
            loss, _ = token_values(model, joined, pad)
            points = -loss[:, 0] / np.maximum(1, loss[:, 1])
        scores.append(points)
    return np.stack([(scores[0] > scores[1]).astype(float), np.ones(len(rows))], axis=1)
