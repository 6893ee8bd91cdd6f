"""reconcile(): what an endpoint needs in the cluster, which versions answer, and what is said of it.

Level-triggered, as for jobs. What replicas are told to serve follows from what is on record (orders.py): a decision is put into the
status first, and the next pass acts on it.
Knows nothing of how anything is carried out.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from finetune_api import names
from finetune_api.base import shortened
from finetune_api.endpoint import EndpointModel, FineTuneEndpointSpec, FineTuneEndpointStatus, Replica
from finetune_api.scalars import printable
from finetune_api.serving import ReplicaReport

from ...model.endpoint import ObservedEndpoint, ReplicaPod
from ...model.times import parse_time
from ...resources.endpoint import EndpointRef, manifests, selector
from ...settings import Settings
from ..plan import Action, Apply, Event, Patch, Plan, WriteUrgency
from . import found, room
from .orders import selected
from .rollout import BAD, SETTLED, Change, advance, first, versioned
from .whole import Whole, problems_of, replaces, whole_model

PENDING_SECONDS, QUIET_SECONDS = 2.0, 20.0
"""Time to the next look at the replicas: while something is awaited, and otherwise."""
REFUSED_SECONDS = 60.0
"""While nothing can be made of it: what stands against it may be gone without a change of its own."""
UNLOAD_SECONDS = 60.0
"""How long the deletion of an endpoint waits until its replicas have let go of what they serve."""


def reconcile(observed: ObservedEndpoint, settings: Settings) -> Plan[FineTuneEndpointStatus]:
    """Decide the next actions and the status of one endpoint. Pure."""
    if observed.endpoint["metadata"].get("deletionTimestamp"):
        return _leave(observed)
    spec = observed.spec
    whole = whole_model(observed, spec) if spec is not None else None
    if (why := refused_for(observed, settings) or _nothing_to_make(observed, whole)) is not None or spec is None:
        reason, message = why or ("InvalidSpec", observed.invalid)
        said = found.with_conditions(observed, room.without_asking(observed.status), found.refuses(reason, message))
        return _plan(observed, said, (), (), observed.now + timedelta(seconds=REFUSED_SECONDS))
    if names.FINALIZER not in (finalizers := _finalizers(observed)):  # before anything can be loaded; its own event tells of it
        return Plan(actions=(_with_finalizers(observed, [*finalizers, names.FINALIZER]),))
    pods = found.replicas(observed)
    models, changes = _models(observed, spec, whole, pods)
    status = observed.status.model_copy(
        update={
            "replicas": len(pods),
            "ready_replicas": sum(replica.ready for replica in pods),
            "selector": ",".join(f"{key}={value}" for key, value in selector(_ref(observed, spec)).items()),
            "models": models,
            "pods": pods,
            "admission": room.admission(observed, spec),
            "models_verified": f"{sum(bool(m.replicas) and m.verified == m.replicas for m in models)}/{len(models)}",
        }
    )
    admitted = room.said(observed, status.admission, spec)
    ready = found.ready(observed, spec, pods)
    if not pods and spec.replicas and admitted is not None and admitted.status == "False":
        ready = found.refuses(admitted.reason, admitted.message)
    status = found.with_conditions(
        observed,
        status if admitted is not None else room.without_condition(status),
        *([admitted] if admitted is not None else []),
        ready,
        found.served(observed, spec, whole),
        found.verified(observed, models, pods),
        found.rolled_back(models),
    )
    again = observed.now + timedelta(seconds=PENDING_SECONDS if _awaits(observed, spec, whole, models, pods) else QUIET_SECONDS)
    return _plan(observed, status, _actions(observed, spec, whole, settings), changes, min(again, _next_end(models, again)))


def refused_for(observed: ObservedEndpoint, settings: Settings) -> tuple[str, str] | None:
    """Reason and message where nothing can be made of the spec as it is. What runs is left as it is."""
    spec = observed.spec
    if spec is None:
        return "InvalidSpec", observed.invalid
    if observed.no_replicas is not None:
        return observed.no_replicas
    if spec.external is None and spec.gpus_per_replica == 0 and not settings.allow_cpu:
        return "CPUNotAllowed", "spec.gpusPerReplica 0 serves on CPU, which an administrator has to allow (chart value trainer.allowCPU)"
    if spec.base.trust_remote_code and not settings.allows_remote_code(str(observed.endpoint["metadata"].get("namespace"))):
        message = (
            "spec.base.trustRemoteCode has to be allowed for this namespace by an administrator (chart value trainer.remoteCodeNamespaces)"
        )
        return "RemoteCodeNotAllowed", message
    if observed.queue_problem:
        return "QueueNotAllowed", observed.queue_problem
    if observed.no_identity:
        return "APIRefused", observed.no_identity
    return None


def _nothing_to_make(observed: ObservedEndpoint, whole: Whole | None) -> tuple[str, str] | None:
    """The same where its base is a whole model that is not there (yet): nothing is kept for it until then."""
    return (whole.reason, whole.message) if whole is not None and whole.made is None and not observed.pods else None


def refused(observed: ObservedEndpoint, message: str, reason: str = "APIRefused") -> Plan[FineTuneEndpointStatus]:
    """Say that the API server refused what was to be done, or that it cannot be worked on. Nothing else is decided."""
    return _plan(observed, found.with_conditions(observed, observed.status, found.refuses(reason, message)), (), (), None)


def _ref(observed: ObservedEndpoint, spec: FineTuneEndpointSpec, whole: Whole | None = None) -> EndpointRef:
    meta = observed.endpoint["metadata"]
    may_run, made = room.replicas(observed, spec), whole.made if whole is not None else None
    return EndpointRef(meta["name"], meta["namespace"], meta["uid"], spec, may_run, observed.status.admission, made)


def _models(
    observed: ObservedEndpoint, spec: FineTuneEndpointSpec, whole: Whole | None, pods: list[Replica]
) -> tuple[list[EndpointModel], list[Change]]:
    known = {model.name: model for model in observed.status.models}
    models, changes = [], []
    if whole is not None and (whole.line is not None or whole.name in known):  # what runs goes on without its FineTunedModel
        before = known.get(whole.name) or EndpointModel(name=whole.name)
        entry, change = replaces(before, whole, pods, problems_of(observed, whole), observed.now)
        models.append(found.over_all(entry, pods))
        changes += [change] if change is not None else []
    for name in selected(observed, spec):
        if (line := observed.lines.get(name)) is None:
            continue  # it is unloaded
        entry = known.get(name) or EndpointModel(name=name)
        shares = observed.canaries and not observed.not_told_apart  # the gateway asks addresses, not names
        entry, change = advance(entry, line, spec, pods, observed.traffic, observed.now, canaries=shares)
        models.append(found.over_all(entry, pods))
        if change is not None:
            changes.append(change)
    return models, changes


def _actions(observed: ObservedEndpoint, spec: FineTuneEndpointSpec, whole: Whole | None, settings: Settings) -> list[Action]:
    """What is not applied already, or is another one now. Without a version to make replicas with, what runs is left as it is."""
    actions = list[Action]()
    if whole is not None and whole.made is None:
        return actions
    base = [whole.line] if whole is not None and whole.line is not None else []
    lines = [*base, *(observed.lines[name] for name in selected(observed, spec) if name in observed.lines)]
    ref = _ref(observed, spec, whole)
    for manifest in manifests(ref, lines, settings, observed.identity):
        if manifest["kind"] == "Deployment" and ref.replicas is None:
            continue
        key = manifest["kind"], manifest["metadata"]["name"]
        if observed.applied.get(key) != manifest["metadata"]["annotations"][names.ANNOTATION_HASH]:
            actions.append(Apply(manifest))
    return actions


def _finalizers(observed: ObservedEndpoint) -> list[str]:
    return list(observed.endpoint["metadata"].get("finalizers") or ())


def _with_finalizers(observed: ObservedEndpoint, finalizers: list[str]) -> Patch:
    """On condition of the state that they are derived from: others have finalizers, too."""
    meta = observed.endpoint["metadata"]
    body = {"metadata": {"finalizers": finalizers, "resourceVersion": meta.get("resourceVersion")}}
    return Patch(observed.endpoint["kind"], meta["name"], body)


def _leave(observed: ObservedEndpoint) -> Plan[FineTuneEndpointStatus]:
    """It is deleted: let it go when nothing is loaded any more, or the time is over. The garbage collector takes the rest."""
    finalizers = _finalizers(observed)
    if names.FINALIZER not in finalizers:
        return Plan()
    deleted = parse_time(observed.endpoint["metadata"].get("deletionTimestamp")) or observed.now
    loaded = [pod for pod in observed.pods if _may_unload(pod, observed.reports.get(pod.uid))]
    end = deleted + timedelta(seconds=UNLOAD_SECONDS)
    if loaded and observed.now < end:
        return Plan(requeue_at=observed.now + timedelta(seconds=1))
    return Plan(actions=(_with_finalizers(observed, [name for name in finalizers if name != names.FINALIZER]),))


def _may_unload(pod: ReplicaPod, report: ReplicaReport | None) -> bool:
    """Whether a replica serves something that can be unloaded: its base cannot, and one that never got an address has nothing."""
    if report is None:
        return bool(pod.ip or pod.address)
    return any(model.name != pod.version for model in report.models)


def _awaits(
    observed: ObservedEndpoint, spec: FineTuneEndpointSpec, whole: Whole | None, models: list[EndpointModel], pods: list[Replica]
) -> bool:
    """Whether something is under way: a replica that starts, a version that is loaded or asked, a canary."""
    if spec.external is None and len(pods) != room.expected(observed, spec):
        return True
    if not all(replica.ready for replica in pods) or observed.silent or observed.emptied:
        return True
    for model in models:
        wanted = [model.version, *model.kept, *([model.canary.version] if model.canary is not None else [])]
        for name in (versioned(model.name, number) for number in wanted if number is not None):
            if not all(any(m.name == name and m.state in (*SETTLED, *BAD) for m in replica.models) for replica in pods):
                return True
        if model.canary is not None and first(pods, versioned(model.name, model.canary.version), BAD) is None:
            return True
        if whole is not None and model.name == whole.name:
            continue
        line = observed.lines[model.name]
        if model.version != line.status.champion and model.rolled_back is None and model.canary is None and line.champion is not None:
            return True
    return False


def _next_end(models: list[EndpointModel], latest: datetime) -> datetime:
    """When the next version is unloaded that stays loaded for a while."""
    ends = [parse_time(kept.until) for model in models for kept in model.retained]
    return min((end for end in ends if end is not None), default=latest)


def _plan(
    observed: ObservedEndpoint,
    status: FineTuneEndpointStatus,
    actions: tuple[Action, ...] | list[Action],
    changes: tuple[Change, ...] | list[Change],
    again: datetime | None,
) -> Plan[FineTuneEndpointStatus]:
    generation = int(observed.endpoint["metadata"].get("generation") or 0)
    status = status.model_copy(update={"observed_generation": generation})
    before = observed.status
    return Plan(
        actions=tuple(actions),
        events=tuple(_events(before, status, changes)),
        status=None if status == before else status,
        before=before,
        due=WriteUrgency.LATER if _only_counts(before, status) else WriteUrgency.NOW,
        requeue_at=again,
    )


def _only_counts(before: FineTuneEndpointStatus, after: FineTuneEndpointStatus) -> bool:
    """Whether nothing is different but what a canary has answered so far."""

    def plain(status: FineTuneEndpointStatus) -> Any:
        models = [
            m.model_copy(update={"canary": m.canary and m.canary.model_copy(update={"requests": 0, "message": ""})}) for m in status.models
        ]
        return status.model_copy(update={"models": models})

    return bool(plain(before) == plain(after))


_TOLD = ("Admitted", "Ready", "Verified", "ModelsServed")


def _events(before: FineTuneEndpointStatus, after: FineTuneEndpointStatus, changes: tuple[Change, ...] | list[Change]) -> list[Event]:
    """What happened to models, and conditions that are another now."""
    told = [Event("Normal" if change.good else "Warning", change.reason, printable(shortened(change.message, 1000))) for change in changes]
    for type_ in _TOLD:
        old, new = before.condition(type_), after.condition(type_)
        if new is None or (old is not None and (old.status, old.reason) == (new.status, new.reason)):
            continue
        if new.status == "True":
            told.append(Event("Normal", new.reason, new.message or type_))
        elif new.status == "False" and new.reason not in ("NoReplicaReady", "ScaledToZero", "Pending"):
            told.append(Event("Warning", new.reason, shortened(new.message, 1000)))
    return list(dict.fromkeys(told))  # one that waits for its queue is not ready for that very reason
