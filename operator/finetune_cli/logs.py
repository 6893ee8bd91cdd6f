"""`finetune logs`: the pods of a job, every line with its pod's name; with --follow until the job has ended."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator

from kubernetes import client
from rich.console import Console
from rich.text import Text
from urllib3.exceptions import HTTPError

from finetune_api import names
from finetune_api.lenient import read_status

from .cluster import Jobs, Object

_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
_LOOK = 2.0


def logs(jobs: Jobs, name: str, stage: str | None, rank: int | None, tail: int | None, *, follow: bool, console: Console) -> int:
    """Print them. Returns the exit code: 2 when there is no pod."""
    job = jobs.get(name)
    if follow:
        for label, line in _following(jobs, name, stage, rank, tail):
            _print(console, label, line)
        return 0
    pods = [pod for pod in jobs.pods(job) if _wanted(pod, stage, rank)]
    for pod in pods:
        with contextlib.suppress(client.ApiException):  # it has not started, or its log is gone with its node
            for line in jobs.log(pod.metadata.name, tail=tail):
                _print(console, _label(pod), line)
    return 0 if pods else 2


def rank_zero(jobs: Jobs, job: Object) -> list[str]:
    """The log of training rank 0, or nothing."""
    for pod in jobs.pods(job):
        if _wanted(pod, "train", 0):
            with contextlib.suppress(client.ApiException):
                return list(jobs.log(pod.metadata.name))
    return []


def _wanted(pod: object, stage: str | None, rank: int | None) -> bool:
    labels = pod.metadata.labels  # type: ignore[attr-defined]
    return (stage is None or labels.get(names.LABEL_STAGE) == stage) and (rank is None or labels.get(names.LABEL_RANK) == str(rank))


def _label(pod: object) -> str:
    labels = pod.metadata.labels  # type: ignore[attr-defined]
    stage, rank = labels.get(names.LABEL_STAGE, "?"), labels.get(names.LABEL_RANK)
    return f"{stage}/{rank}" if rank is not None else str(stage)


def _print(console: Console, label: str, line: str) -> None:
    colour = _COLOURS[sum(label.encode()) % len(_COLOURS)]
    console.print(Text.assemble((f"[{label}] ", colour), line), soft_wrap=True)


def _following(jobs: Jobs, name: str, stage: str | None, rank: int | None, tail: int | None) -> Iterator[tuple[str, str]]:
    lines: queue.Queue[tuple[str, str]] = queue.Queue()
    readers: dict[str, threading.Thread] = {}

    def read(pod: object) -> None:
        with contextlib.suppress(client.ApiException, HTTPError):
            for line in jobs.log(pod.metadata.name, follow=True, tail=tail):  # type: ignore[attr-defined]
                lines.put((_label(pod), line))

    while True:
        with contextlib.suppress(queue.Empty):
            while True:
                yield lines.get(timeout=_LOOK)
        try:
            job = jobs.get(name)
        except client.ApiException as failure:
            if failure.status == 404:
                return
            time.sleep(_LOOK)
            continue
        for pod in jobs.pods(job):
            started = pod.status.phase in ("Running", "Succeeded", "Failed")
            if started and _wanted(pod, stage, rank) and pod.metadata.uid not in readers:
                readers[pod.metadata.uid] = threading.Thread(target=read, args=(pod,), daemon=True)
                readers[pod.metadata.uid].start()
        if read_status(job.get("status")).finished and not any(thread.is_alive() for thread in readers.values()) and lines.empty():
            return
