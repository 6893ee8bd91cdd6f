"""publish: write the result with its model card and lineage to every target, and verify it.

    python -m finetune_trainer publish --job job.json --workspace DIR

Needs no GPU. Knows nothing of how the result was trained: what `output/` holds is what is published.
"""

from __future__ import annotations

from finetune_api.contract import StageResult

from ..export.bundle import make_bundle
from ..export.targets import publish_to_targets
from ..job.context import Context
from ..process.errors import combine


def publish(context: Context) -> StageResult:
    """Run the stage. Every target is tried; those that fail are named, those that succeeded stay."""
    done, failed = publish_to_targets(context, make_bundle(context))
    if failed:
        raise combine(failed, f"; published: {', '.join(a.uri for a in done)}" if done else "")
    where = ", ".join(a.uri for a in done)
    result = {"artifacts": [a.to_wire() for a in done]}
    if forms := context.read_json(context.layout.forms_report):
        result["forms"] = forms
    return StageResult(reason="Published", message=f"published to {where}", result=result)
