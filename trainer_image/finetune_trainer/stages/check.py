"""check: whether the targets will take the result, asked with publish's own secrets and volumes before a GPU is taken.

    python -m finetune_trainer check --job job.json --workspace DIR

Runs beside prepare and sees neither the workspace nor the sources.
"""

from __future__ import annotations

from finetune_api.contract import RESTORED, StageResult
from finetune_api.status import Artifact
from finetune_api.uris import parse_uri

from ..export.bucket import check_bucket
from ..export.hub import check_hub
from ..export.volume import check_volume
from ..job.context import Context
from ..process.errors import InfrastructureError, StageError, UserError, combine


def check(context: Context) -> StageResult:
    """Run the stage. Every target is asked; nothing is written. What only writing shows is left to publish."""
    held: list[Artifact] = []
    failed: list[tuple[str, StageError]] = []
    for index, target in enumerate(context.spec.publish):
        uri = parse_uri(target.uri)
        try:
            if uri.scheme == "pvc":
                found = check_volume(context, uri, target.uri)
            elif uri.scheme == "s3":
                found = check_bucket(context, target, f"publish-{index}")
            else:
                found = check_hub(context, uri, context.secret(f"publish-{index}"), target.uri)
            held += [found] if found is not None else []
        except (UserError, InfrastructureError) as failure:
            failed.append((target.uri, failure))
    if failed:
        raise combine(failed, "; no GPU was taken")
    targets = ", ".join(target.uri for target in context.spec.publish)
    if held and len(held) == len(context.spec.publish):
        message = (
            f"{targets}: this job's result is there already, from before its status was lost; "
            "where its rows or weights have changed since, remove it to train anew"
        )
        return StageResult(reason=RESTORED, message=message, result={"artifacts": [a.to_wire() for a in held]})
    return StageResult(reason="TargetsReady", message=targets)
