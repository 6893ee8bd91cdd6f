"""Which version is the champion: what the spec pins, else what spec.promotion makes of the versions' comparisons.

Knows nothing of where versions are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune_api.tuned_model import FineTunedModelSpec, ModelVersion
from finetune_api.versions import VersionState


@dataclass(frozen=True)
class Decision:
    """States by number, and why. Of versions that are not named nothing changes."""

    champion: int | None
    states: dict[int, tuple[VersionState, str]]
    pin_missing: bool = False
    """spec.champion names a version that is not kept: the present champion stays."""


def present_champion(champion: int | None, versions: Sequence[ModelVersion]) -> int | None:
    """Who is the champion on record: by the status, else by the versions' own states, of which a write that broke off may leave two."""
    numbers = {version.number for version in versions}
    if champion in numbers:
        return champion
    return max((version.number for version in versions if version.state == "Champion"), default=None)


def decide(champion: int | None, versions: Sequence[ModelVersion], spec: FineTunedModelSpec) -> Decision:
    """Level-triggered: what was decided is left alone, and a version that was passed over waits for somebody to pin it."""
    by_number = {version.number: version for version in versions}
    present = present_champion(champion, versions)
    states: dict[int, tuple[VersionState, str]] = {}

    def crown(number: int, why: str) -> None:
        nonlocal present
        if present is not None and present != number:
            states[present] = "Retired", f"version {number} took over"
        states[number] = "Champion", why
        present = number

    pinned = spec.champion
    if pinned in by_number and pinned is not None:
        if present != pinned or by_number[pinned].state != "Champion":
            crown(pinned, "spec.champion names it")
    elif pinned is None:
        for version in sorted(versions, key=lambda v: v.number):
            if version.state != "Candidate":
                continue
            state, why = judged(version, present, spec.promotion)
            if state == "Champion":
                crown(version.number, why)
            else:
                states[version.number] = state, why
    else:
        why = f"spec.champion names version {pinned}, which is not kept"
        states |= {v.number: ("Candidate", why) for v in versions if v.state == "Candidate"}
    if pinned in by_number:
        waits = f"spec.champion pins version {pinned}; {_promote('another')}"
        states |= {v.number: ("Candidate", waits) for v in versions if v.state == "Candidate" and v.number != pinned}
    if present is not None:
        if present not in states and by_number[present].state != "Champion":
            states[present] = "Champion", by_number[present].message
        others = [v.number for v in versions if v.state == "Champion" and v.number != present and v.number not in states]
        states |= dict.fromkeys(others, ("Retired", f"version {present} is the champion"))
    return Decision(present, states, pin_missing=pinned is not None and pinned not in by_number)


def judged(version: ModelVersion, present: int | None, promotion: str) -> tuple[VersionState, str]:
    """What becomes of a candidate, beside the present champion, where nothing is pinned."""
    if promotion == "Manual":
        return "Candidate", f"spec.promotion is Manual; {_promote(version.number)}"
    if promotion == "Always":
        if present is None or version.number > present:
            return "Champion", "spec.promotion is Always"
        return "Candidate", f"version {present} is newer; {_promote(version.number)}"
    evaluation = version.evaluation
    if present is None:
        if evaluation is not None and evaluation.gate == "NotPassed":
            return "Candidate", f"its job's gate did not pass; {_promote(version.number)}"
        return "Champion", "it is the first version"
    compared = evaluation.champion if evaluation is not None else None
    if compared is None:
        why = "its job has no evaluation" if evaluation is None else "its evaluation compared it with none"
        return "Candidate", f"not compared with version {present}, the champion: {why}; {_promote(version.number)}"
    if compared.version != present:
        return "Candidate", (
            f"compared with version {compared.version}, and version {present} is the champion now; {_promote(version.number)}"
        )
    found = f"{compared.metric} differs by {compared.improvement:.4g}" if compared.improvement is not None else "no difference is known"
    if len(compared.interval) == 2:
        found = f"{found} ({compared.interval[0]:.4g} to {compared.interval[1]:.4g})"
    told = f"{found} from version {present} on {compared.prompts} held-out prompts that neither learned from"
    if compared.result == "Passed":
        return "Champion", f"measurably better: {told}"
    if compared.result == "NotPassed":
        return "Rejected", f"not better: {told}"
    why = compared.message or f"it cannot be told: {told}"
    return "Candidate", f"inconclusive: {why}; {_promote(version.number)}"


def _promote(number: int | str) -> str:
    return f"to promote it set spec.champion: {number}" if isinstance(number, int) else f"name {number} there to promote it"
