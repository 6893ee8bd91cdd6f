"""What the ranks of a run tell each other. Each function is called by all of them, and needs no process group where there is one rank."""

from __future__ import annotations

from typing import Any

import torch


def is_distributed() -> bool:
    """Whether this process is one of several that can talk to each other."""
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())


def world_size() -> int:
    """Processes of the run."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def is_first() -> bool:
    """Whether this is rank 0."""
    return not is_distributed() or torch.distributed.get_rank() == 0


def any_rank(device: torch.device, *flags: bool) -> list[bool]:
    """Each flag, true when it is true on any rank."""
    if not is_distributed():
        return list(flags)
    found = torch.tensor([int(flag) for flag in flags], device=device if device.type == "cuda" else "cpu")
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def all_gather(mine: Any) -> list[Any]:
    """Every rank's object, in the order of the ranks."""
    if not is_distributed():
        return [mine]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found


def broadcast(mine: Any) -> Any:
    """Rank 0's object."""
    found = [mine]
    if is_distributed():
        torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def barrier() -> None:
    """Wait until every rank is here."""
    if is_distributed():
        torch.distributed.barrier()
