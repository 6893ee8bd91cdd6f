"""Watch over the processes of a pod: pass a stop on so that they save first, and notice when they hang."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

from finetune_api.contract import PEER_LOST, Env

from .errors import Hang, Stopped
from .ipc import IPC_DIR, Channel, Heartbeat, Phase

log = logging.getLogger("finetune.supervise")
_POLL = 0.5
_MARGIN = 10.0
"""Seconds of the grace period that are left for the exit itself."""
_GRACE = 60.0
_FACTOR = 10.0
FLOORS: Mapping[Phase, float] = {"start": 1800.0, "step": 180.0, "evaluate": 1800.0, "save": 1800.0, "finish": 1800.0}
"""Least seconds without a sign of life that count as a hang. Nothing is known yet of the first of each kind."""


class HangDetector:
    """One process's signs of life: how long the present one may take, from how long those of its kind took."""

    def __init__(self, began: float, hang_timeout: float | None = None) -> None:
        self.last = Heartbeat(0, 0, 0, "start", began)
        self._timeout = hang_timeout
        self._longest: dict[Phase, float] = {}

    def observe(self, beat: Heartbeat) -> None:
        """Take a sign of life."""
        if beat.at > self.last.at:
            phase = self.last.phase
            self._longest[phase] = max(self._longest.get(phase, 0.0), beat.at - self.last.at)
            self.last = beat

    @property
    def limit(self) -> float:
        """Seconds that the present step, save or evaluation may take."""
        phase = self.last.phase
        if self._timeout is not None and phase != "start":
            return self._timeout
        return max(FLOORS[phase], self._timeout or 0.0, _FACTOR * self._longest.get(phase, 0.0))

    def hung(self, now: float) -> bool:
        """Whether it takes longer than that."""
        return now - self.last.at > self.limit


class Supervisor:
    """Runs the command that starts a pod's training processes, until it ends, is stopped, or hangs."""

    def __init__(self, channel: Channel, hang_timeout: float | None) -> None:
        self._channel, self._hang_timeout = channel, hang_timeout
        self._stop = threading.Event()
        self._grace = max(1.0, float(os.environ.get(Env.GRACE, _GRACE)) - _MARGIN)

    def run(self, command: list[str], env: dict[str, str]) -> int:
        """The exit code. Raises Stopped when they did not end in time after a stop, Hang when they hung."""
        signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        ours = {IPC_DIR: str(self._channel.folder), Env.PARENT: str(os.getpid())}
        process = subprocess.Popen(command, env={**env, **ours}, start_new_session=True)
        began = time.monotonic()
        detectors: dict[int, HangDetector] = {}
        deadline: float | None = None
        try:
            while True:
                try:
                    return process.wait(timeout=_POLL)
                except subprocess.TimeoutExpired:
                    pass
                now = time.monotonic()
                for beat in self._channel.heartbeats():
                    detectors.setdefault(beat.rank, HangDetector(began, self._hang_timeout)).observe(beat)
                if self._stop.is_set() and deadline is None:
                    deadline = now + self._grace if detectors else now  # before the first sign of life there is nothing to save
                    self._channel.request_stop()
                    log.info("asked to stop: a checkpoint is saved after this step")
                if deadline is not None and now >= deadline:
                    raise Stopped("Stopped", f"stopped before a checkpoint was saved: {self._where(detectors)}")
                if any(detector.hung(now) for detector in detectors.values()) or (not detectors and now - began > FLOORS["start"]):
                    raise self._hang(detectors, now)
        finally:
            _kill(process)

    def _where(self, detectors: dict[int, HangDetector]) -> str:
        if not detectors:
            return "training had not begun"
        slowest = min(detectors.values(), key=lambda p: (p.last.step, p.last.at)).last
        return f"rank {slowest.rank} was at step {slowest.step} ({slowest.phase}) and did not end it in {self._grace:.0f} s"

    def _hang(self, detectors: dict[int, HangDetector], now: float) -> Hang:
        """Dump every process's stacks to the log. Names the rank that is behind."""
        if not detectors:
            return Hang("Hang", f"no process began to train in {FLOORS['start']:.0f} s")
        for detector in detectors.values():
            try:
                os.kill(detector.last.pid, signal.SIGUSR1)
            except ProcessLookupError:
                pass
        time.sleep(1.0)
        places = {}
        for rank in detectors:
            path = self._channel.stack(rank)
            text = path.read_text(errors="replace") if path.exists() else ""
            print(f"--- stacks of rank {rank}, which hangs\n{text}", file=sys.stderr, flush=True)
            places[rank] = _innermost(text)
        slowest = min(detectors.values(), key=lambda p: (p.last.step, waits_for_peers(places[p.last.rank]), p.last.at)).last
        silent = now - slowest.at
        message = (
            f"rank {slowest.rank} gave no sign of life for {silent:.0f} s after step {slowest.step} ({slowest.phase}), "
            f"in {places[slowest.rank] or 'an unknown place'}; the stacks of all ranks are in the log"
        )
        return Hang(PEER_LOST if waits_for_peers(places[slowest.rank]) else "Hang", message)


def waits_for_peers(place: str) -> bool:
    """Whether a process most likely waits for the others: it is inside torch, not in what feeds it."""
    return "/torch/" in place and "/torch/utils/data/" not in place


def _innermost(stacks: str) -> str:
    """`file:line in function` of the innermost frame of the main thread, which faulthandler prints last."""
    main = stacks.rpartition("Current thread" if "Current thread" in stacks else "Thread ")[2]
    found = re.search(r'File "([^"]+)", line (\d+) in (\S+)', main)
    return f"{found.group(1)}:{found.group(2)} in {found.group(3)}" if found else ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
