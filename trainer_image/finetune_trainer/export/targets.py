"""The places that a job publishes to, one after the other. Knows nothing of what is done there."""

from __future__ import annotations

from collections.abc import Callable

from finetune_api.status import Artifact
from finetune_api.uris import URI, parse_uri

from ..job.context import Context
from ..process.errors import InfrastructureError, StageError, UserError

Failed = list[tuple[str, StageError]]
"""(target, why)"""


def for_each_target(
    context: Context,
    volume: Callable[[Context, URI, str], Artifact | None],
    hub: Callable[[Context, URI, str, str | None], Artifact | None],
) -> tuple[list[Artifact], Failed]:
    """What is found or made at each target, and those that failed: one that fails keeps nobody from the others.

    `volume` and `hub` take the target's URI, parsed and as it is written; `hub` its token, too.
    """
    done: list[Artifact] = []
    failed: Failed = []
    for index, target in enumerate(context.spec.publish):
        uri = parse_uri(target.uri)
        try:
            if uri.scheme == "pvc":
                found = volume(context, uri, target.uri)
            else:
                found = hub(context, uri, target.uri, context.secret(f"publish-{index}"))
            done += [found] if found is not None else []
        except (UserError, InfrastructureError) as failure:
            failed.append((target.uri, failure))
    return done, failed
