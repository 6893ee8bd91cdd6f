"""One table: what a pod's end means, and what is done about it. Knows nothing of what is on record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from finetune_api.contract import PEER_LOST, ExitCode, read_stage_result
from finetune_api.signatures import GPU_ERROR, Signature, recognise
from finetune_api.spec import FailureAction, FailureCause, FailurePolicy
from finetune_api.status import Restart

from ...model.job import PodView
from ...model.times import parse_time

Cause = FailureCause | Literal["Stopped"]
FROM_OUTSIDE: tuple[Cause, ...] = ("Stopped", "Disruption")


@dataclass(frozen=True)
class Failure:
    """Why a pod failed."""

    cause: Cause
    reason: str
    """CamelCase, for conditions."""
    message: str
    """For people."""
    pod: str
    node: str = ""
    exit_code: int | None = None

    @property
    def from_outside(self) -> bool:
        """Whether it was done to the pod: it does not count towards maxRestarts, and the others can still save."""
        return self.cause in FROM_OUTSIDE


_EVICTED = ("Evicted", "Preempting", "Terminated", "Shutdown", "NodeShutdown", "NodeLost", "NodeAffinity")
_BY_CODE: dict[int, Cause] = {
    ExitCode.USER_ERROR: "UserError",
    ExitCode.OUT_OF_MEMORY: "OutOfMemory",
    ExitCode.INFRASTRUCTURE: "Infrastructure",
    ExitCode.STOPPED: "Stopped",
    ExitCode.HANG: "Hang",
    ExitCode.SOURCE_UNAVAILABLE: "Infrastructure",
}
NEAR_SECONDS = 15
"""Failures of a gang within so many seconds belong together: most of them follow from the one that tells most."""
_SIGNALS = {137: "SIGKILL", 139: "SIGSEGV", 143: "SIGTERM", 134: "SIGABRT"}


def _cause(pod: PodView, shown: Signature | None) -> Cause:
    """Exit code, conditions, container state, words. A disruption looks like exit 137 too (KEP-3329), so it is asked for first."""
    told = _BY_CODE.get(pod.exit_code or 0)
    if told in ("UserError", "Stopped"):
        return told
    if pod.disrupted or pod.reason in _EVICTED:
        return "Disruption"
    if pod.reason == "OOMKilled":
        return "OutOfMemory"
    return told or (_BY_CODE[shown.code] if shown is not None else "Infrastructure")


def classify(pod: PodView) -> Failure:
    """The cause, reason and last words of a failed pod: exit code, conditions, container state, then what the log shows."""
    words = read_stage_result(pod.message)
    if words is not None:
        return Failure(_cause(pod, None), words.reason, words.message, pod.name, pod.node, pod.exit_code)
    shown = recognise(pod.message)
    cause = _cause(pod, shown)
    reason = {"OutOfMemory": "OutOfMemory", "Disruption": pod.eviction or "Disrupted"}.get(cause, shown.reason if shown else "PodFailed")
    end = f"exited {pod.exit_code}" if pod.exit_code is not None else "failed"
    if pod.exit_code in _SIGNALS:
        end += f" ({_SIGNALS[pod.exit_code]})"
    if pod.reason and pod.reason != "Error":
        end += f", {pod.reason}"
    if shown is not None:
        end += f": {shown.meaning}"
    tail = _tail(pod.message)
    message = f"pod {pod.name} {end}" + (f"; last words: {tail}" if tail else "")
    return Failure(cause, reason, message, pod.name, pod.node, pod.exit_code)


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
    telling = [f for f in near if f.cause in ("UserError", "OutOfMemory")]
    own = [f for f in near if f.reason != PEER_LOST]
    return (telling or own or near)[0]


def action_for(failure: Failure, policy: FailurePolicy | None) -> tuple[FailureAction, int | None]:
    """What is done about a failure, and the number of the user's rule that says so (from 1)."""
    for number, rule in enumerate(policy.rules if policy is not None else (), 1):
        codes = rule.on_exit_codes
        matches = (
            (not rule.on_causes or failure.cause in rule.on_causes)
            and (not rule.on_reasons or failure.reason in rule.on_reasons)
            and (codes is None or (failure.exit_code is not None and (failure.exit_code in codes.values) == (codes.operator == "In")))
        )
        if matches and failure.cause != "Stopped":  # what the operator asked for itself is no failure
            return rule.action, number
    if failure.cause == "UserError":
        return "FailJob", None
    return ("RestartGangAndIgnoreMaxRestarts" if failure.from_outside else "RestartGang"), None


_SUSPECT_SECONDS, _SUSPECT_FAILURES = 3600, 2


def suspects(restarts: Iterable[Restart], now: datetime) -> tuple[str, ...]:
    """Nodes to avoid for a while: a GPU's failure, or two failures of any jobs within an hour."""
    points: dict[str, int] = {}
    for restart in restarts:
        at = parse_time(restart.time)
        if not restart.node or restart.cause not in ("Infrastructure", "Hang") or restart.reason == PEER_LOST or at is None:
            continue
        if now - at < timedelta(seconds=_SUSPECT_SECONDS):
            points[restart.node] = points.get(restart.node, 0) + (_SUSPECT_FAILURES if restart.reason == GPU_ERROR else 1)
    return tuple(sorted(node for node, count in points.items() if count >= _SUSPECT_FAILURES))
