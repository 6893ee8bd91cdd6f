"""The teacher of objective distill: its vocabulary, its size, the answers it writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.formats import RowReader
from ..data.pipeline import AnswerWriter
from ..data.reading import Row
from ..data.scan import prompt_digest, without_answer
from ..data.shape import BadRow, Shape, on_the_wire
from ..data.tokens import RowTokenizer
from ..job.context import Context
from ..models import architecture
from ..models.fetch import fetch_model, local_path, shown
from ..models.load import compute_dtype, load_model
from ..models.stopping import stop_model, stop_with
from ..process.errors import UserError
from ..remote.chat import complete

log = logging.getLogger("finetune.teacher")
_BATCH = 8


def fetch_teacher(context: Context, tokenizer: Any) -> int:
    """Fetch the teacher. Returns the parameters that stay in memory while training: none of one that only writes answers.

    Raises UserError for a teacher that cannot be asked, or whose logits are not over the student's vocabulary.
    """
    settings = context.spec.tuning.distillation
    if settings is None or settings.teacher is None:
        return 0
    uri, trust = settings.teacher.uri, settings.teacher.trust_remote_code
    place = fetch_model(context, "teacher", uri, remote_code=trust)
    named = shown("teacher", uri)
    config = architecture.read_config(place, named, trust=trust)
    architecture.check_architecture(config, named, reward=False)
    architecture.check_quantization(config, named)
    model, _ = architecture.on_meta(config, place, named, reward=False, trust=trust)
    if settings.mode != "logits":
        return 0
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(place).get_vocab()
    except Exception as failure:  # the Rust side raises bare Exceptions
        raise UserError(
            "TokenizerNotReadable", f"tuning.distillation.teacher: its tokenizer cannot be loaded: {str(failure)[:400]}"
        ) from failure
    if theirs != tokenizer.get_vocab():
        raise UserError(
            "OtherVocabulary",
            f"the teacher's vocabulary ({len(theirs)} tokens) is not the student's ({len(tokenizer.get_vocab())}); set tuning.distillation.mode: generate",
        )
    length, most = context.spec.tuning.hyperparameters.max_length, architecture.positions(model)
    if most is not None and length > most:
        raise UserError(
            "LongerThanPositions",
            f"the teacher has {most} positions, hyperparameters.maxLength is {length}; set maxLength to {most} or less",
        )
    return int(sum(p.numel() for p in model.parameters()))


def answer_writer(context: Context, row_tokenizer: RowTokenizer) -> AnswerWriter | None:
    """What writes the answers to learn; None where the rows' own are learned."""
    settings = context.spec.tuning.distillation
    if settings is None or settings.mode != "generate":
        return None
    return partial(write_answers, context, row_tokenizer)


def write_answers(context: Context, row_tokenizer: RowTokenizer, rows: Iterable[Row], reader: RowReader) -> dict[str, str]:
    """The teacher's answer to each row's prompt, by digest. What it said already, before a retry, is not asked again."""
    path, author = Path(context.layout.teacher_answers), _author(context)
    known: dict[str, str] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
                if entry["author"] == author:
                    known[entry["digest"]] = entry["answer"]
            except (ValueError, KeyError, TypeError):  # the last line of an interrupted run
                continue
    ask = _from_endpoint(context) if context.spec.tuning.distillation.endpoint is not None else _from_model(context, row_tokenizer)  # type: ignore[union-attr]
    missing = _missing(rows, reader, known)
    with path.open("a") as sink:
        while batch := list(islice(missing, _BATCH)):
            for (digest, _), answer in zip(batch, ask([prompt for _, prompt in batch]), strict=True):
                known[digest] = answer
                sink.write(json.dumps({"digest": digest, "answer": answer, "author": author}) + "\n")
            sink.flush()
    log.info("the teacher wrote %d answers", len(known))
    return known


def _author(context: Context) -> str:
    """Who answers, and how much may be said: the answers of another are asked for anew."""
    settings = context.spec.tuning.distillation
    assert settings is not None
    if settings.endpoint is not None:
        who = f"{settings.endpoint.url} {settings.endpoint.model}"
    else:
        who = str(context.read_json(context.layout.reference("teacher"))["fingerprint"])
    return f"{who} {settings.max_new_tokens}"


def _missing(rows: Iterable[Row], reader: RowReader, known: dict[str, str]) -> Iterator[tuple[str, Shape]]:
    asked = set(known)
    for row in rows:
        value = row.parsed().value
        if value is None:
            continue
        try:
            shape, _ = reader.read(value)
        except BadRow:
            continue  # counted when the rows are scanned
        if "text" in shape:
            raise UserError(
                "NoPrompts",
                "tuning.distillation.mode generate needs prompts, but the rows are plain text; give messages, prompt-completion or prompt-only",
            )
        digest = prompt_digest(shape)
        if digest not in asked:
            asked.add(digest)
            yield digest, without_answer(shape)


def _from_endpoint(context: Context) -> Any:
    settings = context.spec.tuning.distillation
    assert settings is not None and settings.endpoint is not None
    key, endpoint, limit = context.secret("endpoint"), settings.endpoint, settings.max_new_tokens

    def ask(prompts: list[Shape]) -> list[str]:
        turns = [on_the_wire(p["messages"]) if "messages" in p else [{"role": "user", "content": p["prompt"]}] for p in prompts]
        tools = [p.get("tools") for p in prompts]
        return [complete(endpoint, m, key=key, max_tokens=limit, tools=t) for m, t in zip(turns, tools, strict=True)]

    return ask


def _from_model(context: Context, row_tokenizer: RowTokenizer) -> Any:
    import torch
    from transformers import AutoTokenizer

    from ..models.generate import generate

    settings = context.spec.tuning.distillation
    assert settings is not None
    place = local_path(context, "teacher")
    cuda = torch.cuda.is_available()
    model = load_model(context, place, dtype=compute_dtype(cuda), cuda=cuda).to("cuda" if cuda else "cpu").eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    theirs = RowTokenizer(tokenizer, max_length=row_tokenizer.max_length, assistant_only=True)
    if tokenizer.chat_template:
        stop_with(tokenizer, theirs.template.turn_end)
    stop_model(context, model, tokenizer, place)

    lead = theirs.template.answer_lead

    def ask(prompts: list[Shape]) -> list[str]:
        texts = [theirs.prompt_and_answer(theirs.fitted(p))[0] for p in prompts]
        written: list[str] = generate(model, tokenizer, texts, settings.max_new_tokens, lead)
        return written

    return ask
