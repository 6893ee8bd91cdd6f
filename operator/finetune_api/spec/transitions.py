"""What of a FineTuneJob may change, and when. Said once: API servers refuse the rest by an admission policy (crd.py), and an
operator ignores what got past it (a status that was wiped, a policy of another version or none).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..status import ConditionType

HOLDS: tuple[ConditionType, ...] = ("Admitted", "Trained", "Succeeded", "Failed")
"""While one of these is True the gang's shape is what its GPUs were given for, or what its result was made with."""
_ANOTHER = "undo the change, or create another job; its tuning.continueFrom can go on from this one's result"


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A field of the spec that may not change: never, or not while the job holds GPUs."""

    field: str
    """Its name below `spec`."""
    but: tuple[str, ...] = ()
    """Fields of it that may change at any time."""
    parts: tuple[str, ...] = ()
    """All its other fields, where some may change."""
    required: bool = False
    """It is always there; others may be absent."""
    while_held: bool = False
    """It may change as long as the job holds no GPUs."""

    @property
    def path(self) -> str:
        """For people."""
        return f"spec.{self.field}"

    @property
    def message(self) -> str:
        """Which field, and what to do."""
        if not self.while_held:
            return f"{self.path} cannot change: {_ANOTHER}"
        freely = f" ({' and '.join(self.but)} may at any time)" if self.but else ""
        return (
            f"{self.path} can change only while the job holds no GPUs{freely}: set runPolicy.suspend to true, wait until the "
            f"condition Admitted is False, then change it; or {_ANOTHER}"
        )

    def to_cel(self) -> dict[str, str]:
        """A validation of a ValidatingAdmissionPolicy, which sees the whole job as it was and as it is to be."""
        if self.parts:
            same = " && ".join(_same(f"spec.{self.field}.{part}") for part in self.parts)
        else:
            same = f"object.spec.{self.field} == oldObject.spec.{self.field}" if self.required else _same(f"spec.{self.field}")
        return {"expression": f"oldObject == null || {_FREE + ' || ' if self.while_held else ''}({same})", "message": self.message}

    def changed(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
        """Whether the field differs between two specs on the wire, besides what may change at any time."""

        def kept(spec: Mapping[str, Any]) -> Any:
            value = spec.get(self.field)
            return {k: v for k, v in value.items() if k not in self.but} if self.but and isinstance(value, Mapping) else value

        return bool(kept(old) != kept(new))


def _same(path: str) -> str:
    return f"has(object.{path}) == has(oldObject.{path}) && (!has(object.{path}) || object.{path} == oldObject.{path})"


_FREE = (
    "!has(oldObject.status) || !has(oldObject.status.conditions) || "
    f"!oldObject.status.conditions.exists(c, c.status == 'True' && c.type in [{', '.join(repr(t) for t in HOLDS)}])"
)

FROZEN = (
    Frozen(field="model", required=True),
    Frozen(field="dataset", required=True),
    Frozen(field="tuning"),
    Frozen(field="checkpoint"),
    Frozen(field="workspace"),
    Frozen(field="evaluation"),
    Frozen(field="output"),
    Frozen(field="publish"),
    Frozen(field="managedBy"),
    Frozen(field="distribution", while_held=True),
    Frozen(field="resources", while_held=True),
    Frozen(
        field="scheduling",
        but=("queue", "priorityClassName"),
        parts=("nodeSelector", "tolerations", "topologyKey"),
        while_held=True,
    ),
)
"""What may change at any time is left: `runPolicy`, and with it queue and priority."""
