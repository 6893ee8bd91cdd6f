"""The GPUs of a run: each process its own, and how much of its memory was used at the peak."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch

from finetune_api.status import Plan

from ..process import ranks
from ..process.errors import InfrastructureError
from .memory import human_bytes


def check_distinct() -> None:
    """Refuse to train when two processes got the same GPU: NCCL would hang or fail with words that do not say so."""
    mine = _identity()
    others = ranks.all_gather(mine)
    same = [rank for rank, other in enumerate(others) if (other["host"], other["uuid"]) == (mine["host"], mine["uuid"])]
    if len(same) > 1:
        raise InfrastructureError("SharedDevice", f"ranks {', '.join(map(str, same))} got the same GPU ({mine['name']}) of {mine['host']}")


def gather_memory() -> list[dict[str, Any]]:
    """Of all ranks, in bytes: what tensors took at the peak, what PyTorch held for them, and what CUDA took beside that."""
    free, total = torch.cuda.mem_get_info()
    mine = {
        **_identity(),
        "total": total,
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "context": max(0, total - free - torch.cuda.memory_reserved()),
    }
    return ranks.all_gather(mine)


def describe_peak(used: list[dict[str, Any]], plan: Plan) -> str:
    """For people: the fullest GPU beside the plan's estimate."""
    most = max(rank["reserved"] + rank["context"] for rank in used)
    return f"peak memory {human_bytes(most)} of an estimated {plan.estimated_memory_per_gpu}"


def _identity() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    rank = int(os.environ.get("RANK", "0"))
    return {"rank": rank, "host": socket.gethostname(), "name": properties.name, "uuid": str(getattr(properties, "uuid", rank))}
