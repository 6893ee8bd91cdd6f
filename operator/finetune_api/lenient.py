"""Reading a status that people, or another release, may have written: what cannot be read is left out, and nothing fails."""

from __future__ import annotations

from typing import Any, TypeVar

from .base import APIModel
from .status import FineTuneJobStatus, Status

S = TypeVar("S", bound=Status)


def read_status(raw: Any) -> FineTuneJobStatus:
    """Read a job's status leniently: whatever a user or another version wrote there, an operator must go on."""
    return read(FineTuneJobStatus, raw)


def read(model: type[S], raw: Any) -> S:
    """The same of any kind."""
    if not isinstance(raw, dict):
        return model()
    try:
        return model.model_validate(raw)
    except ValueError:
        pass
    kept: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        wire = field.alias or name
        if wire in raw:
            value = raw[wire]
            if isinstance(value, list):  # one condition that cannot be read takes no other with it
                value = [item for item in value if _is_readable(model, wire, [item])]
            if _is_readable(model, wire, value):
                kept[wire] = value
    return model.model_validate(kept)


def rewritten(raw: Any, before: APIModel, after: APIModel) -> dict[str, Any]:
    """The status to write where `raw` stands, which was read as `before`.

    Fields that this release does not know were written by another one. They stay, also inside of what has not changed; what
    has changed is this release's own, and says nothing of what the other one said of it.
    """
    old, new = before.to_wire(), after.to_wire()
    if not isinstance(raw, dict):
        return new
    known = {field.alias or name for name, field in type(after).model_fields.items()}
    others = {name: value for name, value in raw.items() if name not in known}
    return {**others, **{name: _with_unknown(raw.get(name), value) if old.get(name) == value else value for name, value in new.items()}}


def _with_unknown(raw: Any, wire: Any) -> Any:
    """What was read and has not changed, with what was not understood of it."""
    if isinstance(raw, dict) and isinstance(wire, dict):
        return {**raw, **{name: _with_unknown(raw.get(name), value) for name, value in wire.items()}}
    if isinstance(raw, list) and isinstance(wire, list) and len(raw) == len(wire):
        return [_with_unknown(*pair) for pair in zip(raw, wire, strict=True)]
    return wire


def _is_readable(model: type[APIModel], field: str, value: Any) -> bool:
    try:
        model.model_validate({field: value})
    except ValueError:
        return False
    return True
