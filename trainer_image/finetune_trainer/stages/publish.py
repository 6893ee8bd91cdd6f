"""publish: write the result with its model card and lineage, verify it, and never overwrite another job's."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from finetune_api.contract import StageResult
from finetune_api.spec import Output
from finetune_api.status import Artifact
from finetune_api.uris import URI, parse_uri

from ..export.card import Facts, model_card
from ..job.context import Context
from ..process.errors import InfrastructureError, SourceUnavailable, StageError, UserError
from ..remote.retry import hub_host, patiently

log = logging.getLogger("finetune.publish")
LINEAGE = "finetune.json"
SUMS = "SHA256SUMS"
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets")
_MOST_PARENTS = 20
_LEFT_OUT = {"training_args.bin"}
"""Pickles: they may not leave the job."""


def publish(context: Context) -> StageResult:
    """Run the stage. Every target is tried; those that fail are named, those that succeeded stay."""
    bundle = _bundle(context)
    done: list[Artifact] = []
    failed: list[tuple[str, StageError]] = []
    for index, target in enumerate(context.spec.publish):
        uri = parse_uri(target.uri)
        try:
            if uri.scheme == "pvc":
                done.append(_to_volume(context, bundle, uri, target.uri))
            else:
                done.append(_to_hub(context, bundle, uri, target.uri, context.secret(f"publish-{index}")))
        except (UserError, InfrastructureError) as failure:
            failed.append((target.uri, failure))
    if failed:
        raise together(failed, f"; published: {', '.join(a.uri for a in done)}" if done else "")
    where = ", ".join(a.uri for a in done)
    return StageResult(reason="Published", message=f"published to {where}", result={"artifacts": [a.to_wire() for a in done]})


def together(failed: list[tuple[str, StageError]], rest: str) -> StageError:
    """One error for all targets: what will never go is said at once, what may go by itself is waited for."""
    message = "; ".join(f"{uri}: {error.message}" for uri, error in failed) + rest
    errors = [error for _, error in failed]
    first = min(errors, key=lambda error: (not isinstance(error, UserError), isinstance(error, SourceUnavailable)))
    if isinstance(first, SourceUnavailable):
        return SourceUnavailable(first.host, message, max(e.retry_after or 0 for e in errors if isinstance(e, SourceUnavailable)) or None)
    return type(first)(first.reason, message)


def _bundle(context: Context) -> Path:
    """The files to publish, made in the workspace: the same bytes for every target and every try."""
    output, bundle = Path(context.layout.output), Path(context.layout.job, "publish")
    shutil.rmtree(bundle, ignore_errors=True)
    bundle.mkdir()
    for file in sorted(output.iterdir()):
        if file.is_file() and file.name not in _LEFT_OUT and file.suffix not in (".bin", ".pt", ".pth") and file.name != "README.md":
            shutil.copyfile(file, bundle / file.name)
    if not any(bundle.glob("*.safetensors")):
        raise InfrastructureError("NothingToPublish", "training left no .safetensors file in the workspace")
    _name_base(context, bundle)
    if context.spec.output != Output():
        from ..export.forms import export

        export(context, bundle)
    evaluation = _optional(context, context.layout.evaluation_report)
    dataset = context.read_json(context.layout.data_report)["dataset"]
    base = context.read_json(context.layout.reference("model"))
    parents = _parents(context)
    versions = {name: version(name) for name in _LIBRARIES}
    facts = Facts(context.job, dataset, base, evaluation, parents, versions, _optional(context, context.layout.plan))
    (bundle / "README.md").write_text(model_card(facts))
    lineage = {
        "job": {"name": context.job.name, "namespace": context.job.namespace, "uid": context.job.uid},
        "base": {"uri": base["uri"], "fingerprint": base["fingerprint"]},
        "dataset": {"digest": dataset["digest"], "train": dataset["train"], "eval": dataset["eval"]},
        "evaluation": {k: v for k, v in evaluation.items() if k != "samples"} if evaluation else None,
        "parents": parents,
        "libraries": versions,
        "tuning": context.spec.tuning.to_wire(),
    }
    (bundle / LINEAGE).write_text(json.dumps(lineage, indent=1, sort_keys=True) + "\n")
    (bundle / SUMS).write_text(_sums(bundle))
    return bundle


def _parents(context: Context) -> list[dict[str, Any]]:
    """The adapters that this one goes on from, the nearest first; each names the job, the data and the base it came from."""
    if context.spec.tuning.continue_from is None:
        return []
    noted = context.read_json(context.layout.reference("adapter"))
    parent: dict[str, Any] = {"uri": noted["uri"], "fingerprint": noted["fingerprint"]}
    try:
        told = json.loads((Path(noted["path"]) / LINEAGE).read_text())
        return [{**parent, "job": told["job"], "dataset": told["dataset"]}, *told.get("parents", [])][:_MOST_PARENTS]
    except (OSError, ValueError, KeyError, TypeError):  # not one of ours
        return [parent]


def _name_base(context: Context, bundle: Path) -> None:
    """Name the base model by its URI, not by the folder it was mounted at."""
    config = bundle / "adapter_config.json"
    if config.exists():
        uri = context.spec.model.uri
        document = json.loads(config.read_text())
        document["base_model_name_or_path"] = uri.removeprefix("hf://").partition("@")[0] if uri.startswith("hf://") else uri
        config.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def _optional(context: Context, path: str) -> dict[str, Any] | None:
    return context.read_json(path) if Path(path).exists() else None


def _sums(folder: Path) -> str:
    lines = []
    for file in _files(folder):
        with file.open("rb") as stream:
            lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {file.relative_to(folder)}\n")
    return "".join(lines)


def _files(folder: Path) -> list[Path]:
    """All files but the list of digests itself, in a stable order."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / SUMS)


def _artifact(bundle: Path, uri: str) -> Artifact:
    digest = hashlib.sha256((bundle / SUMS).read_bytes()).hexdigest()
    size = sum(p.stat().st_size for p in [*_files(bundle), bundle / SUMS])
    return Artifact(uri=uri, digest=f"sha256:{digest}", bytes=size)


def _to_volume(context: Context, bundle: Path, uri: URI, shown: str) -> Artifact:
    """Write beside the target, verify, rename. The same job may replace what it published; nobody else."""
    target = context.target(uri)
    refuse_foreign(target, context)
    aside = target.with_name(f".{target.name}.{context.job.uid[:8]}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(bundle, aside, copy_function=shutil.copyfile)
        if _sums(aside) != (bundle / SUMS).read_text():
            raise InfrastructureError("VerificationFailed", "what was written differs from what was sent")
        if target.exists():
            if _sums(target) == (bundle / SUMS).read_text():
                shutil.rmtree(aside)
                return _artifact(bundle, shown)
            old = target.with_name(f".{target.name}.{context.job.uid[:8]}.old")
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            aside.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            aside.rename(target)
    except OSError as failure:
        raise InfrastructureError("TargetNotWritable", f"cannot write: {failure.strerror or failure}") from failure
    return _artifact(bundle, shown)


def refuse_foreign(target: Path, context: Context) -> None:
    """Raise UserError when a folder holds something that this job did not publish."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        owner = json.loads((target / LINEAGE).read_text())["job"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError("TargetTaken", "the target holds something that no FineTuneJob published; choose another path") from None
    if owner.get("uid") != context.job.uid:
        raise UserError(
            "TargetTaken",
            f"the target holds the result of job {owner.get('namespace')}/{owner.get('name')} ({owner.get('uid')}); choose another path",
        )


def refuse_foreign_repository(api: HfApi, name: str, context: Context) -> None:
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


def refusal(uri: URI) -> Callable[[str], UserError]:
    """What it means that the hub refuses a repository."""
    return lambda why: UserError("PublishRefused", f"{why}: the token may not write there, or the owner of {uri.name} does not exist")


def _to_hub(context: Context, bundle: Path, uri: URI, shown: str, token: str | None) -> Artifact:
    """One commit with all files; then read their digests back."""
    try:
        present = patiently(lambda: _commit(context, bundle, uri, token), hub_host(), refusal(uri))
    except (OSError, HfHubHTTPError) as failure:
        raise InfrastructureError("PublishFailed", f"the hub did not take it: {failure}") from failure
    missing = {str(p.relative_to(bundle)) for p in _files(bundle)} - present
    if missing:
        raise InfrastructureError("VerificationFailed", f"not uploaded: {', '.join(sorted(missing))}")
    return _artifact(bundle, shown)


def _commit(context: Context, bundle: Path, uri: URI, token: str | None) -> set[str]:
    """Write, unless the repository holds another job's result; the files that are there then."""
    api = HfApi(token=token)
    api.create_repo(uri.name, exist_ok=True, private=True)
    refuse_foreign_repository(api, uri.name, context)
    api.upload_folder(repo_id=uri.name, folder_path=str(bundle), commit_message=f"finetune-operator job {context.job.name}")
    return set(api.list_repo_files(uri.name))
