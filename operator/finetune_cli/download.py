"""`finetune download`: a published result onto this machine. From claims through a pod that mounts them read-only."""

from __future__ import annotations

import contextlib
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from finetune_api.status import Artifact
from finetune_api.uris import parse_uri

from .cluster import Jobs
from .pods import NoPod, Wanted, claim, execute, running

_ELSEWHERE = {
    "hf": "it is on the Hugging Face Hub: hf download {name}",
    "s3": "it is in a bucket: aws s3 cp --recursive {uri} {target}",
    "oci": "it is in a registry: oras pull --output {target} {name}/{path}:{tag}",
    "mlflow": "it is in MLflow: MLFLOW_TRACKING_URI=https://{name} mlflow artifacts download --artifact-uri models:/{path}@champion --dst-path {target}",
}


class NotHere(Exception):
    """The result is fetched by another tool, or cannot be."""


def download(jobs: Jobs, artifact: Artifact, image: str, target: Path) -> int:
    """Copy a result from its claim; returns the number of files. Raises NotHere."""
    uri = parse_uri(artifact.uri)
    if uri.scheme != "pvc":
        hint = _ELSEWHERE.get(uri.scheme, "fetch it with a tool for {uri}")
        raise NotHere(hint.format(name=uri.name, path=uri.path, tag=uri.revision or "latest", uri=artifact.uri, target=target))
    wanted = Wanted("finetune-download", image, {"/volume": claim(uri.name)})
    with _pod(jobs, wanted) as pod, tempfile.TemporaryFile() as archive:
        command = ["tar", "-C", "/volume", "-cf", "-", "--", uri.path or "."]
        code, problem = execute(jobs.core, jobs.namespace, pod, command, archive)
        if code != 0:
            raise NotHere(f"{artifact.uri}: {problem or 'tar failed'}")
        archive.seek(0)
        target.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=archive) as tar:
            members = [m for m in tar.getmembers() if m.isfile()]
            for member in members:
                member.name = str(Path(member.name).relative_to(uri.path)) if uri.path else member.name
            tar.extractall(target, members, filter="data")
        return len(members)


@contextlib.contextmanager
def _pod(jobs: Jobs, wanted: Wanted) -> Iterator[str]:
    try:
        with running(jobs.core, jobs.namespace, wanted) as pod:
            yield pod
    except NoPod as failure:
        raise NotHere(str(failure)) from None
