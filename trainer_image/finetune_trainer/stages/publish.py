"""publish: write the result with its model card and lineage to every target, and verify it.

    python -m finetune_trainer publish --job job.json --workspace DIR

Needs no GPU. Knows nothing of how the result was trained: what `output/` holds is what is published.
"""

from __future__ import annotations

from finetune_api.contract import StageResult
from finetune_api.status import Artifact
from finetune_api.uris import parse_uri

from ..export.bucket import publish_to_bucket
from ..export.bundle import make_bundle
from ..export.hub import publish_to_hub
from ..export.volume import publish_to_volume
from ..job.context import Context
from ..process.errors import InfrastructureError, StageError, UserError, combine


def publish(context: Context) -> StageResult:
    """Run the stage. Every target is tried; those that fail are named, those that succeeded stay."""
    bundle = make_bundle(context)
    done: list[Artifact] = []
    failed: list[tuple[str, StageError]] = []
    for index, target in enumerate(context.spec.publish):
        uri = parse_uri(target.uri)
        try:
            if uri.scheme == "pvc":
                done.append(publish_to_volume(context, bundle, uri, target.uri))
            elif uri.scheme == "s3":
                done.append(publish_to_bucket(context, bundle, target, f"publish-{index}"))
            else:
                done.append(publish_to_hub(context, bundle, uri, target.uri, context.secret(f"publish-{index}")))
        except (UserError, InfrastructureError) as failure:
            failed.append((target.uri, failure))
    if failed:
        raise combine(failed, f"; published: {', '.join(a.uri for a in done)}" if done else "")
    where = ", ".join(a.uri for a in done)
    return StageResult(reason="Published", message=f"published to {where}", result={"artifacts": [a.to_wire() for a in done]})
