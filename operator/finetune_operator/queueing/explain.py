"""What a decision looks like to the one who waits: for what, how much of it, and why."""

from __future__ import annotations

from finetune_api.queue import Flavour

from .books import Books
from .model import Admission, Queue, Workload


def granted(workload: Workload, admission: Admission) -> str:
    """What a job was admitted to."""
    ask = workload.ask
    size = f"{admission.pods} of {ask.pods[0]} worker pods" if admission.pods < ask.pods[0] else f"{admission.pods} worker pod(s)"
    what = f"{admission.pods * ask.units} {ask.resource}" if ask.units else "no GPUs"
    flavour = f", flavour {admission.flavour}" if admission.flavour else ""
    return f"{size} with {what} ({f'queue {admission.queue}{flavour}' if admission.queue else 'no FineTuneQueue'})"


def limit(books: Books, queue: Queue, workload: Workload) -> tuple[str, str] | None:
    """(reason, message): why the job's namespace or user may have no more of the queue, or None."""
    limits, need = queue.spec.limits, workload.ask.pods[-1] * workload.ask.units
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
        held, jobs = books.ledger.by_owner[queue.name, owner], books.ledger.jobs[queue.name, owner]
        if most_jobs is not None and jobs >= most_jobs:
            return f"{kind}Limit", f"{owner} has {jobs} jobs in queue {queue.name}, the limit (maxJobsPer{kind})"
        if most is not None and held + need > most:
            return f"{kind}Limit", f"{owner} holds {held} of {most} in queue {queue.name} (maxGpusPer{kind}), this job needs {need}"
    return None


def shortage(books: Books, queue: Queue, workload: Workload, flavours: list[Flavour]) -> tuple[str, str]:
    """(reason, message): what is missing for a job that does not fit."""
    ask, name = workload.ask, queue.name
    if not flavours:
        offered = ", ".join(sorted({f.resource_name for f in queue.spec.flavours}))
        return "NeverAdmitted", f"queue {name} has no flavour of {ask.resource} for this job's nodeSelector; it has {offered}"
    need = ask.pods[-1] * ask.units
    most = max(books.ledger.most(name, f) for f in flavours)
    if need > most:
        return "NeverAdmitted", f"needs {need} {ask.resource}, queue {name} can have {most} at most, borrowed ones included"
    quota = {f.name: max(0, books.ledger.available(name, f)) for f in flavours}
    best = max(quota.values())
    if best < need:
        rest = ", ".join(f"{left} left of {flavour}" for flavour, left in quota.items())
        return "WaitingForQuota", f"waits for {need - best} of {need} {ask.resource}: quota has {rest}"
    fitting = [f for f in flavours if quota[f.name] >= need]
    free = max((books.fleet.free_units(ask, f) for f in fitting), default=0) if books.fleet is not None else 0
    if free < need:
        return "WaitingForNodes", f"waits for {need - free} of {need} {ask.resource}: {free} are free on the nodes that it may use"
    where = f" within one {ask.topology_key}" if ask.topology_key else ""
    each = f"{ask.units} for each of {ask.pods[-1]} pod(s){where}"
    return "WaitingForNodes", f"{free} {ask.resource} are free, but not {each}, with the CPU and memory they ask for"
