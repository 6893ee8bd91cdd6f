"""FineTuneJobSpec: what a user asks for. The docstrings are the reference documentation and the CRD's descriptions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import APIModel, Rule
from .scalars import DNSLabel, DNSSubdomain, Duration, QualifiedName, Quantity
from .uris import DatasetURI, ModelURI, PublishURI

Objective = Literal["sft"]
Method = Literal["full", "lora", "qlora"]
DatasetFormat = Literal["auto", "messages", "prompt-completion", "text"]
Strategy = Literal["auto", "ddp", "deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3", "fsdp"]
Metric = Literal["loss", "exact-match"]
ModuleName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")]
LabelMap = Annotated[
    dict[str, Annotated[str, Field(max_length=63, pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$")]],
    Field(max_length=32),
]


class SecretReference(APIModel):
    """A Secret of the job's own namespace."""

    name: DNSSubdomain
    """Name of the Secret."""
    key: Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$", min_length=1, max_length=253)] = "token"
    """Key within the Secret that holds the token; only this key is mounted, only into the stage that needs it."""


class Model(APIModel):
    """The base model."""

    uri: ModelURI
    """Where the base model is: `hf://ORG/MODEL[@REVISION]` or `pvc://CLAIM/PATH` (a folder that `from_pretrained` loads)."""
    secret_ref: SecretReference | None = None
    """Secret with a Hugging Face token for gated or private models."""
    trust_remote_code: bool = False
    """Run Python code that the model repository ships. Leave it off unless you have read that code."""

    RULES = (
        Rule(
            cel="!has(self.secretRef) || self.uri.startsWith('hf://')",
            message="model.secretRef is only used with an hf:// uri; remove it or change model.uri",
            holds=lambda m: m.secret_ref is None or m.uri.startswith("hf://"),
        ),
    )


class TrainDataset(APIModel):
    """The rows to train on."""

    uri: DatasetURI
    """`hf://ORG/DATASET[@REVISION]`, `pvc://CLAIM/PATH` (a .jsonl, .json or .csv file, UTF-8) or `configmap://NAME/KEY`."""
    split: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")] = "train"
    """Split to load from an hf:// data set; other sources have none."""
    secret_ref: SecretReference | None = None
    """Secret with a Hugging Face token for gated or private data sets."""


class EvalDataset(APIModel):
    """The rows that are held out: either a share of the training rows, or a source of their own."""

    split_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training rows held out, chosen by `hyperparameters.seed`; for example 0.1."""
    uri: DatasetURI | None = None
    """A source of its own for the held-out rows, with the same schemes as `train.uri`."""
    split: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")] = "test"
    """Split to load from an hf:// data set; other sources have none."""

    RULES = (
        Rule(
            cel="has(self.splitFraction) != has(self.uri)",
            message="dataset.eval takes exactly one of splitFraction and uri; set one and remove the other",
            holds=lambda m: (m.split_fraction is None) != (m.uri is None),
        ),
    )


class DatasetChecks(APIModel):
    """What prepare does about the rows it finds."""

    min_examples: Annotated[int, Field(ge=1, le=100_000_000)] = 50
    """Fewest usable training rows; with fewer the job fails before it asks for a GPU."""
    duplicates: Literal["drop", "keep", "fail"] = "drop"
    """Exact duplicates among training rows: drop all but the first, keep them, or fail."""
    leakage: Literal["fail", "drop", "ignore"] = "fail"
    """Held-out rows that also stand in the training rows: fail, drop them from training, or ignore."""
    too_long: Literal["truncate", "drop", "fail"] = "truncate"
    """Rows longer than `hyperparameters.maxLength` tokens: truncate, drop, or fail."""
    invalid_rows: Literal["fail", "drop"] = "fail"
    """Rows that cannot be read or have broken roles or empty answers: fail with their line numbers, or drop them."""


class Dataset(APIModel):
    """The data: where it is, what it looks like, how strictly it is checked."""

    train: TrainDataset
    """The rows to train on."""
    eval: EvalDataset | None = None
    """The held-out rows that base and tuned model are compared on. Never trained on."""
    format: DatasetFormat = "auto"
    """`messages` (chat turns), `prompt-completion` or `text`; `auto` looks at the first rows and says what it found."""
    checks: DatasetChecks = Field(default_factory=DatasetChecks)
    """What prepare does about duplicates, leakage, and rows that are too long or broken."""


class Lora(APIModel):
    """Low-rank adaptation, https://arxiv.org/abs/2106.09685."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the update matrices."""
    alpha: Annotated[int, Field(ge=1, le=4096)] = 32
    """Scaling numerator; the update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout on the input of the adapter."""
    target_modules: Annotated[list[ModuleName], Field(min_length=1, max_length=64)] = ["all-linear"]
    """Module names that get an adapter; `all-linear` means every linear layer except the output head."""

    RULES = (
        Rule(
            cel="!self.targetModules.exists(m, m == 'all-linear') || size(self.targetModules) == 1",
            message="lora.targetModules: 'all-linear' stands alone; remove it or the module names beside it",
            holds=lambda m: "all-linear" not in m.target_modules or len(m.target_modules) == 1,
        ),
    )


class Hyperparameters(APIModel):
    """How the training runs. Names follow Hugging Face's TrainingArguments where there is one."""

    epochs: Annotated[float, Field(gt=0, le=1000)] = 3
    """Passes over the training rows. Ignored when maxSteps is set."""
    max_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Optimizer steps to run instead of epochs."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate. Typical: 1e-4 to 3e-4 for LoRA, 1e-5 to 5e-5 for full fine-tuning."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Learning-rate schedule."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps spent warming the learning rate up."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """AdamW weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Gradient clipping norm."""
    global_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    """Rows per optimizer step over all workers; kept by gradient accumulation whatever the world size."""
    max_length: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Longest row in tokens."""
    packing: bool = False
    """Pack several short rows into one sequence of maxLength tokens."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: Annotated[int, Field(ge=0, le=4_294_967_295)] = 42
    """Seed of data order, initialisation and splits."""


class Tuning(APIModel):
    """What is learned, and how."""

    objective: Objective = "sft"
    """`sft`: supervised fine-tuning on answers."""
    method: Method = "lora"
    """`lora`: low-rank adapter; `qlora`: the same over a base in 4-bit NF4; `full`: every weight."""
    lora: Lora | None = None
    """Settings of the adapter; only with method lora or qlora."""
    assistant_only_loss: bool = True
    """Learn from answers alone: assistant turns of `messages`, completions of `prompt-completion`."""
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)
    """Learning rate, batch size, length and the like."""

    RULES = (
        Rule(
            cel="!has(self.lora) || self.method in ['lora', 'qlora']",
            message="tuning.lora has no effect with tuning.method full; remove tuning.lora or set method to lora or qlora",
            holds=lambda m: m.lora is None or m.method in ("lora", "qlora"),
        ),
    )


class Distribution(APIModel):
    """The gang: how many worker pods, and how they share the work."""

    nodes: Annotated[int, Field(ge=1, le=512)] = 1
    """Worker pods. They start, fail and restart together."""
    gpus_per_node: Annotated[int, Field(ge=0, le=16)] = 1
    """GPUs per worker pod, one process each; 0 trains on CPU with one process per pod."""
    strategy: Strategy = "auto"
    """How the processes share model and optimizer state; `auto` decides in prepare and says so in `status.plan`."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """Keep optimizer state, or parameters too, in host memory. DeepSpeed only."""
    per_device_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Rows per process and forward pass. Unset: the largest up to 8 that divides globalBatchSize evenly."""

    RULES = (
        Rule(
            cel="self.strategy != 'fsdp' || self.gpusPerNode > 0",
            message="distribution.strategy fsdp needs GPUs: set distribution.gpusPerNode to 1 or more, or use ddp or a deepspeed strategy",
            holds=lambda m: m.strategy != "fsdp" or m.gpus_per_node > 0,
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
    """CPU cores, for example "4" or 500m."""
    memory: Quantity | None = None
    """Memory, for example 16Gi."""


class Resources(APIModel):
    """What a worker pod asks for beside its GPUs."""

    gpu_resource_name: QualifiedName = "nvidia.com/gpu"
    """Extended resource that stands for a GPU, MIG slices and shared GPUs by their own names too."""
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
    """Queue in which the job waits for GPUs. Unset: the cluster's implicit queue."""
    priority_class_name: DNSSubdomain | None = None
    """PriorityClass of the worker pods."""
    node_selector: LabelMap = Field(default_factory=dict)
    """Labels that a node must have."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = Field(default_factory=list)
    """Taints that the pods tolerate."""


class Checkpoint(APIModel):
    """When state is saved, and how much of it is kept."""

    every: Duration = "10m"
    """Longest time between two checkpoints."""
    every_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Also save after so many optimizer steps."""
    keep: Annotated[int, Field(ge=1, le=100)] = 2
    """Newest checkpoints kept in the workspace."""


class RunPolicy(APIModel):
    """Limits and controls on the run."""

    suspend: bool = False
    """Stop and give the GPUs back; set to false to go on from the last checkpoint. May be changed at any time."""
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 5
    """Gang restarts after failures of the infrastructure before the job fails. May be changed at any time."""
    active_deadline: Duration | None = None
    """Longest time from the job's creation to its end; then it fails with DeadlineExceeded."""
    gang_timeout: Duration = "10m"
    """Longest time for all pods of a stage to start; then they are released and the start is tried again later."""
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


class Gate(APIModel):
    """The condition under which the tuned model is published."""

    metric: Metric = "loss"
    """Metric compared between base and tuned model; lower is better for loss, higher for exact-match."""
    min_improvement: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Smallest improvement: relative to the base model's value for loss, absolute for exact-match."""


class Evaluation(APIModel):
    """Comparison of base and tuned model on the held-out rows, with the same prompts and seed."""

    metrics: Annotated[list[Metric], Field(min_length=1, max_length=8, json_schema_extra={"x-kubernetes-list-type": "set"})] = ["loss"]
    """Metrics to compute: `loss` (mean negative log-likelihood per answer token), `exact-match` (greedy answers that are equal)."""
    gate: Gate | None = None
    """Publish only if this holds. Unset: publish always."""
    max_examples: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    """Most held-out rows to use."""
    max_new_tokens: Annotated[int, Field(ge=1, le=32_768)] = 128
    """Longest generated answer in tokens, for exact-match."""

    RULES = (
        Rule(
            cel="self.metrics.all(m, self.metrics.exists_one(n, n == m))",
            message="evaluation.metrics lists a metric twice; remove one",
            holds=lambda m: len(set(m.metrics)) == len(m.metrics),
        ),
        Rule(
            cel="!has(self.gate) || self.gate.metric in self.metrics",
            message="evaluation.gate.metric is not among evaluation.metrics; add it there or gate on another metric",
            holds=lambda m: m.gate is None or m.gate.metric in m.metrics,
        ),
    )


class PublishTarget(APIModel):
    """A place that receives the adapter (or the model, for method full) with its model card."""

    uri: PublishURI
    """`pvc://CLAIM/PATH` or `hf://ORG/MODEL`."""
    secret_ref: SecretReference | None = None
    """Secret with a token that may write to an hf:// target."""

    RULES = (
        Rule(
            cel="has(self.secretRef) == self.uri.startsWith('hf://')",
            message="publish: an hf:// target needs secretRef with a write token, and a pvc:// target takes none",
            holds=lambda m: (m.secret_ref is not None) == m.uri.startswith("hf://"),
        ),
    )


class FineTuneJobSpec(APIModel):
    """What to tune, on what data, how, on which hardware, and where to publish the result."""

    model: Model
    """The base model."""
    dataset: Dataset
    """The data to learn from and to evaluate on."""
    tuning: Tuning = Field(default_factory=Tuning)
    """Objective, method and hyperparameters."""
    distribution: Distribution = Field(default_factory=Distribution)
    """Worker pods, GPUs and the parallel strategy."""
    resources: Resources = Field(default_factory=Resources)
    """CPU, memory and shared memory of each worker pod."""
    scheduling: Scheduling = Field(default_factory=Scheduling)
    """Queue, priority and node constraints."""
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """When training state is saved."""
    run_policy: RunPolicy = Field(default_factory=RunPolicy)
    """Suspension, restarts, deadlines, clean-up."""
    workspace: Workspace = Field(default_factory=Workspace)
    """The volume that all stages share."""
    evaluation: Evaluation | None = None
    """Compare the tuned model with its base. Unset: no eval job."""
    publish: Annotated[
        list[PublishTarget],
        Field(max_length=8, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["uri"]}),
    ] = Field(default_factory=list)
    """Where the result goes, in order. Empty: it stays in the workspace."""

    RULES = (
        Rule(
            cel="!has(self.evaluation) || has(self.dataset.eval)",
            message="evaluation needs held-out rows: set dataset.eval.splitFraction (for example 0.1) or dataset.eval.uri, or remove evaluation",
            holds=lambda m: m.evaluation is None or m.dataset.eval is not None,
        ),
        Rule(
            cel="self.tuning.method != 'qlora' || !(self.distribution.strategy in ['deepspeed-zero3', 'fsdp'])",
            message="tuning.method qlora does not shard its 4-bit base: set distribution.strategy to auto, ddp, deepspeed-zero1 or deepspeed-zero2",
            holds=lambda m: m.tuning.method != "qlora" or m.distribution.strategy not in ("deepspeed-zero3", "fsdp"),
        ),
        Rule(
            cel="self.tuning.hyperparameters.globalBatchSize % (self.distribution.nodes * (self.distribution.gpusPerNode > 0 ? self.distribution.gpusPerNode : 1)) == 0",
            message="tuning.hyperparameters.globalBatchSize must be a multiple of the number of processes (distribution.nodes x gpusPerNode, or x 1 on CPU); change one of them",
            holds=lambda m: m.tuning.hyperparameters.global_batch_size % m.world_size == 0,
        ),
        Rule(
            cel="!has(self.distribution.perDeviceBatchSize) || self.tuning.hyperparameters.globalBatchSize % (self.distribution.perDeviceBatchSize * self.distribution.nodes * (self.distribution.gpusPerNode > 0 ? self.distribution.gpusPerNode : 1)) == 0",
            message="tuning.hyperparameters.globalBatchSize must be a multiple of distribution.perDeviceBatchSize x the number of processes; change one of them",
            holds=lambda m: (
                m.distribution.per_device_batch_size is None
                or m.tuning.hyperparameters.global_batch_size % (m.distribution.per_device_batch_size * m.world_size) == 0
            ),
        ),
        Rule(
            cel="!has(self.workspace.template) || self.workspace.template.accessMode == 'ReadWriteMany' || self.distribution.nodes == 1",
            message="workspace.template.accessMode ReadWriteOnce allows one node: set it to ReadWriteMany, or distribution.nodes to 1",
            holds=lambda m: (
                m.workspace.template is None or m.workspace.template.access_mode == "ReadWriteMany" or m.distribution.nodes == 1
            ),
        ),
    )

    @property
    def world_size(self) -> int:
        """Training processes over all worker pods: one per GPU, or one per pod on CPU."""
        return self.distribution.nodes * max(1, self.distribution.gpus_per_node)

    @property
    def source_uris(self) -> list[str]:
        """Where the job reads from: the model, the training rows, the held-out rows that have a source of their own."""
        held_out = self.dataset.eval.uri if self.dataset.eval is not None else None
        return [self.model.uri, self.dataset.train.uri, *([held_out] if held_out is not None else [])]
