"""`finetune erase`: where one person's rows may lie, and the answers of those who looked there. Pure but for `ask_here` and `ask_in`."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api import names
from finetune_api.contract import S3_KEYS, Env, Layout, ModelStorage, Mounts, StageResult, read_stage_result
from finetune_api.erasure import ERASE, ErasureReport, ErasureRequest, Reading, TrainedOn
from finetune_api.lenient import read_status
from finetune_api.uris import parse_uri

from .cluster import Object, Objects
from .options import NotPossible, near
from .pods import NoPod, Wanted, claim, execute, running

_SURROUNDINGS = {Env.HUB, Env.S3, Env.ALLOWED_HOSTS, "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}
"""Variables of a pod of the operator's that say how servers are reached."""
_KEYS = f"{Mounts.SECRETS}/storage"


@dataclass
class Place:
    """A claim with workspaces, or the storage of a model."""

    shown: str
    claim: str | None = None
    folders: list[str] | None = None
    """Folders of jobs; None for all that are there."""
    model: Object | None = None


@dataclass
class Choice:
    """What was named on the command line."""

    jobs: list[str] = field(default_factory=list)
    claims: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    everything: bool = False


def places(choice: Choice, jobs: Sequence[Object], models: Sequence[Object]) -> list[Place]:
    """Where to look, workspaces first: what they tell is needed at the models. Raises NotPossible, also where a job is at work there."""
    if not (choice.jobs or choice.claims or choice.models or choice.everything):
        raise NotPossible("nothing says where to look: name --job, --model, --claim, or --all of the namespace")
    by_name, by_model = ({item["metadata"]["name"]: item for item in items} for items in (jobs, models))
    for name in choice.jobs:
        if name not in by_name:
            raise NotPossible(
                f"there is no FineTuneJob {name}{near(name, by_name)}; what one that was deleted left on a claim: --claim CLAIM"
            )
    for name in choice.models:
        if name not in by_model:
            raise NotPossible(f"there is no FineTunedModel {name}{near(name, by_model)}")
    whole = set(choice.claims) | ({claim_of(job) for job in jobs} if choice.everything else set())
    chosen = [by_name[name] for name in choice.jobs if claim_of(by_name[name]) not in whole]
    wanted = sorted(by_model) if choice.everything else list(dict.fromkeys(choice.models))
    _refuse_busy(jobs, [job["metadata"]["name"] for job in chosen], whole, wanted)
    found: dict[str, list[str]] = {}
    for job in chosen:
        found.setdefault(claim_of(job), []).append(folder_of(job))
    return [
        *(Place(f"claim {name}", claim=name) for name in sorted(whole)),
        *(Place(f"claim {name}", claim=name, folders=folders) for name, folders in found.items()),
        *(Place(f"model {name}", model=by_model[name]) for name in wanted),
    ]


def _refuse_busy(jobs: Sequence[Object], chosen: Sequence[str], claims: set[str], models: Sequence[str]) -> None:
    busy = {}
    for job in (job for job in jobs if not read_status(job.get("status")).finished):
        spec, name = job["spec"], job["metadata"]["name"]
        published = {str(target.get("model")) for target in spec.get("publish") or ()}
        origin = str((spec.get("tuning") or {}).get("continueFrom") or "").removeprefix("model://").partition("@")[0]
        if name in chosen:
            busy[name] = "its own workspace"
        elif claim_of(job) in claims:
            busy[name] = f"claim {claim_of(job)}"
        elif used := ({*published, origin} & set(models)):
            busy[name] = f"model {min(used)}"
    if busy:
        told = ", ".join(f"{name} ({what})" for name, what in sorted(busy.items()))
        raise NotPossible(f"jobs that have not ended use what is to be looked into: {told}; wait for their end, or finetune cancel JOB")


def claim_of(job: Object) -> str:
    """The claim that holds a job's workspace."""
    own = (job["spec"].get("workspace") or {}).get("persistentVolumeClaim")
    return str(own["claimName"]) if own else names.workspace_name(job["metadata"]["name"])


def folder_of(job: Object) -> str:
    """Its folder there."""
    meta = job["metadata"]
    return Layout("", meta["namespace"], meta["name"], meta["uid"]).job.rpartition("/")[2]


def readings(jobs: Iterable[Object], columns: dict[str, str]) -> list[Reading]:
    """How the jobs read their rows, each way once; first as the command line says."""
    found = [Reading(columns=columns)] if columns else []
    for job in jobs:
        dataset = job["spec"].get("dataset") or {}
        reading = Reading(format=dataset.get("format", "auto"), columns=dataset.get("columns") or {})
        found += [reading] if reading not in found and reading != Reading() else []
    return found


def request_at(place: Place, request: ErasureRequest, trained: Sequence[TrainedOn]) -> ErasureRequest:
    """The request as it is for one place."""
    if place.model is None:
        return request.model_copy(update={"workspace": Mounts.WORKSPACE, "folders": place.folders})
    spec = place.model["spec"]
    uri = parse_uri(spec["storage"])
    more = {
        "storage": ModelStorage(storage=spec["storage"], s3_endpoint=spec.get("s3Endpoint")),
        "mounts": {f"pvc://{uri.name}": f"{Mounts.TARGETS}/pvc/{uri.name}"} if uri.scheme == "pvc" else {},
        "keys": _KEYS if spec.get("secretRef") else None,
        "trained": list(trained),
    }
    return request.model_copy(update=more)


def pod_at(place: Place, image: str, template: Any = None) -> Wanted:
    """The pod that looks there. `template`: a pod of the operator's with this image, whose surroundings it takes."""
    mounts: dict[str, Any] = {}
    if place.model is None:
        mounts[Mounts.WORKSPACE] = claim(str(place.claim), read_only=False)
    else:
        spec, uri = place.model["spec"], parse_uri(place.model["spec"]["storage"])
        if uri.scheme == "pvc":
            mounts[f"{Mounts.TARGETS}/pvc/{uri.name}"] = claim(uri.name, read_only=False)
        if spec.get("secretRef"):
            items = [{"key": key, "path": key} for key in S3_KEYS]
            mounts[_KEYS] = {"secret": {"secretName": spec["secretRef"]["name"], "items": items}}
        config = names.catalog_config_name(place.model["metadata"]["name"])
        mounts[Mounts.JOB] = {"configMap": {"name": config, "optional": True}}  # authorities of an administrator
    env, pull = [], []
    if template is not None:
        trainer = template.spec.containers[0]
        env = [{"name": one.name, "value": one.value} for one in trainer.env or () if one.name in _SURROUNDINGS]
        pull = [one.name for one in template.spec.image_pull_secrets or ()]
    return Wanted("finetune-erase", image, mounts, read_only=False, env=env, pull_secrets=pull)


def template_of(cluster: Objects) -> Any | None:
    """A pod of the namespace that runs the trainer's image, the newest; None where there is none."""
    found = cluster.core.list_namespaced_pod(cluster.namespace, label_selector=f"{names.LABEL_STAGE},{names.LABEL_MANAGED_BY}").items
    return max(found, key=lambda pod: str(pod.metadata.creation_timestamp), default=None)


def is_there(cluster: Objects, place: Place) -> bool:
    """Whether the claim of a place is still there, as far as the caller may know."""
    from kubernetes.client import ApiException

    uri = parse_uri(place.model["spec"]["storage"]) if place.model is not None else None
    named = place.claim if uri is None else uri.name if uri.scheme == "pvc" else None
    if named is None:
        return True
    try:
        cluster.core.read_namespaced_persistent_volume_claim(named, cluster.namespace)
    except ApiException as failure:
        return bool(failure.status != 404)
    return True


def ask_in(cluster: Objects, wanted: Wanted, request: ErasureRequest) -> ErasureReport:
    """By a pod of the caller's own. Raises NotPossible."""
    line, answer = (json.dumps(request.to_wire()) + "\n").encode(), io.BytesIO()
    try:
        with running(cluster.core, cluster.namespace, wanted) as pod:
            _, problem = execute(cluster.core, cluster.namespace, pod, ["python3", "-m", "finetune_trainer", ERASE], answer, line)
    except NoPod as failure:
        raise NotPossible(str(failure)) from None
    return _read(answer.getvalue().decode(errors="replace"), problem)


def ask_here(request: ErasureRequest) -> ErasureReport:
    """By a process of this machine. Raises NotPossible."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "finetune_trainer", ERASE]
    done = subprocess.run(command, input=json.dumps(request.to_wire()) + "\n", capture_output=True, text=True, env=env, check=False)
    return _read(done.stdout, done.stderr)


def _read(said: str, problem: str) -> ErasureReport:
    """The last line of what was said. Raises NotPossible."""
    result: StageResult | None = read_stage_result(said.strip().rpartition("\n")[2])
    if result is None:
        last = problem.strip().rpartition("\n")[2]
        raise NotPossible(
            f"no answer, so it is not known what was removed: run it again, which changes nothing twice ({last or 'silence'})"
        )
    if result.reason != "Erased":
        raise NotPossible(result.message)
    return ErasureReport.model_validate(result.result)


def published_by(jobs: Sequence[Object]) -> dict[str, list[str]]:
    """Where the results of jobs went, by folder."""
    return {folder_of(job): [artifact.uri for artifact in read_status(job.get("status")).artifacts] for job in jobs}


def mentioned(jobs: Sequence[Object], containing: Sequence[str]) -> list[str]:
    """Jobs whose status holds one of the texts: messages quote the beginning of rows that could not be read."""
    wanted = [" ".join(text.casefold().split()) for text in containing]
    said = {job["metadata"]["name"]: " ".join(json.dumps(job.get("status"), ensure_ascii=False).casefold().split()) for job in jobs}
    return [name for name, status in said.items() if any(text in status for text in wanted)]


def local_folders(workspace: Path, named: Sequence[str], hold: Callable[[Path], bool]) -> list[str]:
    """Folders of local runs, of the jobs that are named or of all; `hold` keeps others from running one. Raises NotPossible."""
    from .runs import runs_in

    runs = runs_in(workspace)
    if not runs:
        raise NotPossible(f"--workspace {workspace}: there are no runs")
    known = {run.name.partition("/")[2] for run in runs}
    for name in named:
        if name not in known:
            raise NotPossible(f"--job {name}: there is no such run in {workspace}{near(name, known)}")
    chosen = [run for run in runs if not named or run.name.partition("/")[2] in named]
    for run in chosen:
        if not hold(run.folder):
            raise NotPossible(f"run {run.id} of {run.name} goes on in another process; wait for its end")
    return [run.folder.name for run in chosen]


def told(report: ErasureReport, published: dict[str, list[str]]) -> list[str]:
    """What a report says, line by line."""
    verb = "would be removed" if report.dry_run else "removed"
    lines = [f"  {file.count:>6} {file.what} {verb}: {file.file}" for file in report.files if not file.kept]
    lines = lines or [f"  nothing found in {len(report.looked)} places"]
    for file in report.files:
        if file.kept:
            lines.append(f"         left as it is, though it mentions it: {file.file}")
    lines += [f"         not looked into: {note}" for note in report.notes]
    for one in report.learned:
        rows = ", ".join([*([f"{one.rows} now"] if one.rows else []), *([f"{one.earlier} earlier"] if one.earlier else [])])
        what = f"version {one.version}" + (f" (job {one.job})" if one.job else "") if one.version is not None else f"job {one.job}"
        why = f"goes on from version {one.through}, which learned from it" if one.through else f"learned from it ({rows})"
        where = one.published or next((uris for folder, uris in published.items() if folder in one.job), [])
        lines.append(f"         weights are left: {what} {why}" + (f"; published at {', '.join(where)}" if where else ""))
    return lines
