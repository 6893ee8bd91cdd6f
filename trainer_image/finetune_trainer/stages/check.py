"""check: whether the targets will take the result, asked with publish's own secrets and volumes before a GPU is taken.

    python -m finetune_trainer check --job job.json --workspace DIR

Runs beside prepare and sees neither the workspace nor the sources.
"""

from __future__ import annotations

from finetune_api.contract import RESTORED, StageResult

from ..export.targets import check_targets
from ..job.context import Context
from ..process.errors import combine


def check(context: Context) -> StageResult:
    """Run the stage. Every target is asked; nothing is written. What only writing shows is left to publish."""
    held, failed = check_targets(context)
    if failed:
        raise combine(failed, "; no GPU was taken")
    targets = ", ".join(target.address for target in context.spec.publish)
    if held and len(held) == len(context.spec.publish):
        message = (
            f"{targets}: this job's result is there already, from before its status was lost; "
            "where its rows or weights have changed since, remove it to train anew"
        )
        result = {"artifacts": [one.artifact.to_wire() for one in held]}
        if forms := next((one.forms for one in held if one.forms), []):  # they are the same everywhere
            result["forms"] = [form.to_wire() for form in forms]
        return StageResult(reason=RESTORED, message=message, result=result)
    return StageResult(reason="TargetsReady", message=targets)
