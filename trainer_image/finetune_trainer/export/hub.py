"""The Hugging Face hub as a target: one commit, read back; another job's repository is never overwritten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from finetune_api.contract import LINEAGE, SUMS
from finetune_api.spec import PublishTarget
from finetune_api.status import Artifact
from finetune_api.uris import URI, parse_uri

from ..job.context import Context
from ..process.errors import InfrastructureError, UserError
from ..remote.retry import hub_host, with_retries
from .bundle import Held, artifact, artifact_of, files, refuse_foreign


def check_hub(context: Context, target: PublishTarget, field: str) -> Held | None:
    """This job's result where the repository holds it already. Writes nothing.

    Raises UserError or SourceUnavailable when `publish_to_hub` would fail.
    """
    uri, api = parse_uri(target.address), HfApi(token=context.secret(field))
    found = with_retries(lambda: _held(api, uri.name, context, target.address), hub_host(), _refused(uri))
    if found is not None:
        return found
    if (_account(api, uri).get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise UserError("PublishRefused", "the token may only read: make one that may write")
    return None


def _held(api: HfApi, name: str, context: Context, shown: str) -> Held | None:
    """This job's result, which came there whole, in one commit. Raises UserError when it is another's."""
    record = _own_record(api, name, context)
    if record is None or not api.file_exists(name, SUMS):
        return None
    sums = Path(api.hf_hub_download(name, SUMS, cache_dir=f"{context.layout.cache}/hub")).read_bytes()
    size = sum(file.size or 0 for file in api.model_info(name, files_metadata=True).siblings or ())
    return Held(artifact_of(sums, size, shown), record)


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


def publish_to_hub(context: Context, target: PublishTarget, field: str, bundle: Path) -> Artifact:
    """One commit with all files; then look at what is there."""
    uri = parse_uri(target.address)
    try:
        present = with_retries(lambda: _commit(context, bundle, uri, context.secret(field)), hub_host(), _refused(uri))
    except (OSError, HfHubHTTPError) as failure:
        raise InfrastructureError("PublishFailed", f"the hub did not take it: {failure}") from failure
    missing = {str(p.relative_to(bundle)) for p in files(bundle)} - present
    if missing:
        raise InfrastructureError("VerificationFailed", f"not uploaded: {', '.join(sorted(missing))}")
    return artifact(bundle, target.address)


def _commit(context: Context, bundle: Path, uri: URI, token: str | None) -> set[str]:
    """Write, unless the repository holds another job's result; the files that are there then."""
    api = HfApi(token=token)
    api.create_repo(uri.name, exist_ok=True, private=True)
    _own_record(api, uri.name, context)
    api.upload_folder(repo_id=uri.name, folder_path=str(bundle), commit_message=f"finetune-operator job {context.job.name}")
    return set(api.list_repo_files(uri.name))


def _own_record(api: HfApi, name: str, context: Context) -> bytes | None:
    """The record of this job's result in a repository of the hub, None where it holds none. Raises UserError when it holds another job's."""
    try:
        if not api.file_exists(name, LINEAGE):
            return None
    except HfHubHTTPError as failure:  # a mirror need not say what it is that it does not have
        if failure.response.status_code != 404:
            raise
        return None
    record = Path(api.hf_hub_download(name, LINEAGE, cache_dir=f"{context.layout.cache}/hub")).read_bytes()
    refuse_foreign(record, context, "name")
    return record


def _refused(uri: URI) -> Callable[[str], UserError]:
    """What it means that the hub refuses a repository."""
    return lambda why: UserError("PublishRefused", f"{why}: the token may not write there, or the owner of {uri.name} does not exist")
