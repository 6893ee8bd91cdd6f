"""prepare: fetch the model, check and tokenise the data, fix the plan. CPU only; the last chance to refuse bad input."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from finetune_api.contract import StageResult
from finetune_api.status import DatasetStatus
from finetune_api.uris import parse_uri

from . import models
from .context import Context, write_text
from .data.formats import BadRow, detect, normalise, strings
from .data.reading import Row, rows
from .data.tokens import Tokeniser
from .errors import UserError
from .plan import make_plan

log = logging.getLogger("finetune.prepare")
_SHOWN = 5
_SAMPLE = 50


@dataclass
class Problems:
    """What was found wrong, with the first places of each kind."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, source: str, number: int, detail: str, excerpt: str = "") -> None:
        """Note one row."""
        self.counts[kind] += 1
        shown = self.places.setdefault(kind, [])
        if len(shown) < _SHOWN:
            shown.append(f"{source} {number}: {detail}" + (f" [{excerpt}]" if excerpt else ""))

    def describe(self, kind: str) -> str:
        """Count and first places, for a message."""
        more = self.counts[kind] - len(self.places[kind])
        return f"{self.counts[kind]} row(s): " + "; ".join(self.places[kind]) + (f"; and {more} more" if more > 0 else "")


@dataclass
class Example:
    """A usable row."""

    number: int
    row: dict[str, Any]
    digest: str
    tokens: dict[str, list[int]]


def _digest(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def prepare(context: Context) -> StageResult:
    """Run the stage."""
    spec = context.spec
    folder = models.resolve(context, download=True)
    context.write_json(context.layout.model_reference, {"path": folder, "uri": spec.model.uri, "fingerprint": models.fingerprint(folder)})
    tokeniser = Tokeniser(
        models.load_tokenizer(context, folder),
        max_length=spec.tuning.hyperparameters.max_length,
        assistant_only=spec.tuning.assistant_only_loss,
    )
    problems, dropped = Problems(), Counter[str]()
    token = context.secret("train")
    train_uri = parse_uri(spec.dataset.train.uri)
    train, format_, why = _read(
        context, tokeniser, rows(context, train_uri, spec.dataset.train.split, token), None, problems, dropped, "train row"
    )
    log.info("format %s: %s", format_, why)
    train = _deduplicate(context, train, problems, dropped)
    held_out = _hold_out(context, tokeniser, train, format_, problems, dropped, token)
    if held_out:
        train = _check_leakage(context, train, held_out, problems, dropped)
    _check_enough(context, train, held_out, problems)
    status = _write(context, train, held_out, format_, dropped)
    parameters = _parameters(context, folder)
    plan = make_plan(spec, len(train), parameters)
    context.write_json(context.layout.plan, plan.to_wire())
    report = {
        "format": {"name": format_, "reason": why},
        "problems": {kind: {"rows": n, "first": problems.places[kind]} for kind, n in problems.counts.items()},
        "dataset": status.to_wire(),
        "longest": max(len(e.tokens["input_ids"]) for e in train),
    }
    context.write_json(context.layout.data_report, report)
    gone = ", ".join(f"{count} {kind}" for kind, count in sorted(dropped.items()) if count)
    message = f"{len(train)} rows to train on ({status.tokens} tokens, {format_}), {len(held_out)} held out" + (
        f"; left out: {gone}" if gone else ""
    )
    return StageResult(reason="DataReady", message=message, result={"dataset": status.to_wire(), "plan": plan.to_wire()})


def _read(
    context: Context,
    tokeniser: Tokeniser,
    source: Iterable[Row],
    format_: str | None,
    problems: Problems,
    dropped: Counter[str],
    label: str,
) -> tuple[list[Example], str, str]:
    """Usable rows of a source. Raises UserError as `checks` says."""
    checks, length = context.spec.dataset.checks, context.spec.tuning.hyperparameters.max_length
    iterator = iter(source)
    head = list(islice(iterator, _SAMPLE))
    wanted = format_ or context.spec.dataset.format
    why = "as dataset.format says"
    if wanted == "auto":
        good = [row.value for row in head if row.value is not None]
        if not good:
            first = f"; {label} {head[0].number}: {head[0].problem} [{head[0].excerpt}]" if head else ""
            raise UserError("EmptyDataset", f"the data set has no readable row{first}")
        wanted, why = detect(good)
    if wanted == "messages":
        tokeniser.require_chat_template()
    found = []
    for row in (*head, *iterator):
        if row.value is None:
            problems.add("unreadable", label, row.number, row.problem, row.excerpt)
            continue
        try:
            shape = normalise(row.value, wanted)
            forged = tokeniser.special_tokens_in(strings(shape))
            if forged is not None:
                raise BadRow(f"the text holds {forged!r}, a special token of the model")
            tokens = tokeniser(shape)
            if tokens.truncated:
                problems.add("tooLong", label, row.number, f"longer than maxLength {length}")
                if checks.too_long == "drop":
                    dropped["tooLong"] += 1
                    continue
            if not tokens.learnable and not (tokens.truncated and checks.too_long == "fail"):
                raise BadRow(f"no answer token is left within maxLength {length}" if tokens.truncated else "there is no answer token")
        except BadRow as failure:
            problems.add("invalid", label, row.number, str(failure))
            continue
        found.append(Example(row.number, shape, _digest(shape), tokens))
    for kind in ("unreadable", "invalid"):
        if problems.counts[kind]:
            if checks.invalid_rows == "fail":
                raise UserError("InvalidRows", f"{problems.describe(kind)}. Mend them, or set dataset.checks.invalidRows: drop")
            dropped[kind] = problems.counts[kind]
    if problems.counts["tooLong"] and checks.too_long == "fail":
        raise UserError(
            "RowsTooLong",
            f"{problems.describe('tooLong')}. Raise hyperparameters.maxLength, or set dataset.checks.tooLong to truncate or drop",
        )
    return found, wanted, why


def _deduplicate(context: Context, train: list[Example], problems: Problems, dropped: Counter[str]) -> list[Example]:
    policy = context.spec.dataset.checks.duplicates
    first: dict[str, int] = {}
    unique = []
    for example in train:
        if example.digest in first:
            problems.add("duplicate", "train row", example.number, f"same as row {first[example.digest]}")
        else:
            first[example.digest] = example.number
            unique.append(example)
    if not problems.counts["duplicate"] or policy == "keep":
        return train
    if policy == "fail":
        raise UserError("DuplicateRows", f"{problems.describe('duplicate')}. Remove them, or set dataset.checks.duplicates: drop")
    dropped["duplicate"] = problems.counts["duplicate"]
    return unique


def _hold_out(
    context: Context, tokeniser: Tokeniser, train: list[Example], format_: str, problems: Problems, dropped: Counter[str], token: str | None
) -> list[Example]:
    """The held-out rows; with splitFraction they are taken out of `train`."""
    source = context.spec.dataset.eval
    if source is None:
        return []
    if source.uri is not None:
        found, _, _ = _read(
            context, tokeniser, rows(context, parse_uri(source.uri), source.split, token), format_, problems, dropped, "eval row"
        )
        return found
    assert source.split_fraction is not None
    seed = context.spec.tuning.hyperparameters.seed

    def rank(digest: str) -> str:  # by content, so that equal rows fall on the same side whatever their order
        return hashlib.sha256(f"{seed}:{digest}".encode()).hexdigest()

    ordered = sorted({e.digest for e in train}, key=rank)
    chosen = set(ordered[: max(1, round(len(ordered) * source.split_fraction))])
    held_out = [e for e in train if e.digest in chosen]
    train[:] = [e for e in train if e.digest not in chosen]
    return held_out


def _check_leakage(
    context: Context, train: list[Example], held_out: list[Example], problems: Problems, dropped: Counter[str]
) -> list[Example]:
    policy = context.spec.dataset.checks.leakage
    secret = {e.digest: e.number for e in held_out}
    for example in train:
        if example.digest in secret:
            problems.add("leaked", "train row", example.number, f"is also eval row {secret[example.digest]}")
    if not problems.counts["leaked"] or policy == "ignore":
        return train
    if policy == "fail":
        raise UserError(
            "LeakedRows",
            f"held-out rows stand in the training rows: {problems.describe('leaked')}. Remove them, or set dataset.checks.leakage: drop",
        )
    dropped["leaked"] = problems.counts["leaked"]
    return [e for e in train if e.digest not in secret]


def _check_enough(context: Context, train: list[Example], held_out: list[Example], problems: Problems) -> None:
    least = context.spec.dataset.checks.min_examples
    if len(train) < least:
        found = "; ".join(f"{kind}: {problems.describe(kind)}" for kind in problems.counts)
        detail = f" ({found})" if found else ""
        raise UserError(
            "TooFewExamples",
            f"{len(train)} usable training row(s), dataset.checks.minExamples is {least}{detail}. Add rows, or lower minExamples",
        )
    if context.spec.dataset.eval is not None and not held_out:
        raise UserError("NoEvalRows", "no held-out row is left; raise dataset.eval.splitFraction or check dataset.eval.uri")


def _write(context: Context, train: list[Example], held_out: list[Example], format_: str, dropped: Counter[str]) -> DatasetStatus:
    from datasets import Dataset

    digest = hashlib.sha256()
    for path, tokens_path, examples in (
        (context.layout.train_rows, context.layout.train_tokens, train),
        (context.layout.eval_rows, context.layout.eval_tokens, held_out),
    ):
        text = "".join(json.dumps(e.row, ensure_ascii=False) + "\n" for e in examples)
        digest.update(hashlib.sha256(text.encode()).digest())
        write_text(path, text)
        if examples:
            columns = {column: [e.tokens[column] for e in examples] for column in ("input_ids", "labels")}
            Dataset.from_dict(columns).to_parquet(tokens_path)
    return DatasetStatus(
        train=len(train),
        eval=len(held_out),
        tokens=sum(len(e.tokens["input_ids"]) for e in train),
        format=format_,
        dropped={kind: count for kind, count in dropped.items() if count},
        digest=f"sha256:{digest.hexdigest()}",
    )


def _parameters(context: Context, folder: str) -> int:
    """Parameters of the model, from its configuration alone: the weights stay on disk."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = context.spec.model.trust_remote_code
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    return int(sum(p.numel() for p in model.parameters()))
