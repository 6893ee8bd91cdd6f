"""The newest progress report of each job, in memory: coalesced here, written to the status by the controller.

Knows nothing of who may report.
"""

from __future__ import annotations

from datetime import datetime

from finetune_api.contract import ProgressReport


class ProgressBoard:
    """Newest report wins; a report of an older attempt or an earlier step is ignored."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[ProgressReport, datetime]] = {}

    def put(self, job_uid: str, report: ProgressReport, now: datetime) -> bool:
        """Remember a report. Returns whether it was news."""
        known = self._latest.get(job_uid)
        if known is not None and (report.attempt, report.step) < (known[0].attempt, known[0].step):
            return False
        self._latest[job_uid] = (report, now)
        return True

    def latest(self, job_uid: str) -> tuple[ProgressReport, datetime] | None:
        """The newest report and when it came."""
        return self._latest.get(job_uid)

    def forget(self, job_uid: str) -> None:
        """The job is gone."""
        self._latest.pop(job_uid, None)
