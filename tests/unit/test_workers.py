"""What happens in a worker process is known: errors survive the way between processes, a process that dies is a failure."""

from __future__ import annotations

import json
import os
import pickle
import signal
from collections.abc import Callable
from typing import Any

import pytest

from finetune_trainer.data import reading, workers
from finetune_trainer.data.formats import RowReader
from finetune_trainer.data.scan import Scan, scan_rows
from finetune_trainer.data.tokens import RowTokenizer
from finetune_trainer.process import errors
from finetune_trainer.process.errors import InfrastructureError, OutOfMemory, StageError, UserError
from tests.unit.test_prepare import Desk, chat, desk

__all__ = ["desk"]

ERRORS = [
    *(kind("Reason", "what happened", {"a": 1}) for kind in errors.BY_CODE.values()),
    errors.SourceUnavailable("hub", "is away", 3.5),
    StageError("Reason", "what happened"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_error_survives_the_way_between_processes(error: StageError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and again.__dict__ == error.__dict__ and str(again) == str(error)


def test_no_class_of_errors_is_left_out() -> None:
    def all_of(kind: type) -> set[type]:
        return {kind, *(inner for sub in kind.__subclasses__() for inner in all_of(sub))}

    ours = {kind for kind in all_of(StageError) if kind.__module__.startswith("finetune_")}
    assert all(kind.__reduce__ is StageError.__reduce__ for kind in ours) and {type(error) for error in ERRORS} <= ours


class _Strange(Exception):
    """As libraries raise them: made of more than it keeps, so it does not unpickle."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def _raise(problem: BaseException) -> Any:
    raise problem


def _abort() -> Any:
    import faulthandler

    faulthandler._sigabrt()


@pytest.mark.parametrize(
    ("ends", "kind", "words"),
    [
        (lambda: _raise(UserError("ChatTemplateTooSlow", "too slow")), UserError, "too slow"),
        (lambda: _raise(_Strange("one", "two")), InfrastructureError, "_Strange: one"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), OutOfMemory, r"died \(SIGKILL\) at chunk 30.*memory"),
        (_abort, InfrastructureError, r"died \(SIGABRT\) at chunk 30; its last words: .*Fatal Python error: Aborted"),
        (lambda: os._exit(7), InfrastructureError, r"died \(exit code 7\) at chunk 30"),
    ],
    ids=["our error", "a library's error", "killed", "crashed", "gone"],
)
def test_what_happens_in_a_worker_process_is_known(ends: Callable[[], Any], kind: type[StageError], words: str) -> None:
    def work(number: int) -> int:
        if number == 30:
            ends()
        return number * number

    done: list[int] = []
    with pytest.raises(kind, match=words):
        done.extend(workers.map_in_order(work, iter(range(100)), 2, lambda number: f"chunk {number}"))


def test_chunks_come_in_order_and_are_not_read_ahead_without_end() -> None:
    taken: list[int] = []

    def chunks() -> Any:
        for number in range(200):
            taken.append(number)
            yield number

    found = workers.map_in_order(lambda number: number * 2, chunks(), 2, str)
    assert next(found) == 0 and len(taken) <= 9
    assert list(found) == [number * 2 for number in range(1, 200)]


def test_a_refused_row_among_many_never_hangs(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    row_tokenizer = RowTokenizer(AutoTokenizer.from_pretrained(desk.model), max_length=64, assistant_only=True)

    class Refusing(Scan):
        def one(self, row: reading.Row) -> Any:
            if row.number == 4000:
                raise UserError("UnstableChatTemplate", "of this row")
            return super().one(row)

    items = [reading.Row(i, raw=json.dumps(chat(f"what {i}")).encode()) for i in range(5000)]
    with pytest.raises(UserError, match="of this row"):
        list(scan_rows(Refusing(row_tokenizer, RowReader("messages", {}), False), items, processes=2))
