"""How the work is spread: strategy, offload, checkpointing, per-device batch. Decided in prepare, before GPUs are asked for. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from finetune_api.scalars import quantity
from finetune_api.spec import UNSHARDED_METHODS, UNSHARDED_OBJECTIVES, WHOLE_MODEL_METHODS, FineTuneJobSpec
from finetune_api.status import Plan

from ..process.errors import UserError
from .memory import CUDA_CONTEXT, Memory, ModelShape, Setting, estimate, human_bytes

_LARGEST_BATCH = 8
_LARGEST_WORLD = 4096
_SHARD_PARAMETERS = 3_000_000_000
"""Models over this size get their parameters sharded when every weight is trained and the GPUs' memory is not known."""


def make_plan(
    spec: FineTuneJobSpec,
    rows: int,
    shape: ModelShape,
    *,
    teacher: int = 0,
    tokens: int = 0,
    packed: int | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """The plan for so many rows (of so many tokens together) and a model of this shape. Raises UserError when nothing fits `resources.gpuMemory`.

    `packed`: sequences that the rows are packed into, None where they are not packed; `notes`: what else is to be said of the plan.
    """
    hyper, rows = spec.tuning.hyperparameters, packed if packed is not None else rows
    element = 4 if hyper.precision == "fp32" or spec.distribution.gpus_per_node == 0 else 2
    known = spec.resources.gpu_memory
    limit = int(quantity(known)) if known is not None and spec.distribution.gpus_per_node > 0 else None
    candidates = list(_settings(spec, shape, spec.world_size))

    def need(setting: Setting) -> Memory:
        return estimate(spec, shape, setting, element=element, teacher=teacher)

    chosen = next((s for s in candidates if limit is None or need(s).total <= limit), None)
    if chosen is None:
        assert limit is not None
        least = min(candidates, key=lambda s: need(s).total)
        raise UserError("DoesNotFit", _refusal(spec, shape, least, need(least), limit, element, teacher))
    if limit is not None and spec.evaluation is not None and (compared := CUDA_CONTEXT + 2 * shape.parameters) > limit:
        raise UserError(
            "DoesNotFit",
            f"evaluation compares the models in 16 bit on one GPU, which takes {human_bytes(compared)} and more; resources.gpuMemory is "
            f"{human_bytes(limit)}. Remove evaluation, or use GPUs of {human_bytes(int(compared * 1.1))}",
        )
    accumulation = hyper.global_batch_size // spec.world_size // chosen.batch
    per_epoch = math.ceil(rows / hyper.global_batch_size)
    total = hyper.max_steps or max(1, math.ceil(per_epoch * hyper.epochs))
    if spec.tuning.grpo is not None and hyper.max_steps is None:  # a step takes globalBatchSize answers, generations of them per prompt
        total = max(1, math.ceil(rows * spec.tuning.grpo.generations / hyper.global_batch_size * hyper.epochs))
    memory = need(chosen)
    return Plan(
        world_size=spec.world_size,
        per_device_batch_size=chosen.batch,
        gradient_accumulation=accumulation,
        strategy=chosen.strategy,
        offload=chosen.offload,
        gradient_checkpointing=chosen.gradient_checkpointing,
        estimated_memory_per_gpu=human_bytes(memory.total),
        total_steps=total,
        estimated_petaflops=_work(spec, shape, chosen, total * hyper.global_batch_size * tokens / rows),
        reason=f"{_why(spec, chosen, shape, limit, packed is not None)}; {spec.world_size} process(es) x {chosen.batch} rows x {accumulation} accumulation = "
        f"{hyper.global_batch_size} {'packed sequences' if packed is not None else 'rows'} a step"
        f"{''.join(f'; {note}' for note in notes)}; memory: {_parts(memory)}",
    )


def _work(spec: FineTuneJobSpec, shape: ModelShape, chosen: Setting, tokens: float) -> float:
    """Operations of training on so many tokens, x 10^15: 2 per parameter and token forwards and 2 backwards, 2 more for each
    that learns, and 2 more to recompute activations (Kaplan et al. 2020, appendix B; attention is left out). Objectives that
    generate, or ask a second model, are not estimated.
    """
    if spec.tuning.objective not in ("sft", "pretrain", "reward"):
        return 0.0
    each = (6 if chosen.gradient_checkpointing else 4) * shape.parameters + 2 * shape.trainable
    return float(f"{tokens * each / 1e15:.4g}")


def _settings(spec: FineTuneJobSpec, shape: ModelShape, world: int) -> Iterator[Setting]:
    """What may be chosen, the fastest first: less communication, no recomputation, larger batches, nothing in host memory."""
    share = max(1, spec.tuning.hyperparameters.global_batch_size // world)
    least = 2 if spec.tuning.objective == "kto" else 1
    fixed = spec.distribution.per_device_batch_size
    batches = [fixed] if fixed else [size for size in range(_LARGEST_BATCH, 0, -1) if share % size == 0 and size >= least] or [share]
    asked = spec.tuning.hyperparameters.gradient_checkpointing
    recompute = [asked] if asked is not None else [False] if spec.tuning.method == "prefix" or not shape.recomputes else [False, True]
    for strategy, offload in _strategies(spec, shape, world):
        for checkpointing in recompute:
            for batch in batches:
                yield Setting(strategy, world, batch, checkpointing, offload)


def _strategies(spec: FineTuneJobSpec, shape: ModelShape, world: int) -> list[tuple[str, str]]:
    wanted, offload = spec.distribution.strategy, spec.distribution.offload
    if wanted == "fsdp" and world == 1:
        return [("ddp", "none")]
    if wanted != "auto":
        return [(wanted, offload)]
    shardable = spec.tuning.method not in UNSHARDED_METHODS and spec.tuning.objective not in UNSHARDED_OBJECTIVES
    full = spec.tuning.method in WHOLE_MODEL_METHODS
    zero3 = [("deepspeed-zero3", "none")] if shardable and world > 1 else []
    hosted = [
        ("deepspeed-zero2", "optimizer"),
        *([("deepspeed-zero3", "optimizer"), ("deepspeed-zero3", "parameters")] if shardable else []),
    ]
    spare = hosted if spec.resources.gpu_memory is not None else []
    if world == 1:
        return [("ddp", "none"), *spare]
    if not full:
        return [("ddp", "none"), *zero3, *spare]
    zero2 = [("deepspeed-zero2", "none")]
    if shape.parameters > _SHARD_PARAMETERS and zero3 and spec.resources.gpu_memory is None:
        return zero3
    return [*zero2, *zero3, *spare]


def _why(spec: FineTuneJobSpec, chosen: Setting, shape: ModelShape, limit: int | None, packed: bool) -> str:
    size = f"{shape.parameters / 1e9:.1f} B" if shape.parameters >= 1e9 else f"{shape.parameters / 1e6:.1f} M"
    if spec.distribution.strategy != "auto":
        reason = f"strategy {chosen.strategy} as asked for"
        if spec.distribution.strategy != chosen.strategy:
            reason = f"one process has nothing to shard: {spec.distribution.strategy} would be {chosen.strategy}"
    elif chosen.world_size == 1 and chosen.strategy == "ddp":
        reason = "one process needs no sharding"
    elif chosen.strategy == "ddp":
        reason = "an adapter's gradients and optimizer state are small: plain data parallelism is fastest"
    else:
        what = "parameters, gradients and optimizer state" if chosen.strategy == "deepspeed-zero3" else "gradients and optimizer state"
        hosted = "" if chosen.offload == "none" else f", {chosen.offload} in host memory"
        reason = f"{size} parameters, {shape.trainable / 1e6:.1f} M of them trained: {what} are sharded{hosted}"
    if limit is None and spec.distribution.gpus_per_node > 0:
        reason += "; whether it fits is not checked, set resources.gpuMemory"
    hyper = spec.tuning.hyperparameters
    if hyper.packing and packed and hyper.attention in ("sdpa", "eager"):
        reason += f"; packed rows cost the square of their tokens together with attention {hyper.attention}, auto avoids that"
    if hyper.packing and not packed:
        where = "on CPU" if spec.distribution.gpus_per_node == 0 else "of this model"
        reason += (
            f"; packing is off: no attention {where} keeps packed rows apart without a mask, which would cost the square of their tokens "
            "together; rows are sorted by length instead, and globalBatchSize counts rows"
        )
    if chosen.gradient_checkpointing and hyper.gradient_checkpointing is None:
        reason += "; gradient checkpointing is needed to fit"
    return reason


def _parts(memory: Memory) -> str:
    names = ("weights", "gradients", "optimizer", "activations", "overhead")
    return ", ".join(f"{name} {human_bytes(getattr(memory, name))}" for name in names if getattr(memory, name) >= 1024**2)


def _refusal(spec: FineTuneJobSpec, shape: ModelShape, least: Setting, memory: Memory, limit: int, element: int, teacher: int) -> str:
    """Why nothing fits, and the smallest shape that would."""
    message = (
        f"the smallest setting needs {human_bytes(memory.total)} per GPU ({_parts(memory)}) with {least.strategy}, batch {least.batch}"
        f"{', gradient checkpointing' if least.gradient_checkpointing else ''}, resources.gpuMemory is {human_bytes(limit)}. It fits with "
    )
    ways = [f"GPUs of {human_bytes(memory.total)}"]
    world = spec.world_size * 2
    while world <= _LARGEST_WORLD:
        if any(estimate(spec, shape, s, element=element, teacher=teacher).total <= limit for s in _settings(spec, shape, world)):
            ways.insert(0, f"{world} GPUs instead of {spec.world_size} (distribution.nodes x gpusPerNode)")
            break
        world *= 2
    length = spec.tuning.hyperparameters.max_length // 2
    while length >= 128:
        shorter = spec.tuning.hyperparameters.model_copy(update={"max_length": length})
        smaller = spec.model_copy(update={"tuning": spec.tuning.model_copy(update={"hyperparameters": shorter})})
        if any(
            estimate(smaller, shape, s, element=element, teacher=teacher).total <= limit for s in _settings(spec, shape, spec.world_size)
        ):
            ways.append(f"hyperparameters.maxLength {length}")
            break
        length //= 2
    if spec.tuning.method in WHOLE_MODEL_METHODS:
        ways.append("tuning.method lora or qlora")
    elif spec.tuning.method in ("lora", "dora", "rslora"):
        ways.append("tuning.method qlora")
    return message + ", or with ".join(ways)
