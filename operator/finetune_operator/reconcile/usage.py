"""What a job has used, for its status: GPU-seconds, their price, and work that was lost."""

from __future__ import annotations

from datetime import datetime

from finetune_api.spec import FineTuneJobSpec

from .draft import Draft
from .model import PodView, parse_time


def workers(draft: Draft) -> list[PodView]:
    """All worker pods, of every attempt."""
    return [p for p in draft.observed.pods if p.stage == "train"]


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


def lost_seconds(draft: Draft) -> int:
    """Seconds since the newest checkpoint of an attempt that ran."""
    gang, saved = draft.status.gang, draft.status.checkpoint
    begun = parse_time(gang.running_since) if gang is not None else None
    if begun is None:
        return 0
    ends = [p.finished for p in workers(draft) if p.finished is not None]
    kept = parse_time(saved.saved_at) if saved is not None else None
    return round(max(0.0, ((max(ends) if ends else draft.now) - max(begun, kept or begun)).total_seconds()))
