"""Whether general ability was lost: the loss on a general text that has nothing to do with the job."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from finetune_api.spec import DatasetSource, Forgetting

from ..data.formats import FORMATS
from ..data.reading import rows
from ..data.shape import BadRow
from ..data.tokens import RowTokenizer
from ..job.context import Context
from ..job.files import write_text
from ..process.errors import UserError
from .measure import token_values

_MOST = 200
GENERAL_LOSS = "general-loss"


def write_general_rows(context: Context, tokenizer: Any, settings: Forgetting) -> None:
    """In prepare: write the tokens of the general text, so that a bad row is refused before a GPU is taken."""
    row_tokenizer = RowTokenizer(
        tokenizer, objective="pretrain", max_length=context.spec.tuning.hyperparameters.max_length, assistant_only=False
    )
    if settings.uri is None:
        text = resources.files(__package__).joinpath("general.txt").read_text()
        texts = [part.replace("\n", " ").strip() for part in text.split("\n\n") if part.strip()]
    else:
        texts = []
        for row in rows(context, DatasetSource(uri=settings.uri), "train"):
            parsed = row.parsed()
            try:
                texts.append(FORMATS["text"].normalize(parsed.value or {})["text"])
            except BadRow as failure:
                raise UserError("InvalidRows", f"evaluation.forgetting.uri row {row.number}: {failure}") from None
            if len(texts) == _MOST:
                break
        if not texts:
            raise UserError("EmptyDataset", "evaluation.forgetting.uri has no row")
    write_text(context.layout.general_rows, json.dumps([row_tokenizer({"text": text})[0] for text in texts]))


def read_general_rows(context: Context) -> list[dict[str, Any]]:
    """In evaluate: what prepare wrote."""
    found: list[dict[str, Any]] = context.read_json(context.layout.general_rows)
    return found


def general_loss(model: Any, rows: list[dict[str, Any]], pad: int) -> float:
    """Mean negative log-likelihood per token."""
    loss, _ = token_values(model, rows, pad)
    return float(loss[:, 0].sum() / max(1.0, loss[:, 1].sum()))
