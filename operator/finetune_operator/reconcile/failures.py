"""One table: what a pod's end means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from finetune_api.contract import PEER_LOST, ExitCode, read_stage_result

from .model import PodView

FailureClass = Literal["UserError", "OutOfMemory", "Stopped", "Disruption", "Infrastructure"]


@dataclass(frozen=True)
class Failure:
    """Why a pod failed."""

    kind: FailureClass
    reason: str
    """CamelCase, for conditions."""
    message: str
    """For people."""
    pod: str

    @property
    def counted(self) -> bool:
        """Whether it counts towards maxRestarts: what was done to the pod from outside does not."""
        return self.kind not in ("Stopped", "Disruption")


#: first match wins; a disruption looks like exit 137 too, so it is asked for before the exit code (KEP-3329)
_TABLE: tuple[tuple[Callable[[PodView], bool], FailureClass], ...] = (
    (lambda p: p.exit_code == ExitCode.USER_ERROR, "UserError"),
    (lambda p: p.exit_code == ExitCode.STOPPED, "Stopped"),
    (lambda p: p.disrupted, "Disruption"),
    (lambda p: p.reason in ("Evicted", "Preempting", "Terminated", "Shutdown", "NodeShutdown", "NodeLost"), "Disruption"),
    (lambda p: p.exit_code == ExitCode.OUT_OF_MEMORY or p.reason == "OOMKilled", "OutOfMemory"),
    (lambda p: True, "Infrastructure"),
)
NEAR_SECONDS = 15
"""Failures of a gang within so many seconds belong together: most of them follow from the one that tells most."""
_SIGNALS = {137: "SIGKILL", 139: "SIGSEGV", 143: "SIGTERM", 134: "SIGABRT"}


def classify(pod: PodView) -> Failure:
    """The class, reason and last words of a failed pod."""
    kind = next(kind for matches, kind in _TABLE if matches(pod))
    words = read_stage_result(pod.message)
    if words is not None:
        return Failure(kind, words.reason, words.message, pod.name)
    reason = {"OutOfMemory": "OutOfMemory", "Disruption": "Disrupted"}.get(kind, "PodFailed")
    end = f"exited {pod.exit_code}" if pod.exit_code is not None else "failed"
    if pod.exit_code in _SIGNALS:
        end += f" ({_SIGNALS[pod.exit_code]})"
    if pod.reason and pod.reason != "Error":
        end += f", {pod.reason}"
    tail = _tail(pod.message)
    return Failure(kind, reason, f"pod {pod.name} {end}" + (f"; last words: {tail}" if tail else ""), pod.name)


def _tail(text: str, limit: int = 1000) -> str:
    text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text).strip()
    return text if len(text) <= limit else "... " + text[-limit:]


def first_failure(pods: list[PodView]) -> Failure:
    """The failure of the pod that ended first: the others usually fail because of it.

    A user error or a lack of memory explains more than the broken connections it leaves behind, so it wins
    within the same few seconds.
    """
    ordered = sorted(pods, key=lambda p: (p.finished or p.created, p.rank))
    first = ordered[0].finished or ordered[0].created
    near = [classify(p) for p in ordered if ((p.finished or p.created) - first).total_seconds() <= NEAR_SECONDS]
    telling = [f for f in near if f.kind in ("UserError", "OutOfMemory")]
    own = [f for f in near if f.reason != PEER_LOST]
    return (telling or own or near)[0]
