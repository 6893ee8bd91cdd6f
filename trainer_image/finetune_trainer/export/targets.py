"""The places that a job publishes to, one after the other, each by its scheme. Knows nothing of what a scheme does there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from finetune_api.spec import PublishTarget
from finetune_api.status import Artifact
from finetune_api.uris import parse_uri

from ..job.context import Context
from ..process.errors import InfrastructureError, StageError, UserError
from .bucket import check_bucket, publish_to_bucket
from .bundle import Held
from .hub import check_hub, publish_to_hub
from .mlflow import check_mlflow, publish_to_mlflow
from .registry import check_registry, publish_to_registry
from .versions import check_model, publish_to_model
from .volume import check_volume, publish_to_volume

T = TypeVar("T")
Failed = list[tuple[str, StageError]]
"""(target, why)"""
_CHECK = {"pvc": check_volume, "hf": check_hub, "s3": check_bucket, "oci": check_registry, "mlflow": check_mlflow, "model": check_model}
_PUBLISH = {
    "pvc": publish_to_volume,
    "hf": publish_to_hub,
    "s3": publish_to_bucket,
    "oci": publish_to_registry,
    "mlflow": publish_to_mlflow,
    "model": publish_to_model,
}


def check_targets(context: Context) -> tuple[list[Held], Failed]:
    """This job's results that are there already, and the targets that will not take one. Writes nothing."""
    return _each(context, lambda target, field: _CHECK[parse_uri(target.address).scheme](context, target, field))


def publish_to_targets(context: Context, bundle: Path) -> tuple[list[Artifact], Failed]:
    """What was published, and the targets that did not take it."""
    return _each(context, lambda target, field: _PUBLISH[parse_uri(target.address).scheme](context, target, field, bundle))


def _each(context: Context, act: Callable[[PublishTarget, str], T | None]) -> tuple[list[T], Failed]:
    """A target that fails keeps nobody from the others. `act` takes a target and the field of its secret."""
    done: list[T] = []
    failed: Failed = []
    for index, target in enumerate(context.spec.publish):
        try:
            found = act(target, f"publish-{index}")
            done += [found] if found is not None else []
        except (UserError, InfrastructureError) as failure:
            failed.append((target.address, failure))
    return done, failed
