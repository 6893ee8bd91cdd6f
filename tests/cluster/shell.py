"""Small helpers shared by the local-cluster tooling: run a command, say what is going on, hash inputs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("FINETUNE_CACHE", Path.home() / ".cache" / "finetune-operator"))


class CommandFailed(RuntimeError):
    """A command exited non-zero; the message holds its last lines."""


def say(message: str) -> None:
    """Print one progress line at once, so that long set-up steps are visible."""
    print(f"  {time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Announce a step, say every minute that it goes on, and when it ends, how long it took."""
    say(f"{title} ...")
    started = time.monotonic()
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(60):
            say(f"{title}: {(time.monotonic() - started) / 60:.0f} min so far")

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
    say(f"{title}: done in {time.monotonic() - started:.0f} s")


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    input: str | None = None,
    check: bool = True,
    timeout: float | None = None,
) -> str:
    """Run a command and return its output; on failure raise CommandFailed with its last lines."""
    words = [str(word) for word in command]
    merged = {**os.environ, **(env or {})}
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as sink:
            code = subprocess.run(words, cwd=cwd, env=merged, stdout=sink, stderr=subprocess.STDOUT, timeout=timeout).returncode
        output = log.read_text(errors="replace")
    else:
        completed = subprocess.run(
            words,
            cwd=cwd,
            env=merged,
            input=input,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
        code, output = completed.returncode, completed.stdout
    if check and code != 0:
        tail = "\n".join(output.splitlines()[-30:])
        raise CommandFailed(f"{' '.join(words[:6])} exited {code}:\n{tail}")
    return output


def digest_of(*inputs: str | bytes | Path) -> str:
    """A short digest of strings, files and whole folders: the cache key of what is made from them."""
    digest = hashlib.sha256()
    for item in inputs:
        if isinstance(item, Path):
            files = sorted(p for p in item.rglob("*") if p.is_file() and "__pycache__" not in p.parts) if item.is_dir() else [item]
            for file in files:
                digest.update(str(file.relative_to(item.parent)).encode())
                digest.update(file.read_bytes())
        else:
            digest.update(item.encode() if isinstance(item, str) else item)
        digest.update(b"\0")
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a machine-wide lock, so that two invocations never build the same thing at once."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def cached(name: str, key: str, build: Callable[[Path], None], *, keep: int = 1) -> Path:
    """Return CACHE/name-key, made by `build(folder)` when absent.

    The folder appears under its final name only when complete: a build killed half-way leaves nothing that
    a later call would take for the real thing. Older keys of the same name are pruned down to `keep`.
    """
    target = CACHE / f"{name}-{key}"
    with locked(name):
        if target.exists():
            return target
        partial = CACHE / f"{name}-{key}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        build(partial)
        partial.rename(target)
        others = [p for p in CACHE.glob(f"{name}-????????????") if p != target]
        for stale in sorted(others, key=lambda p: p.stat().st_mtime, reverse=True)[keep:]:
            shutil.rmtree(stale, ignore_errors=True)
    return target
