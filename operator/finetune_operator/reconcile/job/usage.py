"""What a job has used, for its status: GPU-seconds, their price, and work that was lost. Knows nothing of why it ended."""

from __future__ import annotations

from datetime import datetime

from finetune_api.contract import ExitCode, read_stage_result
from finetune_api.scalars import human_duration
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Plan

from ...model.job import PodView
from ...model.times import parse_time
from .draft import Draft


def workers(draft: Draft) -> list[PodView]:
    """All worker pods, of every attempt."""
    return [p for p in draft.observed.pods if p.is_worker]


def holds_since(draft: Draft, by_rank: dict[int, PodView]) -> datetime:
    """Since when the gang holds GPUs: pods that another scheduler decides about wait first."""
    made, admission = min(p.created for p in by_rank.values()), draft.status.admission
    admitted_at = parse_time(admission.admitted_at) if admission is not None and admission.attempt == draft.status.attempt else None
    return max(made, admitted_at or made)


def account(draft: Draft, spec: FineTuneJobSpec) -> None:
    """Add what the attempt that ends has held."""
    gang, admission, usage = draft.status.gang, draft.status.admission, draft.status.usage
    begun = parse_time(gang.started_at) if gang is not None else None
    if begun is None or not spec.distribution.gpus_per_node:
        return
    ends = [p.finished for p in workers(draft) if p.finished is not None]
    held = max(0.0, ((max(ends) if ends else draft.now) - begun).total_seconds())
    gpu_seconds = round(held * draft.nodes(spec) * spec.distribution.gpus_per_node)
    usage.gpu_seconds += gpu_seconds
    if admission is not None and admission.price_per_hour is not None:
        usage.cost = round((usage.cost or 0.0) + gpu_seconds / 3600 * admission.price_per_hour, 4)


UTILISATION = 0.35
"""Of a GPU's peak, while it fine-tunes: 0.3 to 0.5 is what is reported."""


def estimate(plan: Plan | None, teraflops: float | None, price_per_hour: float | None) -> tuple[str | None, float | None]:
    """(duration, cost) of a whole training before it begins, on so many GPUs of so many TFLOP/s each."""
    if plan is None or not plan.estimated_petaflops or teraflops is None:
        return None, None
    seconds = plan.estimated_petaflops * 1000 / (teraflops * UTILISATION * plan.world_size)
    cost = None if price_per_hour is None else round(seconds / 3600 * plan.world_size * price_per_hour, 2)
    return human_duration(max(1.0, seconds)), cost


def lost_seconds(draft: Draft) -> int:
    """Seconds since the newest checkpoint of an attempt that ran."""
    gang, saved = draft.status.gang, draft.status.checkpoint
    begun = parse_time(gang.running_since) if gang is not None else None
    if begun is None:
        return 0
    for pod in workers(draft):
        words = read_stage_result(pod.message) if pod.exit_code == ExitCode.STOPPED else None
        if words is not None and saved is not None and words.result.get("checkpointStep") == saved.step:
            return 0  # it stopped right there; that its pods take seconds to end costs no work
    ends = [p.finished for p in workers(draft) if p.finished is not None]
    kept = parse_time(saved.saved_at) if saved is not None else None
    return round(max(0.0, ((max(ends) if ends else draft.now) - max(begun, kept or begun)).total_seconds()))
