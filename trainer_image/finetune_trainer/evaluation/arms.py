"""The ways in which the held-out rows are asked: the base as it is, with the task's instruction, with examples; and the tuned model.

Nobody uses a base without saying what the task is, so a comparison with one that was never told flatters the tuned model. What
the base is told is decided in prepare, where a prompt that does not fit is refused before a GPU is taken.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune_api.evaluation_status import ArmName
from finetune_api.spec import ANSWER_METRICS, Evaluation

from ..data.limits import Limits
from ..data.pipeline import NO_ANSWERS
from ..data.shape import BadRow, Shape, system_prompt
from ..data.store import read_rows
from ..data.tokens import IGNORED, RowTokenizer
from ..job.context import Context
from ..models.generate import encode
from ..process.errors import UserError
from .measure import Asked, Row, good_rows

_AUTO = (8, 4)
"""Numbers of examples that `fewShot: auto` tries, before none"""
_CANDIDATES, _LONGEST = 2000, 20
_UNBOUNDED = 1 << 20
_TURNS = ("user", "assistant")


@dataclass(frozen=True)
class Prompting:
    """What one arm says before the question."""

    name: ArmName
    system: str | None = None
    """The system text, in place of a row's own; None leaves that."""
    bare: bool = False
    """The row's own system text is left out."""
    folded: bool = False
    """The chat template knows no system turn: the text stands at the head of the first turn."""
    examples: tuple[Any, ...] = ()
    """Turns of an example each, or its text."""

    def apply(self, shape: Shape) -> Shape:
        """The row as this arm asks it."""
        key = "messages" if "messages" in shape else "prompt"
        if isinstance(shape[key], str):
            parts = [self.system, *self.examples, shape[key]]
            return {**shape, key: "\n\n".join(part for part in parts if part)}
        own = shape[key][:1] if shape[key] and shape[key][0]["role"] == "system" else []
        rest = [*(turn for example in self.examples for turn in example), *shape[key][len(own) :]]
        text = self.system
        if own and text is None and not self.bare:
            return {**shape, key: [*own, *rest]}
        if text is None:
            return {**shape, key: rest}
        if self.folded:
            return {**shape, key: [{**rest[0], "content": f"{text}\n\n{rest[0]['content']}"}, *rest[1:]]}
        return {**shape, key: [{"role": "system", "content": text}, *rest]}


@dataclass
class Baseline:
    """How the base is asked, as prepare decided it."""

    arms: list[Prompting] = field(default_factory=lambda: [Prompting("Base")])
    system: str = ""
    """The system text on which the held-out rows agree, which the tuned model is to be served with."""
    notes: list[str] = field(default_factory=list)
    """What people should know of it."""


def write_baseline(context: Context, tokenizer: Any, limits: Limits) -> Baseline:
    """In prepare, when the rows are written: decide how the base is asked, within what it can take."""
    spec = context.spec.evaluation
    assert spec is not None
    found = Baseline()
    held_out = read_rows(context.layout.eval_rows, ("row", "label"), spec.max_examples)
    rows = [json.loads(row["row"]) for row in good_rows(held_out)]
    _check_rows(spec, held_out, rows)
    own = {system_prompt(row) for row in rows}
    found.system = own.pop() if len(own) == 1 else ""
    if context.spec.tuning.objective not in ("pretrain", "reward") and rows and not any("text" in row for row in rows):
        room = min((n for n in (limits.positions, limits.context) if n is not None), default=_UNBOUNDED)
        _Planner(context, tokenizer, rows, room, found).plan()
    context.write_json(context.layout.baseline, asdict(found))
    return found


def _check_rows(spec: Evaluation, held_out: list[Row], good: list[Shape]) -> None:
    """Raise UserError when a metric cannot be computed on the held-out rows."""
    more = "raise dataset.eval.splitFraction or evaluation.maxExamples, or give others in dataset.eval.uri"
    if not good:
        raise UserError("NoEvalRows", f"no held-out row has a good answer (label true) to compare on; {more}")
    labels = {row["label"] for row in held_out if row.get("label") is not None}
    if "preference-accuracy" in spec.metrics and len(labels) == 1:
        raise UserError(
            "OneSided", f"evaluation.metrics preference-accuracy needs held-out rows with label true and with label false; {more}"
        )
    if set(spec.metrics) & set(ANSWER_METRICS) and any("text" in row for row in good):
        raise UserError("NoAnswers", NO_ANSWERS)


def read_baseline(context: Context) -> Baseline:
    """In evaluate: what prepare decided."""
    if not Path(context.layout.baseline).exists():  # prepared by an earlier release
        return Baseline()
    raw = context.read_json(context.layout.baseline)
    arms = [Prompting(**{**arm, "examples": tuple(arm["examples"])}) for arm in raw["arms"]]
    return Baseline(arms, raw["system"], raw["notes"])


class _Planner:
    """Decides what the base is told."""

    def __init__(self, context: Context, tokenizer: Any, rows: list[Shape], room: int, found: Baseline) -> None:
        self.context, self.rows, self.found = context, rows, found
        self.spec = context.spec.evaluation
        assert self.spec is not None
        self.tokenizer, self.rendering = tokenizer, unbounded(context, tokenizer)
        self.wants_answers = bool(set(self.spec.metrics) & set(ANSWER_METRICS))
        self.room = room

    def plan(self) -> None:
        assert self.spec is not None
        asked, own = self.spec.baseline.system_prompt, self.found.system
        if asked is not None and (forged := self.rendering.special_token_in([asked])) is not None:
            raise UserError(
                "BadSystemPrompt", f"evaluation.baseline.systemPrompt holds {forged!r}, a special token of the model; remove it"
            )
        if asked is not None and asked != own and any(system_prompt(row) for row in self.rows):
            self.found.notes.append(
                "evaluation.baseline.systemPrompt is another text than the rows' own system text, with which the model is trained: serve it as trained"
            )
        instruction = asked or own or None
        if instruction is not None:
            instructed = self._with_system(Prompting("Instructed", system=instruction))
            over = self._over(instructed)
            if asked is not None and over is not None and over > 0:
                raise UserError(
                    "PromptTooLong",
                    f"evaluation.baseline.systemPrompt: a held-out row with it is {over} tokens longer than the model's context of {self.room}; shorten it",
                )
            if over is not None:
                self.found.arms = [Prompting("Base", bare=bool(own)), instructed]
        self._few_shot(replace(self.found.arms[-1], name="FewShot"))

    def _with_system(self, arm: Prompting) -> Prompting:
        """The arm as the chat template can say it: with a system turn where it knows those, else at the head of the first turn."""
        try:
            if (arm.system or "").strip() in self.rendering.prompt_and_answer(arm.apply(self.rows[0]))[0]:
                return arm
        except (BadRow, UserError):
            pass
        return replace(arm, folded=True)

    def _few_shot(self, arm: Prompting) -> None:
        assert self.spec is not None
        wanted = self.spec.baseline.shots
        if wanted == 0:
            return
        examples = self._examples(max(_AUTO) if wanted is None else wanted)
        for count in _AUTO if wanted is None else (wanted,):
            if len(examples) < count:
                continue
            tried = replace(arm, examples=tuple(examples[:count]))
            over = self._over(tried)
            if over is None:
                return
            if over <= 0:
                self.found.arms.append(tried)
                return
            if wanted is not None:
                raise UserError(
                    "PromptTooLong",
                    f"evaluation.baseline.fewShot: a held-out row with {count} examples is {over} tokens longer than the model's context of "
                    f"{self.room}; set fewer, or auto",
                )
        if wanted is not None:
            raise UserError(
                "NoExamples",
                f"evaluation.baseline.fewShot is {wanted}, but the training rows hold {len(examples)} that can be an example (a question and an answer "
                "as text, no tool calls); set fewer, or auto",
            )

    def _over(self, arm: Prompting) -> int | None:
        """Tokens by which the longest row does not fit; None, with a note, where the chat template cannot say what the arm says."""
        assert self.spec is not None
        longest, limit = 0, self.context.spec.tuning.hyperparameters.max_length
        for shape in sorted(self.rows, key=lambda row: -len(json.dumps(row)))[:_LONGEST]:
            own, answer = self.rendering.prompt_and_answer(shape, end=True)
            try:
                told = self.rendering.prompt_and_answer(arm.apply(shape))[0]
            except (BadRow, UserError) as failure:
                self.found.notes.append(f"{arm.name} was left out: {failure}")
                return None
            before, given, now = (len(ids) for ids in encode(self.tokenizer, [own, answer, told]))
            needed = max(min(before + given, limit), before + self.spec.max_new_tokens if self.wants_answers else 0)
            longest = max(longest, needed + now - before)
        return longest - self.room

    def _examples(self, count: int) -> list[Any]:
        """Training rows as examples, by the job's seed: different answers first, and none that is much longer than most."""
        texts = [
            row["row"] for row in read_rows(self.context.layout.train_rows, ("row", "label"), _CANDIDATES) if row.get("label") is not False
        ]
        usual = sorted(map(len, texts))[len(texts) * 3 // 4] if texts else 0
        random.Random(self.context.spec.tuning.hyperparameters.seed).shuffle(texts)
        seen: set[str] = set()
        first: list[Any] = []
        others: list[Any] = []
        for shape in (json.loads(text) for text in dict.fromkeys(texts) if len(text) <= usual):
            example = _example(shape)
            if example is None:
                continue
            answer = example if isinstance(example, str) else str(example[-1]["content"])
            (others if answer in seen else first).append(example)
            seen.add(answer)
            if len(first) == count:
                break
        return [*first, *others][:count]


def _example(shape: Shape) -> Any:
    """The turns, or the text, of a row that can stand before a question."""
    if isinstance(shape.get("prompt"), str):
        answer = shape.get("completion", shape.get("chosen"))
        return shape["prompt"] + answer if isinstance(answer, str) else None
    turns = shape["messages"] if "messages" in shape else [*shape["prompt"], *shape.get("chosen", ())]
    turns = turns[1:] if turns and turns[0]["role"] == "system" else turns
    plain = all(turn["role"] in _TURNS and isinstance(turn.get("content"), str) and not turn.get("tool_calls") for turn in turns)
    return turns if plain and turns and turns[-1]["role"] == "assistant" else None


def unbounded(context: Context, tokenizer: Any) -> RowTokenizer:
    """Renders rows of any length, and learns answers alone."""
    return RowTokenizer(tokenizer, objective=context.spec.tuning.objective, max_length=_UNBOUNDED, assistant_only=True)


def asked_rows(context: Context, tokenizer: Any, rows: list[Row], baseline: Baseline, *, answers: bool) -> Iterator[Asked]:
    """The held-out rows as each arm asks them, the tuned model's last: exactly as they were prepared.

    `answers`: whether prompts as text are wanted. The same tokens are measured in all arms. An arm in which they cannot be is left
    out, and a note says so.
    """
    rendering = unbounded(context, tokenizer)
    shapes = [json.loads(row["row"]) for row in rows]
    good = [row.get("label") is not False for row in rows]

    @functools.cache
    def whole(place: int) -> list[int]:
        return _learned(rendering(shapes[place])[0]["labels"])

    def told(arm: Prompting, rows: list[Row]) -> list[Row]:
        return [_told(rendering, row, shapes[place], arm, whole(place)) for place, row in enumerate(rows)]

    if len(baseline.arms) > 1 and not context.spec.tuning.assistant_only_loss:  # of prompts that differ, answers alone can be compared
        rows = told(Prompting("Tuned"), [{**row, "labels": None} for row in rows])

    def asked(arm: Prompting) -> Asked:
        changed = arm != Prompting(arm.name)
        texts = [rendering.prompt_and_answer(arm.apply(shape)) for shape, fine in zip(shapes, good, strict=True) if answers and fine]
        return Asked(arm.name, told(arm, rows) if changed else rows, texts, len(arm.examples))

    for arm in baseline.arms:
        try:
            yield asked(arm)
        except (BadRow, UserError) as failure:
            if arm.name == "Base":
                raise
            baseline.notes.append(f"{arm.name} was left out: {failure}")
    yield asked(Prompting("Tuned"))


def _told(rendering: RowTokenizer, row: Row, shape: Shape, arm: Prompting, whole: list[int]) -> Row:
    """A prepared row with what the arm says before it. What is learned stays the same, to the token. `whole`: that of the uncut row."""
    columns = rendering(arm.apply(shape))[0]
    found = dict(row)
    if row.get("prompt_ids") is not None:
        found["prompt_ids"] = columns["prompt_ids"]
    learned = whole if row["labels"] is None else _learned(row["labels"])  # fewer where the row was cut
    places = [place for place, label in enumerate(columns["labels"]) if label != IGNORED]
    places = places[len(places) - len(whole) :]
    if [columns["labels"][place] for place in places] != whole or whole[: len(learned)] != learned:
        raise BadRow("the chat template renders answers differently when something stands before the question")
    kept = set(places[: len(learned)])
    end = max(kept, default=len(columns["labels"]) - 1) + 1
    found["input_ids"] = columns["input_ids"][:end]
    found["labels"] = [label if place in kept else IGNORED for place, label in enumerate(columns["labels"][:end])]
    return found


def _learned(labels: Sequence[int]) -> list[int]:
    return [label for label in labels if label != IGNORED]
