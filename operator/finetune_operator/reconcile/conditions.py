"""PURE: conditions by the Kubernetes API conventions, of any kind's status. Knows nothing of what they say."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from finetune_api.base import shortened
from finetune_api.scalars import printable
from finetune_api.status import Condition, Status

from ..model.times import rfc3339

_MESSAGE_LIMIT = 4000


def set_condition(
    status: Status,
    type_: str,
    value: Literal["True", "False", "Unknown"],
    reason: str,
    message: str = "",
    *,
    now: datetime,
    generation: int,
) -> None:
    """Set one; its transition time moves only when its status changes."""
    message = printable(shortened(message, _MESSAGE_LIMIT))
    old = status.condition(type_)
    moved = old is None or old.status != value
    if old is not None and not moved and (old.reason, old.message) == (reason, message):
        return
    new = Condition(
        type=type_,
        status=value,
        reason=reason,
        message=message,
        last_transition_time=rfc3339(now) if moved or old is None else old.last_transition_time,
        observed_generation=generation,
    )
    status.conditions = [new if c.type == type_ else c for c in status.conditions]
    if old is None:
        status.conditions.append(new)
