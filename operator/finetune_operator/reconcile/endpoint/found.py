"""What is said of the replicas, and of all of them together. Pure: pods and their reports -> the status and its conditions.

Knows nothing of which version is to answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from finetune_api.endpoint import (
    MOST_MODELS,
    MOST_REPLICAS,
    EndpointModel,
    FineTuneEndpointSpec,
    FineTuneEndpointStatus,
    Replica,
    ReplicaModel,
)
from finetune_api.serving import USER_PORT, ReplicaReport

from ...model.endpoint import ObservedEndpoint, ReplicaPod
from ...model.times import parse_time
from ..conditions import set_condition
from .orders import fits, order, selected
from .rollout import BAD, SETTLED, first, versioned
from .whole import Whole


class Said(NamedTuple):
    """A condition."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str


def replicas(observed: ObservedEndpoint) -> list[Replica]:
    """Each pod, with what it was last found to serve.

    Of one that does not say anything what is on record stays, and its kubelet tells whether it answers: that the operator cannot
    reach a replica is no reason to take it from its users.
    """
    before = {replica.name: replica for replica in observed.status.pods}
    return [_replica(observed, pod, before.get(pod.name)) for pod in sorted(observed.pods, key=lambda pod: pod.name)][:MOST_REPLICAS]


def _replica(observed: ObservedEndpoint, pod: ReplicaPod, before: Replica | None) -> Replica:
    report = observed.reports.get(pod.uid)
    address = pod.address or (f"[{pod.ip}]:{USER_PORT}" if ":" in pod.ip else f"{pod.ip}:{USER_PORT}" if pod.ip else "")
    if report is not None:
        models = [*report.models, *(_unsaid(observed, report, before) if pod.address else ())]
        return Replica(name=pod.name, address=address, ready=report.ready and pod.ready, models=models[:MOST_MODELS])
    known = before.models if before is not None and pod.uid not in observed.emptied else []
    known = [model for model in known if (model.name, model.state) != (pod.version, "Refused")]  # its pod says so, or not any more
    if pod.refused and pod.version:
        known = [ReplicaModel(name=pod.version, state="Refused", message=pod.refused)]
    elif pod.uid in observed.emptied and before is not None:
        known = [ReplicaModel(name=model.name, message="its container started anew") for model in before.models]
    return Replica(name=pod.name, address=address, ready=pod.ready and before is not None and bool(before.address), models=known)


def _unsaid(observed: ObservedEndpoint, report: ReplicaReport, before: Replica | None) -> list[ReplicaModel]:
    """What is on record of versions that are ordered, and of which the agent of external replicas has found nothing yet since it began:
    one that is replaced takes no replica from its users.
    """
    if before is None or observed.spec is None:
        return []
    open_ = {model.name for model in order(observed, observed.spec).models} - {model.name for model in report.models}
    return [model for model in before.models if model.name in open_]


def wanted(spec: FineTuneEndpointSpec, found: Sequence[Replica]) -> int:
    """How many replicas there are to be; of those that somebody else runs, as many as there are."""
    return len(found) if spec.external is not None else spec.replicas


def over_all(entry: EndpointModel, found: Sequence[Replica]) -> EndpointModel:
    """With what the replicas were found to serve of the version that answers, or of the first one that is to."""
    number = entry.version if entry.version is not None or entry.canary is None else entry.canary.version
    if number is None:
        return entry.model_copy(update={"verified": 0, "replicas": len(found), "verified_at": None, "mismatch": ""})
    name = versioned(entry.name, number)
    states = [next((m for m in replica.models if m.name == name), None) for replica in found]
    verified = [model for model in states if model is not None and model.state == "Verified"]
    asked = [model.verified_at for model in verified if model.verified_at is not None and parse_time(model.verified_at) is not None]
    bad = first(found, name, BAD)
    return entry.model_copy(
        update={
            "verified": len(verified),
            "replicas": len(found),
            "verified_at": min(asked) if found and len(asked) == len(found) else None,
            "mismatch": f"{bad[0].name}: {bad[1].state}: {bad[1].message}" if bad is not None else "",
        }
    )


def ready(observed: ObservedEndpoint, spec: FineTuneEndpointSpec, found: Sequence[Replica]) -> Said:
    """Whether at least one replica answers."""
    answer = sum(replica.ready for replica in found)
    if answer:
        return Said("Ready", "True", "Serving", f"{answer} of {max(wanted(spec, found), len(found))} replicas answer")
    if spec.external is not None and not found:
        return Said("Ready", "False", "NoReplicaReady", f"Service {spec.external.service} has no address that is ready")
    if spec.external is None and spec.replicas == 0:
        return Said("Ready", "False", "ScaledToZero", "spec.replicas is 0")
    problems = [f"{pod.name}: {pod.problem}" for pod in observed.pods if pod.problem]
    problems += [f"{pod.name}: {r.message}" for pod in observed.pods if (r := observed.reports.get(pod.uid)) is not None and r.message]
    problems += [f"{pod.name}: {observed.silent[pod.uid]}" for pod in observed.pods if pod.uid in observed.silent]
    return Said("Ready", "False", "NoReplicaReady", "; ".join(problems[:3]) or "replicas start")


def served(observed: ObservedEndpoint, spec: FineTuneEndpointSpec, whole: Whole | None) -> Said:
    """Whether every model that it names can be served by it."""
    missing: dict[str, list[str]] = {}
    if whole is not None and whole.reason:
        missing[whole.reason] = [whole.message]
    for name in selected(observed, spec):
        line = observed.lines.get(name)
        if line is None:
            missing.setdefault("ModelNotFound", []).append(f"there is no FineTunedModel {name} in this namespace")
        elif line.champion is None:
            missing.setdefault("NoChampion", []).append(f"{name} has no champion yet")
        elif name == observed.endpoint["metadata"]["name"]:
            clash = f"the base answers as {name}, which is the endpoint's name"
            missing.setdefault("NameTaken", []).append(f"{clash}, so that a FineTunedModel {name} cannot; give one of them another name")
        elif not fits(line.champion):
            alone = f"{versioned(name, line.champion.number)} is a whole model, and replicas serve adapters beside spec.base"
            missing.setdefault("WholeModel", []).append(f"{alone}: make an endpoint of its own with base.uri: model://{name}")
        elif line.champion.rank is not None and line.champion.rank > spec.max_lora_rank:
            rank = f"{versioned(name, line.champion.number)} has rank {line.champion.rank}, more than spec.maxLoraRank {spec.max_lora_rank}"
            missing.setdefault("RankTooHigh", []).append(f"{rank}; raise it")
    if missing:
        told = "; ".join(message for messages in missing.values() for message in messages)
        return Said("ModelsServed", "False", next(iter(missing)), told)
    return Said("ModelsServed", "True", "Served", "")


def verified(observed: ObservedEndpoint, models: Sequence[EndpointModel], found: Sequence[Replica]) -> Said:
    """Whether every replica serves what was evaluated."""
    if not models:
        return Said("Verified", "Unknown", "NoModels", "no tuned model is served")
    bad = [f"{model.name}: {model.mismatch}" for model in models if model.mismatch]
    coming = [versioned(model.name, model.canary.version) for model in models if model.canary is not None]
    bad += [f"{name}: {at[0].name}: {at[1].state}: {at[1].message}" for name in coming if (at := first(found, name, BAD))]
    if bad:
        return Said("Verified", "False", "Mismatch", "; ".join(bad))
    silent = [f"{pod.name}: {observed.silent[pod.uid]}" for pod in observed.pods if pod.uid in observed.silent]
    if silent:
        return Said("Verified", "Unknown", "ReplicaSilent", "; ".join(silent[:3]))
    waits = [model for model in models if model.version is None or model.verified < model.replicas or not model.replicas]
    open_ = [model for model in waits if model.version is None or not model.replicas or not _settled(model, found)]
    if open_:
        told = [f"{model.name}: {model.verified} of {model.replicas} replicas" for model in open_]
        return Said("Verified", "Unknown", "Pending", "; ".join(told))
    if waits:
        told = [
            next((f"{model.name}: {m.message}" for r in found for m in r.models if m.state == "Unverifiable"), model.name)
            for model in waits
        ]
        return Said("Verified", "Unknown", "Unverifiable", "; ".join(told))
    return Said("Verified", "True", "Verified", "every replica was found to serve what was evaluated")


def _settled(model: EndpointModel, found: Sequence[Replica]) -> bool:
    name = versioned(model.name, model.version or 0)
    return all(any(m.name == name and m.state in SETTLED for m in replica.models) for replica in found)


def rolled_back(models: Sequence[EndpointModel]) -> Said:
    """Whether a version went back, and why."""
    gone = [model.rolled_back.message for model in models if model.rolled_back is not None]
    if gone:
        return Said("RolledBack", "True", "CanaryWorse", "; ".join(gone))
    return Said("RolledBack", "False", "NothingRolledBack", "")


def refuses(reason: str, message: str) -> Said:
    """The endpoint cannot be made as it is written."""
    return Said("Ready", "False", reason, message)


def with_conditions(observed: ObservedEndpoint, status: FineTuneEndpointStatus, *said: Said) -> FineTuneEndpointStatus:
    """With these in place of those of their types."""
    status = status.model_copy()
    generation = int(observed.endpoint["metadata"].get("generation") or 0)
    for one in said:
        set_condition(status, *one, now=observed.now, generation=generation)
    return status
