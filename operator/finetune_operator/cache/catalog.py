"""The newest report of each FineTunedModel's catalog pods, in memory until it is on record. Knows nothing of who may report.

An operator that dies before loses it: the Job has then ended without one, and is run again.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.contract import CatalogReport


@dataclass(frozen=True)
class Reported:
    """A report, and the name of the Job whose pod sent it."""

    report: CatalogReport
    by: str


class CatalogBoard:
    """By the UID of the FineTunedModel."""

    def __init__(self) -> None:
        self._latest: dict[str, Reported] = {}

    def put(self, uid: str, reported: Reported) -> None:
        """Remember a report in the place of an earlier one."""
        self._latest[uid] = reported

    def latest(self, uid: str) -> Reported | None:
        """The newest that is not on record."""
        return self._latest.get(uid)

    def taken(self, uid: str, report: CatalogReport | None) -> None:
        """A report is on record, or says nothing new; one that has come since stays."""
        if (known := self._latest.get(uid)) is not None and known.report is report:
            del self._latest[uid]

    def forget(self, uid: str) -> None:
        """The object is gone."""
        self._latest.pop(uid, None)
