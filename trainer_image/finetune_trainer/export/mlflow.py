"""An MLflow server as a target: a run with settings, scores and files, then a version of a registered model.

The version comes last: until then nobody finds the files by the model's name. It bears the job's record and the digest of its files,
by which the same job finds it again. A version replaces none. The alias `champion` goes to the newest version that a job published, as
long as it is where a job put it: where somebody has moved or removed it, that is their word, and it stays.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import requests

from finetune_api.contract import LINEAGE, SUMS
from finetune_api.spec import PublishTarget
from finetune_api.status import Artifact
from finetune_api.uris import parse_uri

from ..job.context import Context
from ..job.files import parse_digests
from ..process.errors import InfrastructureError, UserError
from ..remote.mlflow import Server, error_code
from ..remote.retry import with_retries
from ..remote.web import status_of
from .bundle import Held, artifact, artifact_of, files, is_own

ALIAS = "champion"
_RECORD, _DIGEST, _CHAMPION = "finetune.dev/job", "finetune.dev/digest", "finetune.dev/champion"
"""Tags: whose it is (as in finetune.json), the digest of SHA256SUMS, and of a model, which version a job gave the alias to."""
_FOLDER = "model"
_BATCH, _LONGEST = 100, 5000
"""Params of one request, and characters of one's value or of a tag's."""

T = TypeVar("T")


def check_mlflow(context: Context, target: PublishTarget, field: str) -> Held | None:
    """This job's version where the model has it already. Writes nothing.

    Raises UserError or SourceUnavailable when `publish_to_mlflow` would fail.
    """
    return _asked(target, lambda: _Model(context, target, field).check())


def publish_to_mlflow(context: Context, target: PublishTarget, field: str, bundle: Path) -> Artifact:
    """Write a run with its files, read them back, register them as a version. The same job's again is the same version."""
    _asked(target, lambda: _Model(context, target, field).publish(bundle))
    return artifact(bundle, target.address)


def _asked(target: PublishTarget, act: Callable[[], T]) -> T:
    host = parse_uri(target.address).name

    def refused(why: str) -> UserError:
        return UserError("PublishRefused", f"{why}: the token in secretRef may not write there, or it is no MLflow server")

    try:
        return with_retries(act, host, refused)
    except requests.RequestException as failure:
        told = error_code(failure) if isinstance(failure, requests.HTTPError) else ""
        raise InfrastructureError("PublishFailed", f"the MLflow server did not take it: {told or failure}") from failure


class _Model:
    """A registered model, as one job sees it."""

    def __init__(self, context: Context, target: PublishTarget, field: str) -> None:
        uri = parse_uri(target.address)
        self.context, self.shown, self.name = context, target.address, uri.path
        self.server = Server(context, field, uri, plain=target.plain_http)

    def check(self) -> Held | None:
        held = max(self._own_versions(), key=lambda version: int(version["version"]), default=None)
        if held is not None:
            root = self.server.files_of(held)
            size = sum(size for _, size in self.server.list_files(root))
            sums, lineage = (b"".join(self.server.read(f"{root}/{name}")) for name in (SUMS, LINEAGE))
            return Held(artifact_of(sums, size, self.shown), lineage)
        experiment = self.server.find("experiments/get-by-name", experiment_name=self.name)
        if experiment is not None:
            self.server.served(experiment["experiment"]["artifact_location"])
        return None

    def publish(self, bundle: Path) -> None:
        digest = artifact(bundle, "").digest
        held = next((version for version in self._own_versions() if _tags(version).get(_DIGEST) == digest), None)
        root = self.server.files_of(held) if held is not None else ""
        if held is None or self._damaged(root, bundle) is not None:
            run = self._run(bundle, digest) if held is None else None
            root = f"{self.server.served(run['info']['artifact_uri'])}/{_FOLDER}" if run is not None else root
            for file in [*files(bundle), bundle / SUMS]:
                self.server.upload(file, f"{root}/{file.relative_to(bundle)}")
            if (damaged := self._damaged(root, bundle)) is not None:
                raise InfrastructureError("VerificationFailed", f"{damaged}: what was written differs from what was sent")
            if run is not None:
                held = self._register(run, bundle, digest)
        assert held is not None
        self._point_alias(int(held["version"]))

    def _own_versions(self) -> list[dict[str, Any]]:
        return [version for version in self.server.versions(self.name) if is_own(_record(version), self.context)]

    def _run(self, bundle: Path, digest: str) -> dict[str, Any]:
        """The run that a try which was killed has begun, or a new one, with settings, scores and lineage."""
        experiment = self._experiment()
        uid = self.context.job.uid
        asked = f"tags.`{_DIGEST}` = '{digest}' and tags.`finetune.dev/job-uid` = '{uid}'"
        found = self.server.post("runs/search", experiment_ids=[experiment], filter=asked, max_results=1).get("runs")
        lineage = json.loads((bundle / LINEAGE).read_text())
        if found:
            run = dict(found[0])
        else:
            tags = {
                _RECORD: json.dumps(lineage["job"], sort_keys=True),
                _DIGEST: digest,
                "finetune.dev/job-uid": uid,
                "finetune.dev/base": lineage["base"]["uri"],
                "finetune.dev/base-fingerprint": lineage["base"]["fingerprint"],
                "finetune.dev/data-digest": lineage["dataset"]["digest"],
                "finetune.dev/parents": json.dumps([parent["uri"] for parent in lineage["parents"]])[:_LONGEST],
            }
            body = {"experiment_id": experiment, "run_name": self.context.job.name, "start_time": _now(), "tags": _pairs(tags)}
            run = dict(self.server.post("runs/create", **body)["run"])
        params = [(name, value[:_LONGEST]) for name, value in _flat("", lineage["tuning"])]
        for begin in range(0, len(params), _BATCH):  # the same again is no change
            self.server.post("runs/log-batch", run_id=run["info"]["run_id"], params=_pairs(dict(params[begin : begin + _BATCH])))
        metrics = [{"key": key, "value": value, "timestamp": 0, "step": 0} for key, value in _scores(lineage["evaluation"])]
        if metrics:
            self.server.post("runs/log-batch", run_id=run["info"]["run_id"], metrics=metrics)
        return run

    def _experiment(self) -> str:
        """Of the model's name; made where there is none."""
        for _ in range(2):  # another may make it in between
            found = self.server.find("experiments/get-by-name", experiment_name=self.name)
            if found is not None:
                if found["experiment"].get("lifecycle_stage") == "deleted":
                    raise UserError(
                        "PublishRefused", f"the experiment {self.name} was deleted there; restore it, or choose another model name"
                    )
                return str(found["experiment"]["experiment_id"])
            _made(lambda: self.server.post("experiments/create", name=self.name))
        raise InfrastructureError("TargetContended", f"the experiment {self.name} comes and goes")

    def _register(self, run: dict[str, Any], bundle: Path, digest: str) -> dict[str, Any]:
        run_id = run["info"]["run_id"]
        lineage = json.loads((bundle / LINEAGE).read_text())
        _made(lambda: self.server.post("registered-models/create", name=self.name))
        self.server.post("runs/update", run_id=run_id, status="FINISHED", end_time=_now())
        body = {
            "name": self.name,
            "source": f"{run['info']['artifact_uri']}/{_FOLDER}",
            "run_id": run_id,
            "description": f"FineTuneJob {self.context.job.namespace}/{self.context.job.name}",
            "tags": _pairs({_RECORD: json.dumps(lineage["job"], sort_keys=True), _DIGEST: digest}),
        }
        return dict(self.server.post("model-versions/create", **body)["model_version"])

    def _point_alias(self, version: int) -> None:
        model = self.server.get("registered-models/get", name=self.name)["registered_model"]
        now = next((int(alias["version"]) for alias in model.get("aliases", ()) if alias["alias"] == ALIAS), None)
        ours = _tags(model).get(_CHAMPION)
        if (ours or None) != (None if now is None else str(now)) or (now or 0) >= version:
            return
        self.server.post("registered-models/set-tag", name=self.name, key=_CHAMPION, value=str(version))
        self.server.post("registered-models/alias", name=self.name, alias=ALIAS, version=str(version))

    def _damaged(self, root: str, bundle: Path) -> str | None:
        """Read back what was written: the first file that is not what was sent."""
        sums = (bundle / SUMS).read_bytes()
        for name, digest in {**parse_digests(sums.decode()), SUMS: hashlib.sha256(sums).hexdigest()}.items():
            written = hashlib.sha256()
            try:
                for chunk in self.server.read(f"{root}/{name}"):
                    written.update(chunk)
            except requests.HTTPError as failure:
                if status_of(failure) != 404:
                    raise
                return name
            if written.hexdigest() != digest:
                return name
        return None


def _made(make: Callable[[], Any]) -> None:
    """Make something that may be there already."""
    try:
        make()
    except requests.HTTPError as failure:
        if error_code(failure) != "RESOURCE_ALREADY_EXISTS":
            raise


def _now() -> int:
    return int(time.time() * 1000)


def _tags(entity: dict[str, Any]) -> dict[str, str]:
    return {str(tag["key"]): str(tag.get("value", "")) for tag in entity.get("tags", ())}


def _pairs(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in values.items()]


def _record(version: dict[str, Any]) -> Any:
    """Whose version it is: the `job` of its finetune.json."""
    try:
        return json.loads(_tags(version).get(_RECORD, ""))
    except ValueError:
        return None


def _flat(path: str, value: Any) -> list[tuple[str, str]]:
    """Settings by their path, as `hyperparameters.learningRate`."""
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(f"{path}.{key}" if path else key, inner)]
    return [(path, value if isinstance(value, str) else json.dumps(value))]


def _scores(evaluation: dict[str, Any] | None) -> list[tuple[str, float]]:
    """Every arm's metrics, as `tuned.loss`."""
    arms = (evaluation or {}).get("arms") or []
    named = [(f"{str(arm['name']).lower()}.{metric}", score) for arm in arms for metric, score in (arm.get("metrics") or {}).items()]
    return [(key, float(score)) for key, score in named]
