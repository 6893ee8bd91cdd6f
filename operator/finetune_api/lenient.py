"""Reading a status that people, or another release, may have written: what cannot be read is left out, and nothing fails."""

from __future__ import annotations

from typing import Any

from .status import FineTuneJobStatus


def read_status(raw: Any) -> FineTuneJobStatus:
    """Read a status leniently: whatever a user or another version wrote there, an operator must go on."""
    if not isinstance(raw, dict):
        return FineTuneJobStatus()
    try:
        return FineTuneJobStatus.model_validate(raw)
    except ValueError:
        pass
    kept: dict[str, Any] = {}
    for name, field in FineTuneJobStatus.model_fields.items():
        wire = field.alias or name
        if wire in raw:
            value = raw[wire]
            if isinstance(value, list):  # one condition that cannot be read takes no other with it
                value = [item for item in value if _is_readable(wire, [item])]
            if _is_readable(wire, value):
                kept[wire] = value
    return FineTuneJobStatus.model_validate(kept)


def unknown_fields(raw: Any) -> dict[str, Any]:
    """Fields of a status that this release does not know: another release wrote them, and they are left as they are."""
    known = {field.alias or name for name, field in FineTuneJobStatus.model_fields.items()}
    return {name: value for name, value in raw.items() if name not in known} if isinstance(raw, dict) else {}


def _is_readable(field: str, value: Any) -> bool:
    try:
        FineTuneJobStatus.model_validate({field: value})
    except ValueError:
        return False
    return True
