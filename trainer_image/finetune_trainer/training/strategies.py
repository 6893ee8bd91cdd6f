"""The strategy of the plan, made to happen: libraries fall back to another one, or to one process, in silence."""

from __future__ import annotations

import os
from typing import Any

from finetune_api.status import Plan

from ..process import ranks
from ..process.errors import InfrastructureError


def prepare_strategy(plan: Plan, *, cuda: bool) -> None:
    """Before TrainingArguments starts the process group: what DeepSpeed and FSDP need that it does not do."""
    if plan.strategy.startswith("deepspeed"):
        _prefer_plain_collectives()
        if not cuda:
            _start_deepspeed_on_cpu()
    elif plan.strategy == "fsdp" and not cuda:
        _start_fsdp_on_cpu()


def _prefer_plain_collectives() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives at first use.

    The image has no compiler and a read-only root file system; gloo and NCCL do the same work.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _start_deepspeed_on_cpu() -> None:
    """Start the process group for DeepSpeed over gloo.

    TrainingArguments names no backend for DeepSpeed, and without a GPU accelerate then sees a world of one process;
    told to use the CPU it leaves DeepSpeed out. A state that is configured beforehand is taken as it is.
    """
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def _start_fsdp_on_cpu() -> None:
    """Start the process group for FSDP over gloo.

    PyTorch shards on CPU as well; accelerate asks for FSDP only where it counts several GPUs, and would run DDP in silence.
    """
    from accelerate import DistributedType, PartialState

    os.environ["ACCELERATE_USE_FSDP"] = "true"
    PartialState(cpu=True, backend="gloo").distributed_type = DistributedType.MULTI_GPU


def check_world(arguments: Any, plan: Plan) -> None:
    """Refuse to train in a world that is not the one the job asked for: it would be slow, or wrong, in silence."""
    found = ranks.world_size()
    if found != plan.world_size or arguments.world_size != plan.world_size:
        raise InfrastructureError("WorldMismatch", f"the job asked for {plan.world_size} processes, this world has {found}")


def check_strategy(trainer: Any, plan: Plan) -> None:
    """Refuse to train with another strategy than the plan's: accelerate falls back to DDP in silence."""
    kind = trainer.accelerator.distributed_type.value
    wanted = "DEEPSPEED" if plan.strategy.startswith("deepspeed") else "FSDP" if plan.strategy == "fsdp" else None
    sharded = kind if kind in ("DEEPSPEED", "FSDP") else None
    if sharded != wanted:
        raise InfrastructureError("StrategyMismatch", f"the plan says {plan.strategy}, accelerate would run {kind}")
