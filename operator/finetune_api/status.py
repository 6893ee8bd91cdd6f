"""FineTuneJobStatus: what the operator observed. Derived from the cluster, never from what it wrote before alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from .base import APIModel
from .evaluation_status import EvaluationStatus
from .scalars import REASON_PATTERN, Count, DecimalText, LabelKey, Name, Timestamp, Told, Word
from .spec.run import Toleration
from .versions import BaseModelReference, VersionNumber

Phase = Literal[
    "Pending",
    "Preparing",
    "Queued",
    "Starting",
    "Training",
    "Evaluating",
    "Publishing",
    "Succeeded",
    "Failed",
    "Suspended",
]
ConditionType = Literal[
    "Ready",
    "Stalled",
    "Accepted",
    "DataReady",
    "TargetsReady",
    "QuotaReserved",
    "Admitted",
    "Evicted",
    "Preempted",
    "Running",
    "Trained",
    "Evaluated",
    "Published",
    "Suspended",
    "Succeeded",
    "Failed",
    "Finished",
]
SAID_BY_OTHERS: tuple[ConditionType, ...] = ("Ready", "Stalled", "QuotaReserved", "Evicted", "Preempted", "Finished")
"""Conditions that say again, in the terms of other tools (kstatus, Kueue), what the rest say"""
Text = Annotated[str, Told(32_768)]
Attempt = Annotated[int, Field(ge=0, le=999_999_999)]
"""As many as a pod's label tells apart"""


class Condition(APIModel):
    """One observation about the job, by the Kubernetes API conventions (metav1.Condition)."""

    type: Annotated[str, Field(max_length=316)]
    """Type of the condition, for example DataReady."""
    status: Literal["True", "False", "Unknown"]
    """True, False or Unknown."""
    reason: Annotated[str, Field(min_length=1, max_length=1024, pattern=REASON_PATTERN)]
    """CamelCase reason for the last transition; docs/reference lists them."""
    message: Text = ""
    """What happened, for people, and what to do about it."""
    last_transition_time: Timestamp
    """When the status last changed."""
    observed_generation: Count = 0
    """metadata.generation that this condition was set for."""


class Progress(APIModel):
    """The last report of training rank 0."""

    step: Count = 0
    """Optimizer steps done."""
    total_steps: Count = 0
    """Optimizer steps in all."""
    epoch: DecimalText = 0
    """Passes over the training rows done."""
    percent: Annotated[int, Field(ge=0, le=100)] = 0
    """Share of the steps done."""
    loss: DecimalText | None = None
    """Training loss of the last logged step."""
    eval_loss: DecimalText | None = None
    """Loss on the held-out rows at the last evaluation during training."""
    learning_rate: DecimalText | None = None
    """Learning rate of the last logged step."""
    tokens_per_second: DecimalText | None = None
    """Non-padding tokens per second over all workers, since the start of this attempt."""
    eta: Word | None = None
    """Estimated time left in training."""
    reported_at: Timestamp | None = None
    """When the operator last heard from rank 0."""


class DatasetStatus(APIModel):
    """What prepare found in the data."""

    train: Count = 0
    """Training rows."""
    eval: Count = 0
    """Held-out rows."""
    tokens: Count = 0
    """Tokens in the training rows, after truncation."""
    format: Word = ""
    """Format of the rows."""
    dropped: Annotated[dict[Word, Count], Field(max_length=64)] = Field(default_factory=dict)
    """Rows left out, by cause."""
    warnings: Annotated[dict[Word, Count], Field(max_length=64)] = Field(default_factory=dict)
    """Rows that were kept but look wrong, by cause; the report in the workspace shows them."""
    unused_keys: Annotated[dict[Word, Count], Field(max_length=64)] = Field(default_factory=dict)
    """Rows by key that holds something and is not used: the commonest; the report in the workspace has all."""
    digest: Word = ""
    """sha256 of the prepared rows, which are what trains and evaluates."""


class Plan(APIModel):
    """How the work is spread; fixed in prepare, before GPUs are asked for."""

    world_size: Annotated[int, Field(ge=1, le=1_000_000)]
    """Training processes over all worker pods."""
    per_device_batch_size: Annotated[int, Field(ge=1, le=1_000_000)]
    """Rows per process and forward pass."""
    gradient_accumulation: Annotated[int, Field(ge=1, le=1_000_000)]
    """Forward passes per optimizer step."""
    strategy: Word
    """The parallel strategy in use."""
    offload: Word = "none"
    """What is kept in host memory: none, optimizer or parameters."""
    gradient_checkpointing: bool = False
    """Whether activations are recomputed in the backward pass."""
    estimated_memory_per_gpu: Word = Field(default="", alias="estimatedMemoryPerGPU")
    """Estimated peak memory of one process, for example 61Gi; docs/memory.md states the error."""
    total_steps: Count = 0
    """Optimizer steps in all."""
    estimated_petaflops: Annotated[DecimalText, Field(ge=0)] = 0.0
    """Estimated floating-point operations of the whole training, times 10^15; 0 where nothing is estimated."""
    reason: Annotated[str, Told(1024)] = ""
    """Why this strategy and batch size were chosen."""

    @property
    def global_batch_size(self) -> int:
        """Rows per optimizer step over all processes."""
        return self.world_size * self.per_device_batch_size * self.gradient_accumulation

    def nodes(self, gpus_per_node: int) -> int:
        """Worker pods: fewer than the job asked for while an elastic gang waits for room."""
        return self.world_size // max(1, gpus_per_node)

    def spread_over(self, world_size: int) -> Plan:
        """The same steps by another number of processes: the global batch stays, no process takes more rows at once.

        Raises ValueError when the global batch cannot be divided evenly.
        """
        share, rest = divmod(self.global_batch_size, world_size)
        if rest or not share:
            raise ValueError(f"a global batch of {self.global_batch_size} rows cannot be divided over {world_size} processes")
        at_once = max(n for n in range(1, min(share, self.per_device_batch_size) + 1) if share % n == 0)
        update = {"world_size": world_size, "per_device_batch_size": at_once, "gradient_accumulation": share // at_once}
        return self.model_copy(update=update)


class CheckpointStatus(APIModel):
    """The newest complete checkpoint."""

    step: Count
    """Optimizer step it was taken at."""
    saved_at: Timestamp | None = None
    """When it was saved."""
    every: Word | None = None
    """Time between two checkpoints: as asked for, or from what one costs."""
    resumed_from: Count | None = None
    """Step that the present attempt began from."""
    skipped: Annotated[list[Count], Field(max_length=8)] = []
    """Steps of checkpoints that it passed over because they were incomplete or damaged."""


class Artifact(APIModel):
    """Something that was published and verified."""

    uri: Annotated[str, Told(1024)]
    """Where it is."""
    digest: Word
    """sha256 over the published files' names and contents."""
    bytes: Count
    """Size of the published files."""
    model: Name | None = None
    """FineTunedModel that it is a version of."""
    version: Count | None = None
    """Its number there."""
    rank: Count | None = None
    """Largest rank of a LoRA adapter; 0 for a whole model."""


class ModelInUse(APIModel):
    """A FineTunedModel that the job refers to, as it was when the job began: what becomes of it later does not change the job."""

    name: Name
    """Its name."""
    storage: Annotated[str, Told(1024)]
    """Where its versions are kept."""
    s3_endpoint: Annotated[str, Told(512)] | None = None
    """Address of an S3-compatible server."""
    secret: Name = ""
    """Secret with the keys of an s3:// storage."""
    version: VersionNumber | None = None
    """Version that `tuning.continueFrom` goes on from: the one that it names, or the champion of then."""


class ExportedForm(APIModel):
    """A form of the model beside the adapter, and what it answered to the probes before it was published."""

    name: Word
    """Its place in the published folder."""
    bytes: Count
    """Size of its files."""
    state: Literal["Verified", "Unverifiable"] = "Unverifiable"
    """Verified: nearer to the tuned model than to its base, as a replica has to be. Unverifiable: the two cannot be told apart, or it cannot be asked."""
    probes: Count = 0
    """Prompts that it was asked."""
    nearer: Count = 0
    """Those on which it is nearer to the tuned model."""
    equal_answers: Count = 0
    """Those to which its greedy answer is the tuned model's."""
    difference: DecimalText = 0.0
    """Of its log-probabilities from the tuned model's: mean, in nats a token."""
    distance: DecimalText = 0.0
    """The same between the base and the tuned model."""


class Restart(APIModel):
    """A gang restart, and why it was needed."""

    attempt: Attempt
    """The attempt that ended."""
    cause: Word = ""
    """Class of the failure: Infrastructure, OutOfMemory, Hang, Disruption, Stopped, or UserError where a failurePolicy restarts it."""
    reason: Annotated[str, Told(1024)]
    """CamelCase reason; docs/errors.md lists them."""
    pod: Name = ""
    """The pod that failed first."""
    node: Name = ""
    """The node it ran on."""
    checkpoint_step: Count | None = None
    """Step of the newest checkpoint then: what the next attempt goes on from."""
    message: Text = ""
    """Its last words."""
    time: Timestamp
    """When it was noticed."""
    counted: bool = True
    """Whether it counts towards runPolicy.maxRestarts."""


class Gang(APIModel):
    """The worker pods of the current attempt, recorded once all of them exist."""

    attempt: Attempt
    """Attempt these pods belong to."""
    pod_uids: Annotated[list[Word], Field(max_length=512)] = Field(default_factory=list)
    """UIDs by rank: a pod that is recorded here and gone was deleted, one that is not was never made."""
    started_at: Timestamp
    """When the gang's pods were first asked for."""
    running_since: Timestamp | None = None
    """When all of them ran."""
    avoided_nodes: Annotated[list[Name], Field(max_length=16)] = []
    """Nodes that jobs kept failing on lately: the scheduler was asked for others."""


class TopologyDomain(APIModel):
    """Where the gang is kept together."""

    key: LabelKey
    """Node label."""
    value: Word
    """Its value."""


class AdmissionStatus(APIModel):
    """What the gang was admitted to. Meaningful while the condition Admitted is True."""

    queue: Name | None = None
    """FineTuneQueue; unset without any."""
    flavor: Name | None = None
    """Its flavor."""
    nodes: Annotated[int, Field(ge=1, le=512)]
    """Worker pods: fewer than asked for where minNodes allows it."""
    node_labels: Annotated[dict[LabelKey, Word], Field(max_length=32)] = Field(default_factory=dict)
    """Labels of the flavor's nodes."""
    tolerations: Annotated[list[Toleration], Field(max_length=16)] = []
    """Taints of the flavor's nodes."""
    topology: TopologyDomain | None = None
    """Where scheduling.topologyKey keeps the gang together."""
    price_per_hour: DecimalText | None = None
    """Price of one unit for an hour."""
    estimated_duration: Word | None = None
    """Estimated time of the whole training, where the flavor says how fast it is; while it runs status.progress.eta is better."""
    estimated_cost: DecimalText | None = None
    """Its price."""
    planned_nodes: Annotated[list[Name], Field(max_length=512)] = []
    """Nodes with room for its pods, by rank; the pods prefer them. Empty where nodes come as they are needed."""
    attempt: Attempt = 0
    """Attempt that it was planned for."""
    admitted_at: Timestamp
    """When."""


class QueueStatus(APIModel):
    """The job's place while it waits."""

    name: Name | None = None
    """FineTuneQueue; unset without any."""
    position: Count | None = None
    """From 1 in the order in which the queue is looked at."""
    message: Annotated[str, Told(4096)] = ""
    """What it waits for."""
    since: Timestamp
    """Since when it has waited this time."""


class SourceWait(APIModel):
    """A hub or server that a stage waits for; `status.retryAfter` says when it is tried again."""

    host: Name = ""
    """Who does not answer."""
    since: Timestamp
    """Since when."""


class StageRetry(APIModel):
    """Tries of a single-pod stage."""

    retries: Count = 0
    """Retries after failures of the infrastructure."""
    waits: Count = 0
    """Tries that are not counted as retries: a hub or server did not answer, or the job's shape was changed."""
    waiting: SourceWait | None = None
    """What the stage waits for."""
    started_at: Timestamp | None = None
    """When the current try was asked for."""

    @property
    def tries(self) -> int:
        """Tries that have ended; the child Job's name ends with it."""
        return self.retries + self.waits


class Usage(APIModel):
    """GPU time of the job."""

    gpu_seconds: Count = 0
    """GPU-seconds held by ended attempts."""
    queued_seconds: Count = 0
    """Seconds that the job waited for its GPUs."""
    cost: DecimalText | None = None
    """GPU-seconds at the price of their flavor, where it has one."""
    lost_seconds: Count = 0
    """Seconds of training that ended attempts had done since their last checkpoint."""


class Status(APIModel):
    """What the status of every kind of ours can: it has conditions, and on the wire what is empty is left out."""

    if TYPE_CHECKING:
        conditions: list[Condition]

    def condition(self, type_: str) -> Condition | None:
        """The condition of that type, if set."""
        return next((c for c in self.conditions if c.type == type_), None)

    def is_true(self, type_: str) -> bool:
        """Whether the condition of that type is set and True."""
        found = self.condition(type_)
        return found is not None and found.status == "True"

    def to_wire(self, *, exclude_unset: bool = False) -> dict[str, Any]:
        """As plain JSON types. What is empty is left out: it says nothing."""
        wire: dict[str, Any] = _without_empty(super().to_wire(exclude_unset=exclude_unset))
        return wire


class FineTuneJobStatus(Status):
    """What the operator observed."""

    phase: Phase = "Pending"
    """Summary of the conditions for people."""
    observed_generation: Count = 0
    """metadata.generation that this status was derived from."""
    conditions: Annotated[
        list[Condition],
        Field(max_length=32, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
    ] = Field(default_factory=list)
    """Observations by the Kubernetes API conventions; phase summarises them."""
    attempt: Attempt = 0
    """Gang restarts so far."""
    restarts: Annotated[list[Restart], Field(max_length=20)] = Field(default_factory=list)
    """The last restarts with their causes, newest last."""
    restarts_counted: Count = 0
    """Restarts that count towards runPolicy.maxRestarts."""
    retry_after: Timestamp | None = None
    """When the next start is tried, during back-off."""
    admission: AdmissionStatus | None = None
    """What the gang was admitted to."""
    queue: QueueStatus | None = None
    """The job's place while it waits."""
    gang: Gang | None = None
    """The worker pods of the current attempt."""
    stages: Annotated[dict[Word, StageRetry], Field(max_length=8)] = Field(default_factory=dict)
    """Tries of prepare, evaluate and publish."""
    progress: Progress | None = None
    """The last report of training rank 0."""
    models: Annotated[
        list[ModelInUse],
        Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}),
    ] = Field(default_factory=list)
    """FineTunedModels that the job publishes to, or goes on from."""
    base: BaseModelReference | None = None
    """The base as prepare found it: what a branch stood for, and what its weights are."""
    dataset: DatasetStatus | None = None
    """What prepare found."""
    plan: Plan | None = None
    """How the work is spread."""
    checkpoint: CheckpointStatus | None = None
    """The newest complete checkpoint."""
    evaluation: EvaluationStatus | None = None
    """The tuned model against its base."""
    artifacts: Annotated[list[Artifact], Field(max_length=8)] = Field(default_factory=list)
    """What was published."""
    forms: Annotated[list[ExportedForm], Field(max_length=16)] = Field(default_factory=list)
    """What `spec.output` asked for, as it was published."""
    usage: Usage = Field(default_factory=Usage)
    """GPU time."""
    total_gpus: Count = 0
    """GPUs of the gang, for the printer column."""
    started_at: Timestamp | None = None
    """When the operator first saw the job."""
    finished_at: Timestamp | None = None
    """When the job succeeded or failed."""

    @property
    def finished(self) -> bool:
        """Whether the job has ended; an ended job never changes again."""
        return self.is_true("Succeeded") or self.is_true("Failed")


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items() if item not in ("", [], {})}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value
