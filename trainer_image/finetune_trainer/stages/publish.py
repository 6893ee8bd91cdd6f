"""publish: write the result with its model card and lineage to every target, and verify it.

    python -m finetune_trainer publish --job job.json --workspace DIR

Needs no GPU. Knows nothing of how the result was trained: what `output/` holds is what is published.
"""

from __future__ import annotations

from functools import partial

from finetune_api.contract import StageResult

from ..export.bundle import make_bundle
from ..export.hub import publish_to_hub
from ..export.targets import for_each_target
from ..export.volume import publish_to_volume
from ..job.context import Context
from ..process.errors import combine


def publish(context: Context) -> StageResult:
    """Run the stage. Every target is tried; those that fail are named, those that succeeded stay."""
    bundle = make_bundle(context)
    done, failed = for_each_target(context, partial(publish_to_volume, bundle=bundle), partial(publish_to_hub, bundle=bundle))
    if failed:
        raise combine(failed, f"; published: {', '.join(a.uri for a in done)}" if done else "")
    where = ", ".join(a.uri for a in done)
    return StageResult(reason="Published", message=f"published to {where}", result={"artifacts": [a.to_wire() for a in done]})
