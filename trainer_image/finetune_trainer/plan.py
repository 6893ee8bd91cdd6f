"""How the work is spread: strategy, per-device batch, accumulation. Decided in prepare, before GPUs are asked for."""

from __future__ import annotations

import math

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Plan

_LARGEST_BATCH = 8
_SHARD_PARAMETERS = 3_000_000_000
"""Models over this size get their parameters sharded when every weight is trained."""


def make_plan(spec: FineTuneJobSpec, rows: int, parameters: int) -> Plan:
    """The plan for so many rows and a model of so many parameters."""
    hyper, distribution = spec.tuning.hyperparameters, spec.distribution
    world = spec.world_size
    share = hyper.global_batch_size // world
    batch = distribution.per_device_batch_size or max(size for size in range(1, _LARGEST_BATCH + 1) if share % size == 0)
    accumulation = share // batch
    strategy, reason = _strategy(spec, world, parameters)
    per_epoch = math.ceil(rows / hyper.global_batch_size)
    total = hyper.max_steps or max(1, math.ceil(per_epoch * hyper.epochs))
    return Plan(
        world_size=world,
        per_device_batch_size=batch,
        gradient_accumulation=accumulation,
        strategy=strategy,
        total_steps=total,
        reason=f"{reason}; {world} process(es) x {batch} rows x {accumulation} accumulation = {hyper.global_batch_size} rows a step",
    )


def _strategy(spec: FineTuneJobSpec, world: int, parameters: int) -> tuple[str, str]:
    wanted = spec.distribution.strategy
    if wanted == "fsdp" and world == 1:
        return "ddp", "one process has nothing to shard: fsdp would be ddp"
    if wanted != "auto":
        return wanted, f"strategy {wanted} as asked for"
    if world == 1:
        return "ddp", "one process needs no sharding"
    if spec.tuning.method != "full":
        return "ddp", "an adapter's gradients and optimizer state are small: plain data parallelism is fastest"
    if parameters > _SHARD_PARAMETERS:
        return (
            "deepspeed-zero3",
            f"full fine-tuning of {parameters / 1e9:.1f} B parameters: parameters, gradients and optimizer state are sharded",
        )
    return "deepspeed-zero2", f"full fine-tuning of {parameters / 1e6:.0f} M parameters: gradients and optimizer state are sharded"
