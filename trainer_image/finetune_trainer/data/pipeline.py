"""The rows of one job on their way: read, compared, counted, written. Knows neither the model's weights nor who writes answers."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from finetune_api.spec import ANSWER_METRICS, FORMATS_OF, DatasetSource
from finetune_api.status import DatasetStatus, Plan

from ..job.context import Context
from ..process.errors import UserError
from .formats import FORMATS, RowReader, detect, rename, usual_names
from .limits import Limits, check_length, check_vocabulary
from .nulls import filled_in
from .packing import packed_sequences
from .problems import SHOWN, Files, Keys, Problems
from .reading import Row, rows
from .rendering import NOT_RENDERED
from .report import languages
from .scan import Scan, Scanned, scan_rows
from .shape import messages_of
from .store import HELD_OUT, Store
from .tokens import RowTokenizer

log = logging.getLogger("finetune.prepare")
_SAMPLE = 50
NO_ANSWERS = "evaluation.metrics asks for answers, but the rows are plain text; use loss, perplexity or token-accuracy"
AnswerWriter = Callable[[Iterable[Row], RowReader], dict[str, str]]
"""Writes an answer to each row, by the digest of its prompt (scan.prompt_digest)."""


@dataclass
class SourceReport:
    """One source of rows as it was read."""

    uri: str
    format: str = ""
    reason: str = ""
    rows: int = 0
    files: Files = field(default_factory=Files)

    def wire(self) -> dict[str, Any]:
        """As JSON."""
        return {"uri": self.uri, "format": self.format, "reason": self.reason, "rows": self.rows}


@dataclass
class _Opened:
    """A source of which the first rows were looked at."""

    origin: int
    source: DatasetSource
    name: str
    reader: RowReader
    rows: Iterator[Row]


class Pipeline:
    """The rows of one job. The methods are called in the order they stand here."""

    def __init__(self, context: Context, row_tokenizer: RowTokenizer, store: Store, write_answers: AnswerWriter | None = None) -> None:
        self.context, self.row_tokenizer, self.store, self.write_answers = context, row_tokenizer, store, write_answers
        dataset = context.spec.dataset
        self.checks = dataset.checks
        self.sources, self.fields = list(dataset.sources.values()), list(dataset.sources)
        self.problems, self.dropped, self.warnings = Problems(), Counter[str](), Counter[str]()
        self.unused, self._columns_seen = Keys(), set[str]()
        evaluation = context.spec.evaluation
        self._wants_answers = evaluation is not None and bool(set(evaluation.metrics) & set(ANSWER_METRICS))
        self.reports = {origin: SourceReport(source.uri) for origin, source in enumerate(self.sources)}

    def read_all(self) -> None:
        """Every source, row by row. Raises UserError as `checks` says."""
        opened = [self._open(origin, *named) for origin, named in enumerate(zip(self.sources, self.fields, strict=True))]
        held_out = self.context.spec.dataset.eval
        if held_out is not None and held_out.uri is not None:
            train = self.sources[0]
            source = DatasetSource(uri=held_out.uri, split=held_out.split)
            source = source.model_copy(
                update={"secret_ref": train.secret_ref, "s3_endpoint": train.s3_endpoint, "plain_http": train.plain_http}
            )
            self.reports[HELD_OUT] = SourceReport(held_out.uri)
            opened.append(self._open(HELD_OUT, source, "train"))
        self._check_columns()
        for each in opened:  # what a look at the first rows refuses comes before the work, and before a teacher is asked
            self._read(each)
        self._refuse()

    def _refuse(self) -> None:
        """Raise UserError with every kind of row that `checks` refuses; count those that it leaves out."""
        kinds = [kind for kind in ("unreadable", "invalid", "tooLong") if self.problems.counts[kind]]
        refused = [kind for kind in kinds if (not self._drops_long if kind == "tooLong" else self.checks.invalid_rows == "fail")]
        self.dropped.update({kind: self.problems.counts[kind] for kind in kinds})
        if not refused:
            return
        told = [f"{kind}: {self.problems.describe(kind, len(refused))}" for kind in refused]
        fixes = ["Mend them, or set dataset.checks.invalidRows: drop"] if refused != ["tooLong"] else []
        if "tooLong" in refused:
            other = "drop" if self.checks.too_long == "truncate" else "truncate or drop"
            fixes.append(f"Raise hyperparameters.maxLength, or set dataset.checks.tooLong to {other}")
        found = "; ".join(told) if len(told) > 1 else self.problems.describe(refused[0])
        raise UserError("RowsTooLong" if refused == ["tooLong"] else "InvalidRows", f"{found}. {'. '.join(fixes)}")

    @property
    def _drops_long(self) -> bool:
        """Whether rows that are too long, or of which nothing to learn is left when they are cut, are left out."""
        return self.checks.too_long == "drop" or (self.checks.too_long == "truncate" and self.checks.invalid_rows == "drop")

    def _check_columns(self) -> None:
        missing = [name for name in self.context.spec.dataset.columns if name not in self._columns_seen]
        if missing:
            found = ", ".join(sorted(self._columns_seen)[:20])
            raise UserError(
                "UnknownColumn", f"dataset.columns names {', '.join(missing)}, which no row has (found: {found}); name a column of the rows"
            )

    def _place(self, origin: int, number: int) -> str:
        name = "eval" if origin == HELD_OUT else self.fields[origin]
        return f"{name} {self.reports[origin].files.place(number)}"

    def _open(self, origin: int, source: DatasetSource, name: str) -> _Opened:
        report = self.reports[origin]
        iterator = rows(self.context, source, name, report.files)
        head = [row.parsed() for row in islice(iterator, _SAMPLE)]
        values = [row.value for row in head if row.value is not None]
        self._columns_seen.update(*values)
        columns = self.context.spec.dataset.columns or usual_names(values)
        report.format, report.reason = self._format(head, origin, columns)
        log.info("%s: format %s: %s", source.uri, report.format, report.reason)
        chat = any(rename(value, columns).get("system") for value in values)
        reader = RowReader(report.format, columns, chat=chat, filled=filled_in(values))
        if reader.reads_conversation(values):
            self.row_tokenizer.require_chat_template()
        if "text" in FORMATS[report.format].columns and self._wants_answers:
            raise UserError("NoAnswers", NO_ANSWERS)
        return _Opened(origin, source, name, reader, chain(head, iterator))

    def _read(self, opened: _Opened) -> None:
        report, reader = self.reports[opened.origin], opened.reader
        similar = self.checks.near_duplicates != "ignore" or self.checks.near_leakage != "ignore"
        answers = None
        if self.write_answers is not None:
            answers = self.write_answers(rows(self.context, opened.source, opened.name), reader)
        held_out = self.context.spec.dataset.eval
        group_by = held_out.group_by if held_out is not None else None
        scan = Scan(self.row_tokenizer, reader, similar, answers, group_by)
        for chunk in scan_rows(scan, opened.rows):
            report.rows += len({row.number for row in chunk})
            self.store.add(opened.origin, list(self._usable(opened.origin, chunk)), self.checks.similarity)

    def _format(self, head: list[Row], origin: int, columns: Mapping[str, str]) -> tuple[str, str]:
        wanted = self.context.spec.dataset.format
        good = [rename(row.value, columns) for row in head if row.value is not None]
        if wanted != "auto" and origin <= 0:
            return wanted, "as dataset.format says"
        if not good:
            found = Problems()
            for row in head:
                found.add("unreadable", self._place(origin, row.number), row.problem, row.excerpt)
            first = f"; of its first rows, {found.describe('unreadable')}" if head else ""
            document = head and (head[0].excerpt.startswith("[") or head[0].excerpt.strip() == "{")
            hint = "; where the file is one JSON document, and not one object a line, rename it to .json" if document else ""
            raise UserError("EmptyDataset", f"the data set has no readable row{first}{hint}")
        places = [self._place(origin, row.number) for row in head if row.value is not None]
        name, reason = detect(good, FORMATS_OF[self.context.spec.tuning.objective], places)
        named = ", ".join(f"{key} is read as {name}" for key, name in columns.items() if key not in self.context.spec.dataset.columns)
        return name, f"{reason}; {named}" if named else reason

    def _usable(self, origin: int, chunk: list[Scanned]) -> Iterator[Scanned]:
        for row in chunk:
            place = self._place(origin, row.number) if row.problem or row.truncated or row.sensitive or row.notes else ""
            self.unused.add(row.unused)
            if row.problem:
                kind = "unreadable" if row.unreadable else "tooLong" if row.too_long else "invalid"
                self.problems.add(kind, place, row.problem, row.excerpt)
                continue
            if row.truncated:
                if self.checks.too_long != "truncate":
                    self.problems.add("tooLong", place, f"longer than maxLength {self.row_tokenizer.max_length}")
                    continue
                self.problems.add("truncated", place, f"longer than maxLength {self.row_tokenizer.max_length}, cut there")
                self.warnings["truncated"] += 1
            self.warnings["sensitive"] += bool(row.sensitive)
            for kind in row.sensitive:
                self.problems.add(kind, place, "looks like it", "")
            for note in row.notes:
                self.problems.add(note, place, "docs/data.md says what that means")
                if note != f"{NOT_RENDERED} tool_calls.id":  # few templates show it
                    self.warnings[note.replace(" ", ":")] += 1
            yield row

    def compare(self) -> None:
        """Duplicates, split, leakage, mixture: what needs all rows at once."""
        if not self.store.has_rows:
            return
        self.store.begin()
        self._apply("duplicate", self.store.duplicates, self.checks.duplicates, "DuplicateRows", "same as", "duplicates")
        held_out, seed = self.context.spec.dataset.eval, self.context.spec.tuning.hyperparameters.seed
        if self.checks.near_duplicates != "ignore":
            look = lambda: self.store.near("nearDuplicate", self.checks.similarity, with_held_out=False)  # noqa: E731
            self._apply("nearDuplicate", look, self.checks.near_duplicates, "NearDuplicateRows", "nearly the same as", "nearDuplicates")
        if held_out is None:
            return
        if held_out.split_fraction is not None:
            if not self.store.hold_out(held_out.split_fraction, seed):
                one = f"agree in {held_out.group_by!r} (dataset.eval.groupBy)" if held_out.group_by is not None else "have one prompt"
                raise UserError(
                    "NoEvalRows",
                    f"all rows {one}, so none can be held out; name another column in dataset.eval.groupBy, or set dataset.eval.uri",
                )
        else:
            relation = "has the prompt of" if held_out.group_by is None else "is of one group with"
            self._apply("leaked", self.store.leaked, self.checks.leakage, "LeakedRows", relation, "leakage")
        if self.checks.near_leakage != "ignore":
            look = lambda: self.store.near("nearLeaked", self.checks.similarity, with_held_out=True)  # noqa: E731
            relation = "is nearly" if held_out.split_fraction is None else "is nearly the held-out"
            self._apply("nearLeaked", look, self.checks.near_leakage, "NearLeakedRows", relation, "nearLeakage")

    def _apply(self, kind: str, look: Callable[[], int], policy: str, reason: str, relation: str, setting: str) -> None:
        """Look for a kind of pair of rows, and keep, report, drop or refuse them."""
        count = look()
        if not count or policy in ("ignore", "keep"):
            return
        for index, (origin, number, other, partner) in enumerate(self.store.places(kind, SHOWN)):
            place, same = self._place(origin, number), self._place(other, partner)
            self.problems.add(kind, place, f"{relation} {same}", count=count - min(count, SHOWN) + 1 if index == 0 else 1)
        if policy == "fail":
            held = "held-out rows stand in the training rows: " if "eak" in kind else ""
            raise UserError(reason, f"{held}{self.problems.describe(kind)}. Remove them, or set dataset.checks.{setting}: drop")
        if policy == "drop":
            self.store.drop(kind)
            self.dropped[kind] = count
        else:
            self.warnings[kind] = count

    def check_enough(self) -> None:
        """Raise UserError when too few rows are left."""
        least = self.checks.min_examples
        found = self.store.count(held_out=False) if self.store.has_rows else 0
        if found < least:
            detail = "; ".join(f"{kind}: {self.problems.describe(kind)}" for kind in self.problems.counts)
            raise UserError(
                "TooFewExamples",
                f"{found} usable training row(s), dataset.checks.minExamples is {least}{f' ({detail})' if detail else ''}. Add rows, or lower minExamples",
            )
        if self.context.spec.dataset.eval is not None and not self.store.count(held_out=True):
            raise UserError("NoEvalRows", "no held-out row is left; raise dataset.eval.splitFraction or check dataset.eval.uri")
        self.store.weigh([source.weight for source in self.sources], self.context.spec.tuning.hyperparameters.seed)
        self.rows_per_epoch, self.tokens = self.store.totals()
        if not self.rows_per_epoch:
            raise UserError("TooFewExamples", "the weights of the sources leave no training row; raise dataset.train.weight")

    def check_fits(self, limits: Limits) -> None:
        """Raise UserError for rows that the model cannot take; those that it was not made for are told."""
        check_vocabulary(limits, self.store, self.row_tokenizer.tokenizer, self._place)
        beyond = check_length(limits, self.store, self.row_tokenizer.max_length, self._place)
        if beyond is not None:
            self.warnings["beyondContext"] = beyond.rows
            self.problems.add("beyondContext", beyond.longest, beyond.told, count=beyond.rows)

    def packed_sequences(self) -> int:
        """Sequences that the training rows are packed into."""
        return packed_sequences(self.store.training_lengths(), self.row_tokenizer.max_length)

    def write(self) -> DatasetStatus:
        """The prepared rows; what is written is what trains and evaluates."""
        digests = [self.store.write(self.context.layout.train_rows, held_out=False)]
        if self.context.spec.dataset.eval is not None:
            digests.append(self.store.write(self.context.layout.eval_rows, held_out=True))
        self.lengths = self.store.lengths()
        self.systems = self.store.system_prompts()
        self.languages = languages(self.store)
        if self.lengths["outliers"]:
            self.warnings["lengthOutlier"] = self.lengths["outliers"]
        if len(self.systems) > 1:
            self.warnings["otherSystemPrompt"] = sum(count for _, count in self.systems[1:])
        if other := self.store.other_system_prompts():
            self.warnings["evalSystemPromptDiffers"] = other
        certain = {name: n for name, n in self.languages.items() if name != "unsure"}
        if sum(sorted(certain.values())[:-1]) > 0.02 * sum(self.languages.values()):
            self.warnings["otherLanguageInSample"] = sum(sorted(certain.values())[:-1])
        return DatasetStatus(
            train=self.rows_per_epoch,
            eval=self.store.count(held_out=True),
            tokens=self.tokens,
            format=self.reports[0].format,
            dropped={kind: count for kind, count in self.dropped.items() if count},
            warnings={kind: count for kind, count in self.warnings.items() if count},
            unused_keys=self.unused.brief(),
            digest=f"sha256:{hashlib.sha256(''.join(digests).encode()).hexdigest()}",
        )

    def _stops(self) -> list[str]:
        """The tokens that end an answer where the rows are conversations: what the published model stops with, first that of a turn."""
        some = [json.loads(row) for (row,) in self.store.sample(_SAMPLE, "row")]
        if self.row_tokenizer.objective == "reward" or not any(map(messages_of, some)):
            return []
        ends = set().union(*map(self.row_tokenizer.ends, some))
        return [self.row_tokenizer.template.turn_end, *sorted(ends - {self.row_tokenizer.template.turn_end})]

    def report(self, status: DatasetStatus, plan: Plan) -> dict[str, Any]:
        """What goes into reports/data.json."""
        return {
            "dataset": {**status.to_wire(), "dropped": status.dropped},
            "sources": [report.wire() for report in self.reports.values()],
            "problems": self.problems.wire(),
            "unusedKeys": self.unused.all(),
            "lengths": self.lengths,
            "languages": self.languages,
            "systemPrompts": [[text, count] for text, count in self.systems],
            "maxLength": self.row_tokenizer.max_length,
            "stops": self._stops(),
            "plan": plan.to_wire(),
        }
