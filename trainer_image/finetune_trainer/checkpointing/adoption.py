"""Checkpoints of the job that this one was restored from: another UID, the same name, the same to make, the same rows.

Velero or Git bring a job back as a new object; what it had saved still lies in the workspace, in the old object's folder.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from finetune_api.contract import result_digest

from ..job.context import Context
from .checkpoints import FENCE, list_checkpoints

log = logging.getLogger("finetune.checkpoints")
_IDENTITY = "identity.json"


def adopt_checkpoints(context: Context, rows: str) -> int | None:
    """Take them over, where this job has none yet. Returns the newest one's step. `rows`: digest of the prepared rows."""
    job, own = context.job, Path(context.layout.job)
    same = {"namespace": job.namespace, "name": job.name, "spec": result_digest(context.spec), "rows": rows}
    context.write_json(str(own / _IDENTITY), {**same, "uid": job.uid})
    if list_checkpoints(context.layout.checkpoints):
        return None
    siblings = [f for f in own.parent.glob(f"{job.namespace}-{job.name}-????????") if f != own and _identity(f).items() >= same.items()]
    newest = max(((found[0][0], f) for f in siblings if (found := list_checkpoints(f / "checkpoints"))), default=None)
    if newest is None:
        return None
    step, left = newest
    # whatever still runs of the old object counts its attempts apart, and finds its folder gone
    (left / "checkpoints" / FENCE).unlink(missing_ok=True)
    (left / "checkpoints").rename(context.layout.checkpoints)
    log.info("checkpoints of %s are taken over, the newest of step %d", left.name, step)
    return step


def _identity(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _IDENTITY).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
