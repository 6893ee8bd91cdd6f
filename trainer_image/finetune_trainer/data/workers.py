"""One function over many chunks, in all processes of the machine, in order; a process that dies ends it with its last words."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TextIO, TypeVar

from finetune_api.contract import Env

from ..process import parent_watch
from ..process.errors import InfrastructureError, OutOfMemory, StageError, classify

T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 4
"""Chunks under way for each process: memory does not grow with the data."""


class _Worker:
    """What a worker process inherits, and where it leaves its last words."""

    work: Callable[[Any], Any]
    name: Callable[[Any], str]
    words: TextIO


def map_in_order(work: Callable[[T], R], chunks: Iterable[T], processes: int, name: Callable[[T], str]) -> Iterator[R]:
    """What `work` makes of each chunk, in order. Raises what it raises, as a StageError; also when a process dies in it.

    `name` says of a chunk what to tell people: a process that dies is told with it.
    """
    with tempfile.TemporaryDirectory() as folder:
        _Worker.work, _Worker.name = staticmethod(work), staticmethod(name)  # inherited by fork: a tokenizer is not sent
        before = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _begin, (folder, os.getpid()))
        waiting: deque[Future[R]] = deque()
        workers: list[Any] = []
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_run, chunk))
                workers = workers or [child for child in multiprocessing.active_children() if child not in before]
                if len(waiting) >= _AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise _death(workers, Path(folder)) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(folder: str, parent: int) -> None:
    os.environ[Env.PARENT] = str(parent)
    parent_watch.start()
    _Worker.words = Path(folder, str(os.getpid())).open("w+")  # noqa: SIM115 - open as long as the process lives
    faulthandler.enable(_Worker.words)


def _run(chunk: Any) -> Any:
    _Worker.words.seek(0)
    _Worker.words.truncate()
    _Worker.words.write(f"{_Worker.name(chunk)}\n")
    _Worker.words.flush()
    try:
        return _Worker.work(chunk)
    except StageError:
        raise
    except BaseException as failure:  # what a library raises need not survive the way to another process
        raise classify(failure) from failure


def _death(workers: list[Any], folder: Path) -> StageError:
    """Who died, of what, and over what. The others are ended by the pool, with SIGTERM."""
    deadline = time.monotonic() + 5
    while any(worker.exitcode is None for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    dead = next((w for w in workers if w.exitcode not in (None, 0, -signal.SIGTERM)), None)
    if dead is None:
        return InfrastructureError("WorkerDied", "a process that reads rows ended without a word")
    place, _, words = Path(folder, str(dead.pid)).read_text(errors="replace").partition("\n")
    how = signal.Signals(-dead.exitcode).name if dead.exitcode < 0 else f"exit code {dead.exitcode}"
    said = f"; its last words: {' | '.join(words.split(chr(10))[:6])[:600]}" if words.strip() else ""
    message = f"a process that reads rows died ({how}) at {place or 'its start'}{said}"
    if dead.exitcode == -signal.SIGKILL:
        hint = "so does the kernel when memory is short; give prepare more, or look at the longest of these rows"
        return OutOfMemory("WorkerDied", f"{message}: {hint}")
    return InfrastructureError("WorkerDied", message)
