"""What prepare found, for people: reports/data.html, and the same as JSON."""

from __future__ import annotations

import functools
import json
from collections import Counter
from typing import Any

from ..job.context import Context
from ..job.files import write_text
from ..job.pages import render_page
from .shape import strings
from .store import Store
from .tokens import IGNORED

_SAMPLES, _LANGUAGE_SAMPLES, _SHOWN_TOKENS = 8, 400, 400


@functools.cache
def _identifier() -> Any:
    """Unpacking its model takes most of a small prepare's time."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def languages(store: Store) -> dict[str, int]:
    """Languages of a sample of the training rows, the commonest first; a label is ISO 639-1."""
    identifier = _identifier()
    seen: Counter[str] = Counter()
    for (row,) in store.sample(_LANGUAGE_SAMPLES, "row"):
        text = " ".join(strings(json.loads(row)))[:1000]
        language, sure = identifier.classify(text)
        seen[language if sure > 0.9 and len(text) > 40 else "unsure"] += 1
    return dict(seen.most_common(10))


def samples(store: Store, tokenizer: Any) -> list[list[tuple[str, bool]]]:
    """Some rows as (text, whether it is learned) pieces: the loss mask drawn."""
    drawn = []
    for ids, labels in store.sample(_SAMPLES, "input_ids, labels"):
        pieces: list[tuple[list[int], bool]] = []
        for token, label in list(zip(ids, labels, strict=True))[:_SHOWN_TOKENS]:
            if not pieces or pieces[-1][1] != (label != IGNORED):
                pieces.append(([], label != IGNORED))
            pieces[-1][0].append(token)
        drawn.append([(tokenizer.decode(tokens, clean_up_tokenization_spaces=False), learned) for tokens, learned in pieces])
    return drawn


def write_report(context: Context, report: dict[str, Any], drawn: list[list[tuple[str, bool]]]) -> None:
    """Write both files."""
    context.write_json(context.layout.data_report, {**report, "samples": drawn})
    write_text(context.layout.data_page, render_page("data.html.j2", job=context.job.name, report=report, samples=drawn))
