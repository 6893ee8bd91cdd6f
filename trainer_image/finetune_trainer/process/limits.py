"""A time limit around code that a data set or a model repository brings along (case A22), and the cores that a pod may use."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from .errors import UserError


@contextlib.contextmanager
def time_limit(seconds: float, reason: str, message: str) -> Iterator[None]:
    """Raise UserError(reason, message) when the block takes longer. Only the main thread of a process has an alarm."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expired(*_: object) -> NoReturn:
        raise UserError(reason, message)

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def usable_cores() -> int:
    """Cores that this process may keep busy: those of its affinity, within the CPU limit of its cgroup."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)
