"""check: whether the targets will take the result, asked with publish's own secrets and volumes before a GPU is taken."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from finetune_api.contract import StageResult
from finetune_api.uris import URI, parse_uri

from ..job.context import Context
from ..process.errors import InfrastructureError, StageError, UserError
from ..remote.retry import hub_host, patiently
from .publish import refusal, refuse_foreign, refuse_foreign_repository, together


def check(context: Context) -> StageResult:
    """Run the stage. Every target is asked; nothing is written. What only writing shows is left to publish."""
    bad: list[tuple[str, StageError]] = []
    for index, target in enumerate(context.spec.publish):
        uri = parse_uri(target.uri)
        try:
            if uri.scheme == "pvc":
                _volume(context, uri)
            else:
                _hub(context, uri, context.secret(f"publish-{index}"))
        except (UserError, InfrastructureError) as failure:
            bad.append((target.uri, failure))
    if bad:
        raise together(bad, "; no GPU was taken")
    return StageResult(reason="TargetsReady", message=", ".join(target.uri for target in context.spec.publish))


def _volume(context: Context, uri: URI) -> None:
    target = context.target(uri)
    refuse_foreign(target, context)
    folder = next(p for p in target.parents if p.exists())
    if not _writable(folder):
        message = f"{folder.name or folder} in claim {uri.name} cannot be written by uid {os.getuid()}: give it to this user or group"
        raise InfrastructureError("TargetNotWritable", message)


def _writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _hub(context: Context, uri: URI, token: str | None) -> None:
    api = HfApi(token=token)
    patiently(lambda: refuse_foreign_repository(api, uri.name, context), hub_host(), refusal(uri))
    if (_account(api, uri).get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise UserError("PublishRefused", "the token may only read: make one that may write")


def _account(api: HfApi, uri: URI) -> dict[str, Any]:
    """Whose token it is; empty where a mirror does not say."""

    def ask() -> dict[str, Any]:
        try:
            return dict(api.whoami())
        except HfHubHTTPError as failure:
            if failure.response.status_code != 404:
                raise
            return {}

    try:
        return patiently(ask, hub_host(), refusal(uri))
    except OSError:
        return {}
