"""FineTuneJobSpec: the whole of what a user asks for, and the rules that span its blocks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..base import APIModel, Rule
from ..scalars import DomainPrefixedPath
from .data import Dataset
from .evaluation import ANSWER_METRICS, Evaluation, Output, PublishTarget
from .model import Model
from .run import Checkpoint, Distribution, Resources, RunPolicy, Scheduling, Workspace
from .tuning import LORA_METHODS, VIRTUAL_TOKEN_METHODS, Method, Objective, Tuning

FORMATS_OF = {
    "sft": ("messages", "prompt-completion", "text", "alpaca", "sharegpt"),
    "pretrain": ("text",),
    "dpo": ("preference",),
    "orpo": ("preference",),
    "reward": ("preference",),
    "kto": ("unpaired-preference",),
    "grpo": ("messages", "prompt-completion", "alpaca", "sharegpt", "prompt-only"),
    "distill": ("messages", "prompt-completion", "text", "alpaca", "sharegpt", "prompt-only"),
}
"""Formats of the rows that each objective learns from."""
_FORMATS_CEL = " || ".join(
    f"(self.tuning.objective == '{objective}' && self.dataset.format in [{', '.join(repr(f) for f in formats)}])"
    for objective, formats in FORMATS_OF.items()
)
_PROCESSES = "self.distribution.nodes * (self.distribution.gpusPerNode > 0 ? self.distribution.gpusPerNode : 1)"
UNSHARDED_METHODS: tuple[Method, ...] = ("qlora", "ia3", *VIRTUAL_TOKEN_METHODS)
UNSHARDED_OBJECTIVES: tuple[Objective, ...] = ("grpo", "distill", "kto", "orpo")
"""Methods and objectives that need every parameter whole on each GPU."""


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
    output: Output = Field(default_factory=Output)
    """What is made of the result beside the adapter: merged model, GGUF."""
    publish: Annotated[list[PublishTarget], Field(max_length=8)] = Field(default_factory=list)
    """Where the result goes, in order. Empty: it stays in the workspace."""
    managed_by: DomainPrefixedPath | None = None
    """Controller that the job is for, as in a batch/v1 Job: this operator leaves those of another one alone. Unset, or `finetune.dev/finetune-operator`: this one."""

    RULES = (
        Rule(
            cel="!has(self.evaluation) || has(self.dataset.eval)",
            message="evaluation needs held-out rows: set dataset.eval.splitFraction (for example 0.1) or dataset.eval.uri, or remove evaluation",
            holds=lambda m: m.evaluation is None or m.dataset.eval is not None,
        ),
        Rule(
            cel="!has(self.tuning.hyperparameters.earlyStopping) || (has(self.dataset.eval) && self.tuning.objective != 'grpo')",
            message="tuning.hyperparameters.earlyStopping needs held-out rows and a loss: set dataset.eval.splitFraction or dataset.eval.uri, and do not use it with objective grpo",
            holds=lambda m: (
                m.tuning.hyperparameters.early_stopping is None or (m.dataset.eval is not None and m.tuning.objective != "grpo")
            ),
        ),
        Rule(
            cel=f"self.dataset.format == 'auto' || {_FORMATS_CEL}",
            message="dataset.format does not fit tuning.objective: sft takes messages, prompt-completion, text, alpaca, sharegpt; pretrain takes text; dpo, orpo and reward take preference; kto takes unpaired-preference; grpo and distill also take prompt-only",
            holds=lambda m: m.dataset.format == "auto" or m.dataset.format in FORMATS_OF[m.tuning.objective],
        ),
        Rule(
            cel="!has(self.evaluation) || self.tuning.objective != 'reward' || self.evaluation.metrics.all(x, x == 'preference-accuracy')",
            message="evaluation.metrics: a reward model writes no text; with tuning.objective reward use preference-accuracy alone",
            holds=lambda m: m.evaluation is None or m.tuning.objective != "reward" or set(m.evaluation.metrics) == {"preference-accuracy"},
        ),
        Rule(
            cel="!has(self.evaluation) || self.tuning.objective != 'reward' || (size(self.evaluation.harnessTasks) == 0 && !has(self.evaluation.forgetting))",
            message="evaluation.harnessTasks and forgetting need a model that writes text; remove them with tuning.objective reward",
            holds=lambda m: (
                m.evaluation is None
                or m.tuning.objective != "reward"
                or (not m.evaluation.harness_tasks and m.evaluation.forgetting is None)
            ),
        ),
        Rule(
            cel="!has(self.evaluation) || !self.evaluation.metrics.exists(x, x == 'preference-accuracy') || self.tuning.objective in ['dpo', 'orpo', 'kto', 'reward']",
            message="evaluation.metrics preference-accuracy needs preferred and rejected answers: use it with tuning.objective dpo, orpo, kto or reward",
            holds=lambda m: (
                m.evaluation is None
                or "preference-accuracy" not in m.evaluation.metrics
                or m.tuning.objective in ("dpo", "orpo", "kto", "reward")
            ),
        ),
        Rule(
            cel="!has(self.evaluation) || self.tuning.objective != 'pretrain' || self.evaluation.metrics.all(x, x in ['loss', 'perplexity', 'token-accuracy'])",
            message="evaluation.metrics: plain text has no answers to compare; with tuning.objective pretrain use loss, perplexity or token-accuracy",
            holds=lambda m: m.evaluation is None or m.tuning.objective != "pretrain" or not set(m.evaluation.metrics) & set(ANSWER_METRICS),
        ),
        Rule(
            cel="!(self.tuning.method in ['qlora', 'ia3', 'prompt', 'prefix', 'p-tuning']) || !(self.distribution.strategy in ['deepspeed-zero3', 'fsdp'])",
            message="this tuning.method does not shard its base: set distribution.strategy to auto, ddp, deepspeed-zero1 or deepspeed-zero2",
            holds=lambda m: m.tuning.method not in UNSHARDED_METHODS or m.distribution.strategy not in ("deepspeed-zero3", "fsdp"),
        ),
        Rule(
            cel="!(self.tuning.objective in ['grpo', 'distill', 'kto', 'orpo']) || !(self.distribution.strategy in ['deepspeed-zero3', 'fsdp'])",
            message="tuning.objective grpo, distill, kto and orpo do not run on sharded parameters: set distribution.strategy to auto, ddp, deepspeed-zero1 or deepspeed-zero2",
            holds=lambda m: m.tuning.objective not in UNSHARDED_OBJECTIVES or m.distribution.strategy not in ("deepspeed-zero3", "fsdp"),
        ),
        Rule(
            cel=f"self.tuning.hyperparameters.globalBatchSize % ({_PROCESSES}) == 0",
            message="tuning.hyperparameters.globalBatchSize must be a multiple of the number of processes (distribution.nodes x gpusPerNode, or x 1 on CPU); change one of them",
            holds=lambda m: m.tuning.hyperparameters.global_batch_size % m.world_size == 0,
        ),
        Rule(
            cel=f"!has(self.distribution.perDeviceBatchSize) || self.tuning.hyperparameters.globalBatchSize % (self.distribution.perDeviceBatchSize * {_PROCESSES}) == 0",
            message="tuning.hyperparameters.globalBatchSize must be a multiple of distribution.perDeviceBatchSize x the number of processes; change one of them",
            holds=lambda m: (
                m.distribution.per_device_batch_size is None
                or m.tuning.hyperparameters.global_batch_size % (m.distribution.per_device_batch_size * m.world_size) == 0
            ),
        ),
        Rule(
            cel=f"self.tuning.objective != 'kto' || (self.tuning.hyperparameters.globalBatchSize >= 2 * {_PROCESSES} && (!has(self.distribution.perDeviceBatchSize) || self.distribution.perDeviceBatchSize > 1))",
            message="tuning.objective kto compares rows within a forward pass: distribution.perDeviceBatchSize must be 2 or more, and globalBatchSize at least twice the number of processes",
            holds=lambda m: (
                m.tuning.objective != "kto"
                or (
                    m.tuning.hyperparameters.global_batch_size >= 2 * m.world_size
                    and (m.distribution.per_device_batch_size is None or m.distribution.per_device_batch_size > 1)
                )
            ),
        ),
        Rule(
            cel="!(self.output.merged || size(self.output.gguf) > 0 || size(self.output.onnx) > 0) || !(self.tuning.method in ['prompt', 'prefix', 'p-tuning'])",
            message="output.merged, output.gguf and output.onnx: learned vectors cannot be merged into the weights; remove them or use another tuning.method",
            holds=lambda m: not (m.output.merged or m.output.gguf or m.output.onnx) or m.tuning.method not in VIRTUAL_TOKEN_METHODS,
        ),
        Rule(
            cel="!(size(self.output.gguf) > 0 || self.output.ggufAdapter) || self.tuning.objective != 'reward'",
            message="output.gguf and output.ggufAdapter: llama.cpp has no place for a reward model's head; remove them with tuning.objective reward",
            holds=lambda m: not (m.output.gguf or m.output.gguf_adapter) or m.tuning.objective != "reward",
        ),
        Rule(
            cel="size(self.output.onnx) == 0 || self.tuning.objective != 'reward'",
            message="output.onnx: Transformers.js has no pipeline for a reward model; remove it with tuning.objective reward",
            holds=lambda m: not m.output.onnx or m.tuning.objective != "reward",
        ),
        Rule(
            cel="!self.output.ggufAdapter || self.tuning.method in ['lora', 'qlora', 'rslora']",
            message="output.ggufAdapter: llama.cpp loads lora, qlora and rslora adapters only; use output.gguf, or another tuning.method",
            holds=lambda m: not m.output.gguf_adapter or (m.tuning.method in LORA_METHODS and m.tuning.method != "dora"),
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
    def runs_remote_code(self) -> bool:
        """Whether Python code of a model's repository is to run."""
        teacher = self.tuning.distillation.teacher if self.tuning.distillation is not None else None
        return self.model.trust_remote_code or (teacher is not None and teacher.trust_remote_code)

    @property
    def source_uris(self) -> list[str]:
        """Where the job reads from: models, adapter, training rows, held-out rows that have a source of their own."""
        teacher = self.tuning.distillation.teacher if self.tuning.distillation is not None else None
        forgetting = self.evaluation.forgetting if self.evaluation is not None else None
        optional = (
            teacher.uri if teacher is not None else None,
            self.tuning.continue_from,
            self.dataset.eval.uri if self.dataset.eval is not None else None,
            forgetting.uri if forgetting is not None else None,
        )
        return [self.model.uri, *(s.uri for s in self.dataset.sources.values()), *(uri for uri in optional if uri is not None)]
