"""The Hugging Face hub as a target: one commit, read back; another job's repository is never overwritten."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from finetune_api.status import Artifact
from finetune_api.uris import URI

from ..job.context import Context
from ..process.errors import InfrastructureError, UserError
from ..remote.retry import hub_host, with_retries
from .bundle import LINEAGE, artifact, files


def check_hub(context: Context, uri: URI, token: str | None) -> None:
    """Raise UserError or SourceUnavailable when `publish_to_hub` would fail; writes nothing."""
    api = HfApi(token=token)
    with_retries(lambda: _refuse_foreign(api, uri.name, context), hub_host(), _refused(uri))
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
        return with_retries(ask, hub_host(), _refused(uri))
    except OSError:
        return {}


def publish_to_hub(context: Context, bundle: Path, uri: URI, shown: str, token: str | None) -> Artifact:
    """One commit with all files; then read their digests back."""
    try:
        present = with_retries(lambda: _commit(context, bundle, uri, token), hub_host(), _refused(uri))
    except (OSError, HfHubHTTPError) as failure:
        raise InfrastructureError("PublishFailed", f"the hub did not take it: {failure}") from failure
    missing = {str(p.relative_to(bundle)) for p in files(bundle)} - present
    if missing:
        raise InfrastructureError("VerificationFailed", f"not uploaded: {', '.join(sorted(missing))}")
    return artifact(bundle, shown)


def _commit(context: Context, bundle: Path, uri: URI, token: str | None) -> set[str]:
    """Write, unless the repository holds another job's result; the files that are there then."""
    api = HfApi(token=token)
    api.create_repo(uri.name, exist_ok=True, private=True)
    _refuse_foreign(api, uri.name, context)
    api.upload_folder(repo_id=uri.name, folder_path=str(bundle), commit_message=f"finetune-operator job {context.job.name}")
    return set(api.list_repo_files(uri.name))


def _refuse_foreign(api: HfApi, name: str, context: Context) -> None:
    """Raise UserError when a repository of the hub holds another job's result."""
    try:
        if not api.file_exists(name, LINEAGE):
            return
    except HfHubHTTPError as failure:  # a mirror need not say what it is that it does not have
        if failure.response.status_code != 404:
            raise
        return
    owner = json.loads(Path(api.hf_hub_download(name, LINEAGE, cache_dir=f"{context.layout.cache}/hub")).read_text())["job"]
    if owner.get("uid") != context.job.uid:
        told = f"the repository holds the result of job {owner.get('namespace')}/{owner.get('name')}; choose another name"
        raise UserError("TargetTaken", told)


def _refused(uri: URI) -> Callable[[str], UserError]:
    """What it means that the hub refuses a repository."""
    return lambda why: UserError("PublishRefused", f"{why}: the token may not write there, or the owner of {uri.name} does not exist")
