"""Which versions are not kept any more. Knows nothing of how files are removed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime

from finetune_api.scalars import seconds
from finetune_api.tuned_model import MOST_VERSIONS, ModelVersion, Retention

from ...model.times import parse_time


def outdated(versions: Sequence[ModelVersion], retention: Retention, protected: Collection[int], now: datetime) -> list[int]:
    """Numbers of versions to remove: beyond the newest so many, or too old. Those that are protected are never among them."""
    newest = sorted((version.number for version in versions), reverse=True)
    beyond = [number for number in newest[retention.versions :] if number not in protected]
    spare = len(newest) - len(beyond) - MOST_VERSIONS  # what is protected counts where a status has no more room
    if spare > 0:
        kept = [number for number in newest if number not in protected and number not in beyond]
        beyond += kept[::-1][:spare]
    limit = seconds(retention.age) if retention.age is not None else None
    old = [
        version.number
        for version in versions
        if limit is not None
        and version.number not in protected
        and (created := parse_time(version.created_at)) is not None
        and (now - created).total_seconds() > limit
    ]
    return sorted({*beyond, *old})


def next_end(versions: Sequence[ModelVersion], retention: Retention, now: datetime) -> float | None:
    """Seconds until the next version is too old."""
    if retention.age is None:
        return None
    limit = seconds(retention.age)
    left = [limit - (now - created).total_seconds() for v in versions if (created := parse_time(v.created_at)) is not None]
    return min((some for some in left if some > 0), default=None)
