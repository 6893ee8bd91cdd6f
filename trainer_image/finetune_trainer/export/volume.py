"""A volume as a target: written beside, verified, renamed; another job's result is never overwritten."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from finetune_api.contract import LINEAGE, SUMS
from finetune_api.spec import PublishTarget
from finetune_api.status import Artifact
from finetune_api.uris import parse_uri

from ..job.context import Context
from ..process.errors import InfrastructureError
from .bundle import Held, artifact, digests, refuse_foreign


def check_volume(context: Context, to: PublishTarget, field: str) -> Held | None:
    """This job's result where the target holds it already. Writes nothing.

    Raises UserError or InfrastructureError when `publish_to_volume` would fail.
    """
    uri = parse_uri(to.address)
    target = context.target(uri)
    _refuse_foreign(target, context)
    if (target / LINEAGE).exists() and (target / SUMS).exists():  # it came there whole, by a rename
        return Held(artifact(target, to.address), (target / LINEAGE).read_bytes())
    folder = next(p for p in target.parents if p.exists())
    if not _writable(folder):
        message = f"{folder.name or folder} in claim {uri.name} cannot be written by uid {os.getuid()}: give it to this user or group"
        raise InfrastructureError("TargetNotWritable", message)
    return None


def _writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def publish_to_volume(context: Context, to: PublishTarget, field: str, bundle: Path) -> Artifact:
    """Write beside the target, verify, rename. The same job may replace what it published; nobody else."""
    target = context.target(parse_uri(to.address))
    _refuse_foreign(target, context)
    aside = target.with_name(f".{target.name}.{context.job.uid[:8]}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(bundle, aside, copy_function=shutil.copyfile)
        if digests(aside) != (bundle / SUMS).read_text():
            raise InfrastructureError("VerificationFailed", "what was written differs from what was sent")
        if target.exists():
            if digests(target) == (bundle / SUMS).read_text():
                shutil.rmtree(aside)
                return artifact(bundle, to.address)
            old = target.with_name(f".{target.name}.{context.job.uid[:8]}.old")
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            aside.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            aside.rename(target)
    except OSError as failure:
        raise InfrastructureError("TargetNotWritable", f"cannot write: {failure.strerror or failure}") from failure
    return artifact(bundle, to.address)


def _refuse_foreign(target: Path, context: Context) -> None:
    """Raise UserError when a folder holds something that this job did not publish."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    record = target / LINEAGE
    refuse_foreign(record.read_bytes() if record.is_file() else None, context, "path")
