"""What a stage knows: the job, where its workspace is, and where its sources and targets are mounted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from finetune_api.contract import JobFile
from finetune_api.uris import URI

from ..process import redaction
from ..process.errors import UserError
from .files import write_text


class Context:
    """One stage's view of the job."""

    def __init__(self, job: JobFile, workspace: str) -> None:
        self.job, self.spec, self.workspace = job, job.spec, workspace
        self.layout = job.layout(workspace)
        for folder in (self.layout.data, self.layout.checkpoints, self.layout.output, self.layout.reports, self.layout.cache):
            Path(folder).mkdir(parents=True, exist_ok=True)

    @classmethod
    def load(cls, job_file: str, workspace: str) -> Context:
        """Read job.json. What is secret of it is never said from here on."""
        job = JobFile.model_validate(json.loads(Path(job_file).read_text()))
        redaction.add_secrets(job.secrets.values())
        return cls(job, workspace)

    def mounted(self, uri: URI) -> Path:
        """The file or folder behind a pvc:// or configmap:// URI. Links that lead out of the mount are refused."""
        root = self.job.sources.get(f"{uri.scheme}://{uri.name}")
        if root is None:
            raise UserError("SourceNotMounted", f"{uri.scheme}://{uri.name} is not mounted here")
        return inside(root, uri)

    def target(self, uri: URI) -> Path:
        """The folder that a pvc:// target is written to."""
        root = self.job.targets.get(f"{uri.scheme}://{uri.name}")
        if root is None:
            raise UserError("TargetNotMounted", f"{uri.scheme}://{uri.name} is not mounted here")
        return inside(root, uri)

    def secret(self, field: str, key: str = "token") -> str | None:
        """The secret of a field, or None when it has none or is not mounted in this stage."""
        return read_secret(self.job.secrets.get(field), key)

    def write_json(self, path: str, value: Any) -> None:
        """Write a report so that a reader sees the old or the new one, never half of it."""
        write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")

    def read_json(self, path: str) -> Any:
        """Read what an earlier stage wrote."""
        return json.loads(Path(path).read_text())


def read_secret(folder: str | None, key: str) -> str | None:
    """A key of a Secret that is mounted as a folder, or None where there is none."""
    if folder is None or not os.path.exists(f"{folder}/{key}"):
        return None
    return Path(folder, key).read_text().strip()


def inside(root: str, uri: URI) -> Path:
    """The file or folder behind a URI in a mount. Raises UserError for a link that leads out of it."""
    base = Path(root).resolve()
    path = (base / uri.path).resolve()
    if uri.scheme != "configmap" and path != base and base not in path.parents:
        raise UserError("PathLeavesVolume", f"{uri.scheme}://{uri.name}/{uri.path} leads out of the volume")
    return path if uri.scheme != "configmap" else base / uri.path
