"""check: whether the targets will take the result, asked with publish's own secrets and volumes before a GPU is taken.

    python -m finetune_trainer check --job job.json --workspace DIR

Runs beside prepare and sees neither the workspace nor the sources.
"""

from __future__ import annotations

from finetune_api.contract import StageResult
from finetune_api.uris import parse_uri

from ..export.hub import check_hub
from ..export.volume import check_volume
from ..job.context import Context
from ..process.errors import InfrastructureError, StageError, UserError, combine


def check(context: Context) -> StageResult:
    """Run the stage. Every target is asked; nothing is written. What only writing shows is left to publish."""
    failed: list[tuple[str, StageError]] = []
    for index, target in enumerate(context.spec.publish):
        uri = parse_uri(target.uri)
        try:
            if uri.scheme == "pvc":
                check_volume(context, uri)
            else:
                check_hub(context, uri, context.secret(f"publish-{index}"))
        except (UserError, InfrastructureError) as failure:
            failed.append((target.uri, failure))
    if failed:
        raise combine(failed, "; no GPU was taken")
    return StageResult(reason="TargetsReady", message=", ".join(target.uri for target in context.spec.publish))
