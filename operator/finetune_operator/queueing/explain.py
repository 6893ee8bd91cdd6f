"""What a decision looks like to the one who waits: for what, how much of it, and why. Decides nothing."""

from __future__ import annotations

from finetune_api.queue import Flavor

from ..model.queueing import Admission, Queue, Request, Workload
from .placement import Fleet
from .usage import Usage

_NAMED = 8
"""Nodes that a message names."""


def granted(workload: Workload, admission: Admission) -> str:
    """What a job was admitted to."""
    request = workload.request
    size = f"{admission.pods} of {request.pods[0]} worker pods" if admission.pods < request.pods[0] else f"{admission.pods} worker pod(s)"
    what = f"{admission.pods * request.units} {request.resource}" if request.units else "no GPUs"
    flavor = f", flavor {admission.flavor}" if admission.flavor else ""
    return f"{size} with {what} ({f'queue {admission.queue}{flavor}' if admission.queue else 'no FineTuneQueue'})"


def unreadable(queue: Queue) -> str:
    """Why a queue gives nothing away, and what to do."""
    fix = "correct it, or upgrade the operator if the queue was written for a newer one"
    return f"FineTuneQueue {queue.name} cannot be read, so its quota is not known: {queue.unreadable}; {fix}"


def limit(usage: Usage, queue: Queue, workload: Workload) -> tuple[str, str] | None:
    """(reason, message): why the job's namespace or user may have no more of the queue, or None."""
    limits, need = queue.spec.limits, workload.request.pods[-1] * workload.request.units
    most_of_all = (limits.max_jobs_per_user, limits.max_gpus_per_user, limits.max_jobs_per_namespace, limits.max_gpus_per_namespace)
    if most_of_all == (None, None, None, None):
        return None
    for owner in workload.owners:
        kind = owner.split(" ", 1)[0].capitalize()
        most_jobs, most = (
            (limits.max_jobs_per_user, limits.max_gpus_per_user)
            if kind == "User"
            else (limits.max_jobs_per_namespace, limits.max_gpus_per_namespace)
        )
        units, jobs = usage.ledger.by_owner[queue.name, owner], usage.ledger.jobs[queue.name, owner]
        if most_jobs is not None and jobs >= most_jobs and not workload.serves:
            return f"{kind}Limit", f"{owner} has {jobs} jobs in queue {queue.name}, the limit (maxJobsPer{kind})"
        if most is not None and units + need > most:
            return f"{kind}Limit", f"{owner} holds {units} of {most} in queue {queue.name} (maxGpusPer{kind}), {need} more are needed"
    return None


def _away(fleet: Fleet, request: Request, flavors: list[Flavor]) -> str:
    """The nodes that are waited for, where those that are there could not hold the gang even if nothing else ran on them."""
    found: dict[str, str] = {}
    for flavor in flavors:
        found |= fleet.away(request, flavor)
    if not found or max(fleet.capacity(request, flavor) for flavor in flavors) >= request.pods[-1]:
        return ""
    named = ", ".join(f"{name} ({why})" for name, why in sorted(found.items())[:_NAMED])
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"; nodes that could hold its pods are away: {named}{more}"


def _held(usage: Usage, queue: Queue, workload: Workload, flavors: list[Flavor]) -> str:
    """What endpoints hold, which give way to nobody; and to an endpoint, how much of the queue's own is in use."""
    held = [f"{units} of {f.name}" for f in flavors if (units := usage.ledger.served(queue.name, f))]
    served = f"; endpoints hold {', '.join(held)}" if held else ""
    if not workload.serves:
        return served
    used = ", ".join(f"{usage.ledger.used[queue.name, f.name]} of {f.nominal_quota} {f.name}" for f in flavors)
    return f"; queue {queue.name} uses {used}{served}"


def shortage(usage: Usage, queue: Queue, workload: Workload, flavors: list[Flavor]) -> tuple[str, str]:
    """(reason, message): what is missing for a job that does not fit."""
    request, name = workload.request, queue.name
    if not flavors:
        offered = ", ".join(sorted({f.resource_name for f in queue.spec.flavors}))
        return "NeverAdmitted", f"queue {name} has no flavor of {request.resource} for this job's nodeSelector; it has {offered}"
    need = request.pods[-1] * request.units
    most = max(usage.ledger.most(name, f) for f in flavors)
    if need > most:
        return "NeverAdmitted", f"needs {need} {request.resource}, queue {name} can have {most} at most, borrowed ones included"
    quota = {f.name: max(0, usage.ledger.available(name, f)) for f in flavors}
    best = max(quota.values())
    if best < need:
        rest = ", ".join(f"{left} left of {flavor}" for flavor, left in quota.items())
        return (
            "WaitingForQuota",
            f"waits for {need - best} of {need} {request.resource}: quota has {rest}{_held(usage, queue, workload, flavors)}",
        )
    fitting = [f for f in flavors if quota[f.name] >= need]
    free = max((usage.fleet.free_units(request, f) for f in fitting), default=0) if usage.fleet is not None else 0
    away = _away(usage.fleet, request, fitting) if usage.fleet is not None else ""
    if free < need:
        return (
            "WaitingForNodes",
            f"waits for {need - free} of {need} {request.resource}: {free} are free on the nodes that it may use{away}",
        )
    where = f" within one {request.topology_key}" if request.topology_key else ""
    each = f"{request.units} for each of {request.pods[-1]} pod(s){where}"
    return "WaitingForNodes", f"{free} {request.resource} are free, but not {each}, with the CPU and memory they ask for{away}"
