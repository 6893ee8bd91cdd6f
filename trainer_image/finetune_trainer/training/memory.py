"""How much device memory one process needs, from the model's configuration alone. Pure; docs/memory.md states the error.

Weights, gradients and optimizer state follow ZeRO (https://arxiv.org/abs/1910.02054); activations are counted per
tensor that autograd keeps in a Llama-like decoder layer with fused attention, after
Korthikanti et al., https://arxiv.org/abs/2205.05198, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.spec import LORA_METHODS, PREFERENCE_OBJECTIVES, WHOLE_MODEL_METHODS, FineTuneJobSpec, Lora, Partial

GIB = 1024**3
CUDA_CONTEXT = int(0.7 * GIB)
"""What CUDA, cuBLAS and NCCL take beside the tensors."""
FRAGMENTATION = 1.05
_OPTIMIZER_BYTES = {"adamw": 8.0, "adamw-8bit": 2.1, "paged-adamw-8bit": 0.1, "adafactor": 0.1, "sgd": 0.0}
_CHUNK = 32_768
"""Vocabulary entries that TRL's loss looks at at once."""
_NF4_BYTES = 0.516
"""4 bits, and a doubly quantized scale for each 64 (https://arxiv.org/abs/2305.14314)."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that memory depends on."""

    parameters: int
    trainable: int
    linear: int
    """Parameters in linear layers other than the output head: what qlora quantizes."""
    hidden: int
    layers: int
    attention: int
    """Attention heads times their size."""
    intermediate: int
    """Width of the feed-forward layers that one token passes."""
    vocabulary: int
    """0 for a model without an output head over the vocabulary."""
    position: int = 0
    """Virtual tokens in front of each row."""
    recomputes: bool = True
    """Whether the model's class can compute its activations again in the backward pass."""


@dataclass(frozen=True)
class Setting:
    """What the plan may choose."""

    strategy: str
    world_size: int
    batch: int
    gradient_checkpointing: bool
    offload: str = "none"


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, by what holds them."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.overhead


def estimate(spec: FineTuneJobSpec, shape: ModelShape, setting: Setting, *, element: int = 2, teacher: int = 0) -> Memory:
    """Peak memory of one process. `element`: bytes of a computed number (2 for bf16 and fp16, 4 for fp32); `teacher`: its parameters."""
    stage = (
        int(setting.strategy.removeprefix("deepspeed-zero"))
        if setting.strategy.startswith("deepspeed")
        else 3
        if setting.strategy == "fsdp"
        else 0
    )
    world = setting.world_size
    weights, gradients, optimizer = _states(spec, shape, stage, world, element)
    if setting.offload != "none":
        optimizer = 0.0
    if setting.offload == "parameters":
        weights = 2.5 * element * (shape.parameters / max(1, shape.layers))  # the layers under way
    if spec.tuning.objective in ("dpo", "kto") and spec.tuning.method in WHOLE_MODEL_METHODS:
        weights += element * shape.parameters / (world if stage == 3 else 1)  # the frozen reference
    weights += teacher * element
    activations = _activations(spec, shape, setting, element)
    on_gpu = spec.distribution.gpus_per_node > 0
    subtotal = weights + gradients + optimizer + activations
    overhead = (CUDA_CONTEXT if on_gpu else 0) + subtotal * (FRAGMENTATION - 1 if on_gpu else 0)
    return Memory(int(weights), int(gradients), int(optimizer), int(activations), int(overhead))


def _states(spec: FineTuneJobSpec, shape: ModelShape, stage: int, world: int, element: int) -> tuple[float, float, float]:
    method, trainable, total = spec.tuning.method, shape.trainable, shape.parameters
    moments = _OPTIMIZER_BYTES[spec.tuning.hyperparameters.optimizer] * trainable
    shards = world if stage == 3 else 1
    gradient_shards = world if stage >= 2 else 1
    if method in WHOLE_MODEL_METHODS:
        if stage:  # DeepSpeed computes in `element` bytes and keeps its own fp32 copy when that is less
            copy = 4.0 * trainable if element < 4 else 0.0
            return element * total / shards, element * trainable / gradient_shards, (copy + moments) / world
        cast = element * total if element < 4 else 0  # autocast keeps 16-bit copies of fp32 weights
        return 4.0 * total + cast, 4.0 * trainable, moments
    frozen = total - trainable
    base = _NF4_BYTES * shape.linear + element * (frozen - shape.linear) if method == "qlora" else element * frozen
    return base / shards + 4.0 * trainable, 4.0 * trainable / gradient_shards, moments / (world if stage else 1)


def _activations(spec: FineTuneJobSpec, shape: ModelShape, setting: Setting, element: int) -> float:
    hyper = spec.tuning.hyperparameters
    rows = setting.batch * (2 if spec.tuning.objective in ("dpo", "orpo", "reward", "kto") else 1)
    tokens = rows * (hyper.max_length + shape.position)
    layer = element * (6 * shape.hidden + 5 * shape.attention + 4 * shape.intermediate)
    if spec.tuning.method in LORA_METHODS:
        entries = 5 * shape.hidden + shape.attention + shape.intermediate
        dropout = (spec.tuning.lora or Lora()).dropout
        if dropout and spec.tuning.objective not in PREFERENCE_OBJECTIVES:  # TRL switches dropout off for those
            layer += entries * (element + 1) - element * (2 * shape.hidden + shape.attention + shape.intermediate)
        layer += entries * (4 - element) if element < 4 else 0
        if spec.tuning.method == "dora":
            layer += 2 * element * (entries + shape.attention + shape.intermediate)
    if spec.tuning.method == "partial":
        last = (spec.tuning.partial or Partial()).last_layers or shape.layers
        kept = min(shape.layers, last)
    else:
        kept = shape.layers
    head = _head(spec, shape, element)
    if setting.gradient_checkpointing:  # the head is done before the first layer is computed again
        return float(tokens * (shape.layers * element * shape.hidden + max(layer, head)))
    return float(tokens * (kept * layer + head))


def _head(spec: FineTuneJobSpec, shape: ModelShape, element: int) -> float:
    """Bytes per token of the output head and the loss: logits, softmax and gradient in fp32, and the logits in 16 bit.

    With a GPU's kernels TRL computes the loss in chunks of the vocabulary; orpo and distill need the logits whole.
    Without, sft and pretrain use the model's own loss, and the others TRL's chunks in a padded buffer with copies.
    """
    if not shape.vocabulary:
        return 0.0
    objective, copies = spec.tuning.objective, 12.0 if element == 4 else 14.0
    whole = shape.vocabulary * copies
    if objective in ("orpo", "distill"):
        return whole * (2 if objective == "distill" else 1)  # the teacher's too
    width = min(shape.vocabulary, _CHUNK)
    if spec.distribution.gpus_per_node > 0:
        return width * copies
    return whole if objective in ("sft", "pretrain") else 4.0 * _CHUNK + 28.0 * width


def human_bytes(size: int) -> str:
    """A quantity for people: `820Mi`, `61Gi`."""
    return f"{max(1, round(size / 1024**2))}Mi" if size < GIB else f"{size / GIB:.1f}Gi" if size < 10 * GIB else f"{round(size / GIB)}Gi"
