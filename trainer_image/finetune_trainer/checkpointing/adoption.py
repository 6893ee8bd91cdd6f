"""Whose checkpoints a job goes on from: its own, made from the same, or those of the job that it was restored from.

Every folder of checkpoints stands beside `identity.json`, which says what they were made from (`MadeFrom`). What was made from
something else is moved aside and kept. Velero or Git bring a job back as a new object, with another UID: what the old one had
saved still lies in a workspace that they share, and a copy of it is taken over where it was made from the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from finetune_api.contract import Identity, MadeFrom, read_identity, result_digest

from ..job.context import Context
from ..job.files import write_text
from .checkpoints import MANIFEST, list_checkpoints

log = logging.getLogger("finetune.checkpoints")
_UNKNOWN = "unknown"
"""Key of what lies there without an identity, or with one of an older version."""


def made_from(context: Context, rows: str, strategy: str) -> MadeFrom:
    """What this job's checkpoints are made from, once prepare has written it. `rows`: digest of the prepared rows."""
    tuning = json.dumps(context.spec.tuning.to_wire(), sort_keys=True)
    with Path(context.layout.train_rows).open("rb") as stream:
        tokens = hashlib.file_digest(stream, "sha256").hexdigest()
    wanted = {
        "model": True,
        "adapter": context.spec.tuning.continue_from is not None,
        "teacher": context.spec.tuning.distillation is not None and context.spec.tuning.distillation.teacher is not None,
    }
    weights = {name: str(context.read_json(context.layout.reference(name))["fingerprint"]) for name, wants in wanted.items() if wants}
    return MadeFrom(
        tuning=f"sha256:{hashlib.sha256(tuning.encode()).hexdigest()}",
        rows=rows,
        tokens=f"sha256:{tokens}",
        strategy=strategy,
        **weights,
    )


def settle_checkpoints(context: Context, made: MadeFrom) -> int | None:
    """Leave those in the job's folder that were made from this. Returns the newest one's step where a restored job takes them over."""
    job, layout = context.job, context.layout
    own = Identity(namespace=job.namespace, name=job.name, uid=job.uid, spec=result_digest(context.spec), made_from=made)
    known = read_identity(layout.identity)
    if known is None or known.made_from != made:
        _set_aside(context, known.made_from.key if known is not None else _UNKNOWN)
        _bring_back(context, made.key)
    write_text(layout.identity, own.model_dump_json(by_alias=True, exclude_none=True, indent=1) + "\n")
    if list_checkpoints(layout.checkpoints) or job.run is not None:  # which of its runs a local job goes on with is not decided here
        return None
    return _adopt(context, own)


def _kept(context: Context) -> list[Path]:
    """What belongs to checkpoints: what they became, and the history of their steps."""
    layout = context.layout
    return [Path(layout.checkpoints), Path(layout.output), Path(layout.history)]


def _set_aside(context: Context, key: str) -> None:
    aside = Path(context.layout.earlier, key)
    for path in _kept(context):
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            continue
        log.info("%s was made from something else: kept in %s", path.name, aside)
        aside.mkdir(parents=True, exist_ok=True)
        target = aside / path.name
        while target.exists():  # the unknown of another time
            target = target.with_name(f"{target.name}.older")
        is_folder = path.is_dir()
        path.rename(target)
        if is_folder:
            path.mkdir()


def _bring_back(context: Context, key: str) -> None:
    aside = Path(context.layout.earlier, key)
    for path in _kept(context):
        if (aside / path.name).exists():
            if path.is_dir():
                path.rmdir()  # empty: what was in it was set aside
            (aside / path.name).rename(path)


def _adopt(context: Context, own: Identity) -> int | None:
    """A copy of what the job of another UID had saved, that was to make the same from the same; its own stays whole."""
    job, folder = context.job, Path(context.layout.job)
    newest: tuple[int, Path] | None = None
    for sibling in folder.parent.glob(f"{job.namespace}-{job.name}-????????"):
        found = read_identity(sibling / "identity.json")
        if sibling == folder or found is None:
            continue
        if (found.namespace, found.name, found.made_from) != (
            own.namespace,
            own.name,
            own.made_from,
        ):  # what comes after training may differ
            continue
        step = next((step for step, path in list_checkpoints(sibling / "checkpoints") if (path / MANIFEST).exists()), None)
        if step is not None and (newest is None or step > newest[0]):
            newest = step, sibling
    if newest is None:
        return None
    step, left = newest
    for _, path in reversed(list_checkpoints(left / "checkpoints")):
        if (path / MANIFEST).exists():
            partial = Path(context.layout.checkpoints, f".{path.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(path, partial, copy_function=_link)
            partial.rename(partial.with_name(path.name))
    log.info("checkpoints of %s are taken over, the newest of step %d", left.name, step)
    return step


def _link(source: str, target: str) -> None:
    """The same bytes a second time: what is sealed is never written again, only removed."""
    try:
        os.link(source, target)
    except OSError:  # a volume without links
        shutil.copyfile(source, target)
