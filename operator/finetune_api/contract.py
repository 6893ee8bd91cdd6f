"""The contract between the operator (or `finetune run --local`) and the trainer.

Exit codes, termination messages, the workspace layout, `job.json`, and progress reports. Both sides import
this module, so neither can drift from the other.
"""

from __future__ import annotations

import enum
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from .base import APIModel
from .scalars import REASON_PATTERN, Count, human_duration
from .spec import FineTuneJobSpec
from .status import Artifact, DatasetStatus, ExportedForm, Plan, Progress
from .versions import BaseModelReference, VersionNumber, VersionRecord, VersionState

Stage = Literal["prepare", "check", "train", "evaluate", "publish"]
"""Check runs beside prepare, where something is to be published: with the secrets and targets of publish, and nothing else."""

#: Kubernetes keeps 4096 bytes of a termination message
TERMINATION_MESSAGE_LIMIT = 4096
PROGRESS_BODY_LIMIT = 16 * 1024
CATALOG_BODY_LIMIT = 16 * 1024 * 1024
"""Of a CatalogReport: a record has at most a few kilobytes."""
CATALOG = "catalog"
"""The stage of a FineTunedModel: it belongs to no job."""


class ExitCode(enum.IntEnum):
    """What a stage's exit code means to the operator. Codes below 10 and above 99 are left to the runtime."""

    DONE = 0
    USER_ERROR = 10
    """Bad data or settings: never retried."""
    OUT_OF_MEMORY = 11
    """Retried with half the per-device batch and twice the accumulation."""
    INFRASTRUCTURE = 12
    """Retried from the last checkpoint."""
    STOPPED = 13
    """Stopped on request, with a checkpoint saved if a step ended in the grace period: not counted as a restart."""
    HANG = 14
    """No step ended for too long; the stacks are in the log. Retried from the last checkpoint."""
    SOURCE_UNAVAILABLE = 15
    """A hub or server did not answer, or asked for patience: tried again within runPolicy.stageTimeout."""


WAITING_FOR_SOURCE = "WaitingForSource"
"""Reason of a stage that ended with SOURCE_UNAVAILABLE, and of the condition meanwhile."""
VERSION_REFUSED = "VersionRefused"
"""Reason of a replica's `fetch` where the files of the version are not what was published: the same files are refused again."""
PEER_LOST = "PeerLost"
"""Reason of a worker that ended because another one did: its pod is not the one to blame."""


class Mounts:
    """Where things are inside a stage's container."""

    JOB = "/etc/finetune/job"
    WORKSPACE = "/workspace"
    SOURCES = "/sources"
    TARGETS = "/targets"
    SECRETS = "/var/run/finetune/secrets"
    TOKEN = "/var/run/finetune/progress"
    TERMINATION_LOG = "/dev/termination-log"
    MODEL_FILE = f"{JOB}/model.json"
    """CatalogFile of the stage `catalog`."""
    AUTHORITIES = f"{JOB}/authorities.crt"
    """Certificate authorities of an administrator, trusted beside the system's."""


class Env:
    """Environment variables that differ between pods of one job; all that is common stands in job.json."""

    RANK = "FINETUNE_NODE_RANK"
    ATTEMPT = "FINETUNE_ATTEMPT"
    PLAN = "FINETUNE_PLAN"
    MAIN_ADDRESS = "FINETUNE_MAIN_ADDRESS"
    MAIN_PORT = "FINETUNE_MAIN_PORT"
    PROGRESS_URL = "FINETUNE_PROGRESS_URL"
    GRACE = "FINETUNE_GRACE_SECONDS"
    """Seconds between SIGTERM and SIGKILL."""
    ALLOW_CPU = "FINETUNE_ALLOW_CPU"
    ALLOWED_HOSTS = "FINETUNE_ALLOWED_HOSTS"
    """Hosts, separated by commas, that data may be fetched from although their addresses are not public."""
    HUB = "HF_ENDPOINT"
    """A mirror of the Hugging Face hub, by huggingface_hub's own name for it."""
    S3 = "AWS_ENDPOINT_URL_S3"
    """An S3-compatible server in place of AWS, by the AWS SDKs' own name for it."""
    POD_NAME = "FINETUNE_POD_NAME"
    CHAMPION = "FINETUNE_CHAMPION"
    """For evaluate: JSON of the Champion that is one more arm."""
    PARENT = "FINETUNE_PARENT_PID"
    """Process that this one must not outlive; a pod's first process needs none, the kernel sees to it."""
    RESUME = "FINETUNE_RESUME"
    """Set where prepare goes on with the rows that it prepared before, as `finetune run --local --resume` asks for."""


S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
"""Keys of the Secret of an s3:// source or target, by the AWS SDKs' own names."""
DOCKER_CONFIG = ".dockerconfigjson"
"""Key of the Secret of an oci:// source or target: of type kubernetes.io/dockerconfigjson, as for pulling images."""


class ModelStorage(APIModel):
    """Where a FineTunedModel keeps its versions, as its spec says."""

    storage: str
    """`pvc://CLAIM/PATH` or `s3://BUCKET/PREFIX`; finetune_api/versions.py says what lies below."""
    s3_endpoint: str | None = None
    """Address of an S3-compatible server."""


class Champion(APIModel):
    """The version that a tuned model is compared with: in the environment of evaluate, since it may change while a job runs."""

    model: str
    """FineTunedModel; `JobFile.models` says where it is kept."""
    number: int
    """Its version."""
    digest: str
    """Of its files."""
    ancestors: list[int] = []
    """Versions that it descends from."""


class JobFile(APIModel):
    """job.json: the resolved job, mounted read-only into every stage."""

    name: str
    namespace: str
    uid: str
    run: str | None = None
    """Which run of this job it is, where one job has several: `finetune run --local` keeps them all. Names the folder in place of the UID."""
    spec: FineTuneJobSpec
    sources: dict[str, str] = Field(default_factory=dict)
    """Folder of each claim or ConfigMap that the spec refers to, by `scheme://name`."""
    targets: dict[str, str] = Field(default_factory=dict)
    """Folder of each claim that results are published to, by `pvc://name`."""
    secrets: dict[str, str] = Field(default_factory=dict)
    """Folder that holds each secret's files (`token`, or the keys of an s3:// source), by field: model, adapter, train, mix-0, publish-0 and so on."""
    models: dict[str, ModelStorage] = Field(default_factory=dict)
    """FineTunedModels that the spec refers to, by name; their secrets are in `secrets` by `model-NAME`."""

    def dumps(self) -> str:
        """Deterministic JSON: the same job gives the same bytes."""
        return json.dumps(self.to_wire(), sort_keys=True)

    def layout(self, workspace: str) -> Layout:
        """Where its files are in a workspace."""
        return Layout(workspace, self.namespace, self.name, self.run or self.uid)


class CatalogFile(APIModel):
    """model.json: what the stage `catalog` is to do at a FineTunedModel's storage, mounted read-only.

    It writes states into records, removes the files of versions, and reports every record that is there. It can be run again.
    """

    name: str
    namespace: str
    uid: str
    storage: ModelStorage
    targets: dict[str, str] = Field(default_factory=dict)
    """Folder of the claim, by `pvc://name`."""
    secrets: dict[str, str] = Field(default_factory=dict)
    """Folder of the keys of an s3:// storage, as `storage`."""
    states: dict[Annotated[int, Field(ge=1, strict=False)], VersionState] = Field(default_factory=dict)
    """What the records are to say."""
    remove: list[VersionNumber] = []
    """Versions whose files go; their records stay and say when."""

    def dumps(self) -> str:
        """Deterministic JSON."""
        return json.dumps(self.to_wire(), sort_keys=True)

    @property
    def digest(self) -> str:
        """What is to be done there: `done` of the report once it is."""
        wanted = {"states": {str(number): state for number, state in self.states.items()}, "remove": sorted(self.remove)}
        return "sha256:" + hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()


class CatalogReport(APIModel):
    """What the stage `catalog` sends to the operator: all records, and those that could not be read."""

    done: str
    """`digest` of the CatalogFile that was carried out."""
    records: Annotated[list[VersionRecord], Field(max_length=100_000)] = []
    unreadable: Annotated[list[str], Field(max_length=100)] = []


def catalog_audience(namespace: str, name: str) -> str:
    """Audience of the token that a model's catalog pods report with."""
    return f"https://finetune.dev/namespaces/{namespace}/finetunedmodels/{name}/catalog"


def catalog_path(namespace: str, name: str) -> str:
    """Where the operator's progress server takes a CatalogReport."""
    return f"/v1/namespaces/{namespace}/finetunedmodels/{name}/catalog"


LINEAGE, SUMS = "finetune.json", "SHA256SUMS"
"""What is published with every result: the record of how it was made, and the digests of its files, which come last."""
RESTORED = "Restored"
"""Reason of `check` where every target holds this job's result already, and of the job's success then: its status was lost,
or it was made again from a backup or from Git."""


def result_digest(spec: FineTuneJobSpec) -> str:
    """What makes a job's result what it is: stands in the record that is published with it (`finetune.json`).

    Two jobs of one name and namespace that agree in it are one job that was restored. Where and how long it runs does not count.
    """
    wire = spec.to_wire()
    made_of = {block: wire.get(block) for block in ("model", "dataset", "tuning", "evaluation", "output")}
    return "sha256:" + hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


class MadeFrom(APIModel):
    """What checkpoints were made from. Those of other settings, rows or weights are another run's."""

    tuning: str
    """Digest of `spec.tuning`."""
    rows: str
    """Digest of the rows, those held out too."""
    tokens: str
    """Digest of the training rows as the model sees them: another tokenizer or chat template reads the same rows otherwise."""
    model: str
    """Fingerprint of the base's weights."""
    adapter: str | None = None
    """Fingerprint of the adapter that `tuning.continueFrom` names."""
    teacher: str | None = None
    """Fingerprint of the teacher's weights."""
    strategy: str
    """How optimizer state is cut: `plan.strategy`."""

    @property
    def key(self) -> str:
        """Short digest of all of it."""
        return hashlib.sha256(json.dumps(self.to_wire(), sort_keys=True).encode()).hexdigest()[:12]

    def differences(self, other: MadeFrom) -> list[str]:
        """What differs, for people: settings, rows, model and so on."""
        mine, theirs = self.to_wire(), other.to_wire()
        found = [name for name in type(self).model_fields if mine.get(name) != theirs.get(name)]
        return [_SAID[name] for name in found if name != "tokens" or "rows" not in found]


_SAID = {
    "tuning": "the settings (spec.tuning)",
    "rows": "the rows",
    "tokens": "what the tokenizer and chat template make of the rows",
    "model": "the model's weights",
    "adapter": "the adapter of tuning.continueFrom",
    "teacher": "the teacher's weights",
    "strategy": "the strategy (distribution)",
}


class Identity(APIModel):
    """identity.json in a job's folder: whose checkpoints lie there, and what they were made from."""

    namespace: str
    name: str
    uid: str
    spec: str
    """`result_digest` of the spec."""
    made_from: MadeFrom


def read_identity(path: str | Path) -> Identity | None:
    """What identity.json says, or None where there is none, or one of an older version."""
    try:
        return Identity.model_validate_json(Path(path).read_text())
    except (OSError, ValueError):
        return None


CHECKPOINT_MANIFEST = "finetune-manifest.json"
"""Written last into a checkpoint: it counts when this file is there."""


class StageResult(APIModel):
    """A stage's last words, its termination message: short JSON that reaches the job's conditions."""

    reason: Annotated[str, Field(max_length=128, pattern=REASON_PATTERN)]
    """CamelCase reason, as a condition takes it."""
    message: Annotated[str, Field(max_length=3000)] = ""
    """What happened and what to do, for people."""
    result: dict[str, Any] = Field(default_factory=dict)
    """What the stage found or made: goes into the status."""

    def dumps(self) -> str:
        """JSON within the kubelet's limit; the message is cut when needed, the result never."""
        text = json.dumps(self.to_wire(), ensure_ascii=True)
        over = len(text) - TERMINATION_MESSAGE_LIMIT
        if over <= 0:
            return text
        message = self.message.encode("ascii", "replace").decode()
        shortened = self.model_copy(update={"message": message[: max(0, len(message) - over - 64)] + " ..."})
        return json.dumps(shortened.to_wire(), ensure_ascii=True)


def read_stage_result(text: str) -> StageResult | None:
    """The stage result in a termination message, or None when it holds something else (a log tail, say).

    The pod wrote it, and may have been made to write anything.
    """
    try:
        return StageResult.model_validate(json.loads(text))
    except (ValueError, RecursionError):
        return None


class Prepared(APIModel):
    """What prepare's StageResult holds."""

    base: BaseModelReference | None = None
    dataset: DatasetStatus
    plan: Plan


class Published(APIModel):
    """What publish's StageResult holds."""

    artifacts: Annotated[list[Artifact], Field(max_length=8)] = []
    forms: Annotated[list[ExportedForm], Field(max_length=16)] = []


class Unavailable(APIModel):
    """What the StageResult of a stage holds that ended with SOURCE_UNAVAILABLE."""

    host: Annotated[str, Field(max_length=253)] = ""
    """Who did not answer."""
    retry_after_seconds: Annotated[float, Field(ge=0, le=1e9)] | None = None
    """The patience that it asked for."""


class TrainingResult(APIModel):
    """What train's StageResult holds."""

    steps: Count
    """Optimizer steps done."""
    resumed_from: Count = 0
    """Step of the checkpoint that it began from."""
    loss: float | None = None
    """Of the last step."""
    epoch: Annotated[float, Field(ge=0)] | None = None
    """Passes over the rows."""
    tokens_per_second: Annotated[float, Field(ge=0)] | None = None
    """Over all workers."""
    checkpoint_step: Count | None = None
    """Step of the newest checkpoint."""


class ProgressReport(APIModel):
    """What training rank 0 sends to the operator's progress endpoint."""

    attempt: Count
    step: Count
    total_steps: Count
    epoch: Annotated[float, Field(ge=0)] = 0
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: Annotated[float, Field(ge=0)] | None = None
    eta_seconds: Annotated[float, Field(ge=0, le=1e9)] | None = None
    checkpoint_step: Count | None = None
    checkpoint_every: Annotated[float, Field(ge=0, le=1e9)] | None = None
    resumed_from: Count = 0
    skipped_checkpoints: Annotated[list[Count], Field(max_length=8)] = []


def progress_of(report: ProgressReport, reported_at: str | None = None) -> Progress:
    """The status field that a report becomes, rounded for people."""
    total = report.total_steps
    return Progress(
        step=report.step,
        total_steps=total,
        epoch=round(report.epoch, 3),
        percent=min(100, report.step * 100 // total) if total else 0,
        loss=None if report.loss is None else round(report.loss, 4),
        eval_loss=None if report.eval_loss is None else round(report.eval_loss, 4),
        learning_rate=report.learning_rate,
        tokens_per_second=None if report.tokens_per_second is None else round(report.tokens_per_second, 1),
        eta=None if report.eta_seconds is None else human_duration(report.eta_seconds),
        reported_at=reported_at,
    )


def progress_audience(namespace: str, name: str) -> str:
    """Audience of the token that a job's pods report progress with: good for that job alone."""
    return f"https://finetune.dev/namespaces/{namespace}/finetunejobs/{name}/progress"


class Layout:
    """The workspace: one folder per job (locally per run of it), and a cache that jobs share."""

    def __init__(self, root: str, namespace: str, name: str, uid: str) -> None:
        self.cache = f"{root}/cache"
        self.job = f"{root}/jobs/{namespace}-{name}-{uid[:8]}"
        self.data = f"{self.job}/data"
        self.checkpoints = f"{self.job}/checkpoints"
        self.output = f"{self.job}/output"
        self.earlier = f"{self.job}/earlier"
        """What this job made from something else: checkpoints, output and history, by `MadeFrom.key`."""
        self.identity = f"{self.job}/identity.json"
        self.reports = f"{self.job}/reports"
        self.train_rows = f"{self.data}/train.parquet"
        self.eval_rows = f"{self.data}/eval.parquet"
        self.general_rows = f"{self.data}/general.json"
        self.baseline = f"{self.data}/baseline.json"
        self.teacher_answers = f"{self.data}/teacher.jsonl"
        self.probes = f"{self.data}/probes.json"
        """Probes, made by evaluate: rows of the user's, and no part of what is published but at a FineTunedModel's storage."""
        self.parent_prompts = f"{self.data}/parents.bin"
        """Digests of the prompts that the version of `tuning.continueFrom` and those before it learned from, where that is known."""
        self.plan = f"{self.reports}/plan.json"
        self.data_report = f"{self.reports}/data.json"
        self.data_page = f"{self.reports}/data.html"
        self.evaluation_page = f"{self.reports}/evaluation.html"
        self.history_plot = f"{self.reports}/history.svg"
        self.tensorboard = f"{self.reports}/tensorboard"
        self.evaluation_report = f"{self.reports}/evaluation.json"
        self.forms_report = f"{self.reports}/forms.json"
        self.history = f"{self.reports}/history.jsonl"
        self.devices = f"{self.reports}/devices.json"

    def reference(self, name: str) -> str:
        """Where prepare notes the folder, URI and fingerprint of a model: model, teacher or adapter."""
        return f"{self.data}/{name}.json"
