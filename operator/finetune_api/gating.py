"""What a gate's verdict means for publishing, said once for the operator and for `finetune run --local`. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from .evaluation_status import EvaluationStatus
from .spec import FineTuneJobSpec


@dataclass(frozen=True)
class ShutGate:
    """Why nothing is published."""

    reason: str
    message: str


def shut_gate(spec: FineTuneJobSpec, evaluation: EvaluationStatus | None) -> ShutGate | None:
    """Why nothing is published, or None where the gate lets the result pass."""
    if evaluation is None or evaluation.gate in ("Passed", "None"):
        return None
    if evaluation.gate == "NotPassed":
        return ShutGate("GateNotPassed", "the gate did not pass")
    gate = spec.evaluation.gate if spec.evaluation is not None else None
    if gate is not None and gate.on_inconclusive == "publish":
        return None
    return ShutGate("GateInconclusive", "the gate could not tell")
