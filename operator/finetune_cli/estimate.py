"""`finetune estimate`: memory, time and cost of a job before or while it runs, from what prepare found."""

from __future__ import annotations

from rich.console import Console

from finetune_api.status import FineTuneJobStatus
from finetune_operator.reconcile.job.usage import UTILISATION, estimate

GPUS = {
    "t4": 65, "v100": 125, "a10": 125, "a10g": 70, "l4": 121, "l40s": 362, "rtx4090": 165, "a100": 312, "h100": 989, "h200": 989, "b200": 2250, "mi300x": 1307,
}  # fmt: skip
"""Dense 16-bit TFLOP/s by the makers' data sheets."""


class NothingToEstimate(ValueError):
    """Prepare has not looked at the data yet, or the objective is not one that is estimated."""


def show(name: str, status: FineTuneJobStatus, gpu: str | None, price: float | None, console: Console) -> None:
    """Print the estimate. Raises NothingToEstimate."""
    plan = status.plan
    if plan is None:
        raise NothingToEstimate(f"{name} has no plan yet: its prepare stage finds out how much there is to do (phase {status.phase})")
    memory = plan.estimated_memory_per_gpu or "not estimated (no GPUs)"
    console.print(f"memory   {memory} per GPU: {plan.reason}", highlight=False, markup=False, soft_wrap=True)
    if not plan.estimated_petaflops:
        raise NothingToEstimate(f"time and cost of {name} are not estimated: its objective generates, or asks a second model")
    console.print(f"work     {plan.estimated_petaflops:g} PFLOP over {plan.total_steps} steps", highlight=False)
    for kind, teraflops in GPUS.items() if gpu is None else [(gpu, GPUS[gpu])]:
        duration, cost = estimate(plan, teraflops, price)
        paid = f", cost {cost:g}" if cost is not None else ""
        console.print(f"{kind:<8} {duration} on {plan.world_size} of them{paid}", highlight=False)
    console.print(f"At {UTILISATION:.0%} of the peak, without start-up; while it trains, status.progress.eta knows better.", style="dim")
