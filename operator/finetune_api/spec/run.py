"""Where and how long a job runs: the gang, its resources, checkpoints, limits, the workspace."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..base import APIModel, Rule, Unique
from ..scalars import DNSLabel, DNSSubdomain, Duration, LabelMap, QualifiedName, Quantity

Strategy = Literal["auto", "ddp", "deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3", "fsdp"]


class Distribution(APIModel):
    """The gang: how many worker pods, and how they share the work."""

    nodes: Annotated[int, Field(ge=1, le=512)] = 1
    """Worker pods. They start, fail and restart together."""
    min_nodes: Annotated[int, Field(ge=1, le=512)] | None = None
    """Fewest worker pods to begin with while there is no room for `nodes`; the gang grows at a checkpoint when there is. Unset: all or none."""
    gpus_per_node: Annotated[int, Field(ge=0, le=16)] = 1
    """GPUs per worker pod, one process each; 0 trains on CPU with one process per pod."""
    strategy: Strategy = "auto"
    """How the processes share model and optimizer state; `auto` decides in prepare and says so in `status.plan`."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """Keep optimizer state, or parameters too, in host memory. DeepSpeed only."""
    per_device_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Rows per process and forward pass. Unset: the largest up to 8 that divides globalBatchSize evenly and fits."""

    RULES = (
        Rule(
            cel="!has(self.minNodes) || self.minNodes <= self.nodes",
            message="distribution.minNodes is more than distribution.nodes; lower it or raise nodes",
            holds=lambda m: m.min_nodes is None or m.min_nodes <= m.nodes,
        ),
        Rule(
            cel="self.offload == 'none' || self.strategy in ['deepspeed-zero2', 'deepspeed-zero3']",
            message="distribution.offload needs distribution.strategy deepspeed-zero2 or deepspeed-zero3; set one, or offload to none",
            holds=lambda m: m.offload == "none" or m.strategy in ("deepspeed-zero2", "deepspeed-zero3"),
        ),
        Rule(
            cel="self.offload != 'parameters' || self.strategy == 'deepspeed-zero3'",
            message="distribution.offload parameters needs distribution.strategy deepspeed-zero3",
            holds=lambda m: m.offload != "parameters" or m.strategy == "deepspeed-zero3",
        ),
    )


class ComputeResources(APIModel):
    """CPU and memory of a pod."""

    cpu: Quantity | None = None
    """CPU cores, for example 4 or 500m."""
    memory: Quantity | None = None
    """Memory, for example 16Gi."""


class Resources(APIModel):
    """What a worker pod asks for beside its GPUs."""

    gpu_resource_name: QualifiedName = "nvidia.com/gpu"
    """Extended resource that stands for a GPU, MIG slices and shared GPUs by their own names too."""
    gpu_memory: Quantity | None = None
    """Memory of one GPU, for example 80Gi. Set it, and prepare chooses batch, checkpointing, sharding and offload to fit, or refuses."""
    requests: ComputeResources = Field(default_factory=ComputeResources)
    """Requested CPU and memory of each worker pod."""
    limits: ComputeResources = Field(default_factory=ComputeResources)
    """Limits on CPU and memory of each worker pod."""
    shared_memory: Quantity = "1Gi"
    """Size of /dev/shm, which NCCL and data loaders use; it counts towards the memory limit."""


class Toleration(APIModel):
    """A toleration of a node's taint, as in a pod's spec."""

    key: Annotated[str, Field(max_length=317)] = ""
    """Taint key; empty with operator Exists tolerates every taint."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """`Exists` or `Equal`."""
    value: Annotated[str, Field(max_length=63)] = ""
    """Taint value for operator Equal."""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    """Taint effect; empty means all."""


class Scheduling(APIModel):
    """Where the pods may run, and in which queue the job waits."""

    queue: DNSLabel | None = None
    """FineTuneQueue in which the job waits for GPUs. Unset: the one that the namespace's annotation finetune.dev/queue names, else `default`; without any FineTuneQueue one implicit queue over all nodes."""
    priority_class_name: DNSSubdomain | None = None
    """PriorityClass of the worker pods."""
    node_selector: LabelMap = Field(default_factory=dict)
    """Labels that a node must have."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = Field(default_factory=list)
    """Taints that the pods tolerate."""
    topology_key: QualifiedName | None = None
    """Node label of which all pods of the gang must share one value, for example topology.kubernetes.io/zone or a rack's label."""


class Checkpoint(APIModel):
    """When state is saved, and how much of it is kept."""

    every: Duration | None = None
    """Longest time between two checkpoints. Unset: between 1 minute and 1 hour, from what a checkpoint costs (Young and Daly)."""
    every_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Also save after so many optimizer steps."""
    keep: Annotated[int, Field(ge=1, le=100)] = 2
    """Newest checkpoints kept in the workspace."""


FailureCause = Literal["UserError", "OutOfMemory", "Infrastructure", "Hang", "Disruption"]
FailureAction = Literal["FailJob", "RestartGang", "RestartGangAndIgnoreMaxRestarts"]


class ExitCodes(APIModel):
    """Exit codes of the pod that failed first."""

    operator: Literal["In", "NotIn"] = "In"
    """`In` or `NotIn`."""
    values: Annotated[list[Annotated[int, Field(ge=1, le=255)]], Field(min_length=1, max_length=255), Unique()]
    """The codes."""


class FailureRule(APIModel):
    """What to do about a failure of the gang that matches everything given here; a rule that gives nothing matches all."""

    action: FailureAction
    """Fail the job, restart the gang from its last checkpoint, or restart it without counting towards maxRestarts."""
    on_causes: Annotated[list[FailureCause], Field(max_length=5), Unique()] = []
    """Causes as in `status.restarts[].cause`."""
    on_reasons: Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=32), Unique()] = []
    """Reasons as in docs/errors.md, for example NonFiniteLoss."""
    on_exit_codes: ExitCodes | None = None
    """Exit codes of the pod that failed first."""


class FailurePolicy(APIModel):
    """Rules about failures of the gang."""

    rules: Annotated[list[FailureRule], Field(max_length=20)] = []
    """The first rule that matches decides; without one, user errors fail the job and the rest restarts the gang."""


class RunPolicy(APIModel):
    """Limits and controls on the run."""

    suspend: bool = False
    """Stop and give the GPUs back; set to false to go on from the last checkpoint. May be changed at any time."""
    cancel: bool = False
    """End the job now, for good: it fails with Cancelled, its checkpoints and reports stay until it is deleted."""
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 5
    """Gang restarts after failures, without a new checkpoint between them, before the job fails. Disruptions do not count. May be changed at any time."""
    failure_policy: FailurePolicy | None = None
    """Rules about failures of the gang, in order, for what the default does not suit. May be changed at any time."""
    active_deadline: Duration | None = None
    """Longest time from the job's creation to its end; then it fails with DeadlineExceeded."""
    gang_timeout: Duration = "10m"
    """Longest time for all pods of a stage to start; then they are released and the start is tried again later."""
    stage_timeout: Duration = "12h"
    """Longest time for one try of prepare, evaluate or publish, which is then tried again; and for a hub or server that does not answer, then the job fails. May be changed at any time."""
    hang_timeout: Duration | None = None
    """Longest time for a training step, an evaluation or a checkpoint before the gang is restarted. Unset: ten times the longest so far, at least 3 minutes for a step."""
    ttl_after_finished: Duration | None = None
    """Delete the job, its pods and its own workspace so long after it finished. Published artifacts stay."""


class WorkspaceClaim(APIModel):
    """An existing PersistentVolumeClaim of the job's namespace."""

    claim_name: DNSSubdomain
    """Name of the claim; it must allow ReadWriteMany when distribution.nodes is over 1."""


class WorkspaceTemplate(APIModel):
    """A claim that the operator makes for this job, and that is deleted with it."""

    storage: Quantity = "20Gi"
    """Size of the volume."""
    storage_class_name: DNSSubdomain | None = None
    """StorageClass; unset means the cluster's default."""
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] = "ReadWriteMany"
    """ReadWriteMany for gangs over several nodes."""


class Workspace(APIModel):
    """The volume that all stages share: model cache, data, checkpoints, output, reports."""

    persistent_volume_claim: WorkspaceClaim | None = None
    """Use an existing claim. Unset: the operator makes one from `template`."""
    template: WorkspaceTemplate | None = None
    """How the operator makes the claim."""

    RULES = (
        Rule(
            cel="!(has(self.persistentVolumeClaim) && has(self.template))",
            message="workspace takes persistentVolumeClaim or template, not both; remove one",
            holds=lambda m: m.persistent_volume_claim is None or m.template is None,
        ),
    )
