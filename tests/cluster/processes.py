"""Start the cluster's processes, and find and end all of them again, also those of a run that was killed.

Every process carries the cluster's name in its environment, so /proc tells what belongs to it: no pid files that
a crash leaves wrong.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from .shell import CommandFailed, run

MARK = "FINETUNE_LOCAL_CLUSTER"


def start(cluster: str, name: str, command: list[str | Path], logs: Path, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a long-running process in a session of its own."""
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{name}.log").open("ab") as sink:
        return subprocess.Popen(
            [str(word) for word in command],
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **(env or {}), MARK: cluster},
        )


def of(cluster: str) -> list[int]:
    """Process IDs of all processes that carry the cluster's mark."""
    mark = f"{MARK}={cluster}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def in_networks(names: list[Path]) -> list[int]:
    """Process IDs in any of these network namespaces, given by the files that they are mounted on."""

    def identity(namespace: Path) -> tuple[int, int] | None:
        try:
            found = namespace.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    wanted = {identity(name) for name in names} - {None}
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit() and identity(folder / "ns" / "net") in wanted]


def end(find: object, *, grace: float = 8.0) -> None:
    """SIGTERM, then SIGKILL, until `find()` returns nothing."""
    deadline = time.monotonic() + grace
    number = signal.SIGTERM
    while pids := find():  # type: ignore[operator]
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline + grace:
            raise CommandFailed(f"processes {pids} do not end")
        if time.monotonic() > deadline:
            number = signal.SIGKILL
        time.sleep(0.2)


def unmount_below(folder: Path) -> None:
    """Unmount everything under a folder, deepest first."""
    for _ in range(3):
        points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        ours = sorted((p for p in points if p.startswith(f"{folder}/")), key=len, reverse=True)
        if not ours:
            return
        for point in ours:
            run(["umount", "-l", point.replace("\\040", " ")], check=False)
