"""Which version of a model answers, and how a new champion takes over. Pure: what is on record and observed -> what is to be.

The only memory is the endpoint's status: the same from any operator, at any time.
Knows nothing of how it is brought about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_api.endpoint import Canary, EndpointModel, FineTuneEndpointSpec, Replica, ReplicaModel, Retained, RollBack
from finetune_api.scalars import human_duration, seconds
from finetune_api.serving import ArmTraffic, CanaryTraffic

from ...model.endpoint import ModelLine
from ...model.times import parse_time, rfc3339
from .canary import judge

SETTLED = ("Verified", "Unverifiable")
"""Asked, and nothing speaks against it."""
BAD = ("Mismatch", "Refused")
MOST_KEPT = 8


@dataclass(frozen=True)
class Change:
    """What happened to a model, for an Event and the log."""

    reason: str
    message: str
    good: bool = True


def versioned(model: str, number: int) -> str:
    """The name of one version."""
    return f"{model}@{number}"


def advance(
    before: EndpointModel,
    line: ModelLine,
    spec: FineTuneEndpointSpec,
    replicas: Sequence[Replica],
    traffic: Sequence[CanaryTraffic],
    now: datetime,
    *,
    canaries: bool = True,
) -> tuple[EndpointModel, Change | None]:
    """The model's entry in the status, without what `replicas` say of it. `canaries`: somebody gives a version its share."""
    champion = line.champion
    retained = [r for r in before.retained if _lasts(r, now) and line.status.version(r.version) is not None]
    model = before.model_copy(update={"retained": retained})
    if champion is None:
        return _kept(model.model_copy(update={"version": None, "canary": None}), line, spec), None
    went_back = before.rolled_back if before.rolled_back is not None and before.rolled_back.version == champion.number else None
    model = model.model_copy(update={"rolled_back": went_back})
    change = None
    if champion.number == model.version or went_back is not None:
        model = model.model_copy(update={"canary": None})
    else:
        model, change = _on_its_way(model, champion.number, line, spec, replicas, traffic, now, canaries)
    return _kept(model, line, spec), change


def _on_its_way(
    model: EndpointModel,
    number: int,
    line: ModelLine,
    spec: FineTuneEndpointSpec,
    replicas: Sequence[Replica],
    traffic: Sequence[CanaryTraffic],
    now: datetime,
    canaries: bool,
) -> tuple[EndpointModel, Change | None]:
    canary = model.canary if model.canary is not None and model.canary.version == number else Canary(version=number)
    present = model.version if line.status.version(model.version) is not None else None
    if bad := first(replicas, versioned(line.name, number), BAD):
        told = f"replica {bad[0].name}: {bad[1].state}: {bad[1].message}"
        if present is None:  # there is nothing to go back to
            return model.model_copy(update={"canary": canary.model_copy(update={"message": told})}), None
        return goes_back(model, number, told, now)
    asked, ready = settled(replicas, versioned(line.name, number)), sum(replica.ready for replica in replicas)
    if not ready or asked < ready:
        waits = f"is loaded and verified on {asked} of {ready} replicas" if ready else "waits for a replica"
        return model.model_copy(update={"canary": canary.model_copy(update={"message": waits})}), None
    steps = spec.rollout.steps
    returns = present is not None and (number < present or number in {r.version for r in model.retained})
    if present is None or returns or not steps or not canaries or _hopeless(replicas, versioned(line.name, present)):
        return _take_over(model, number, spec, now)
    if canary.since is None or canary.step >= len(steps):
        return _step(model, number, 0, steps, now)
    old, new = _arms(traffic, line.name, canary)
    verdict = judge(old, new, len(steps))
    if verdict.worse:
        return goes_back(model, number, f"at {canary.percent} % of the requests {verdict.message}", now)
    elapsed = (now - (parse_time(canary.since) or now)).total_seconds()
    needs = seconds(spec.rollout.interval)
    if elapsed >= needs and new.requests >= spec.rollout.min_requests:
        if canary.step + 1 >= len(steps):
            return _take_over(model, number, spec, now, verdict.message)
        return _step(model, number, canary.step + 1, steps, now, verdict.message)
    lacks = [f"{new.requests} of {spec.rollout.min_requests} requests"] if new.requests < spec.rollout.min_requests else []
    lacks += [f"{human_duration(needs - elapsed)} more"] if elapsed < needs else []
    going = canary.model_copy(update={"requests": new.requests, "message": f"waits: {', '.join(lacks)}; {verdict.message}"})
    return model.model_copy(update={"canary": going}), None


def _step(
    model: EndpointModel, number: int, step: int, steps: Sequence[int], now: datetime, found: str = ""
) -> tuple[EndpointModel, Change]:
    canary = Canary(version=number, step=step, percent=steps[step], since=rfc3339(now), message="has just begun")
    told = f"{versioned(model.name, number)} gets {steps[step]} % of the requests" + (f": {found}" if found else "")
    return model.model_copy(update={"canary": canary}), Change("CanaryStep", told)


def _take_over(
    model: EndpointModel, number: int, spec: FineTuneEndpointSpec, now: datetime, found: str = ""
) -> tuple[EndpointModel, Change]:
    retained = [r for r in model.retained if r.version != number]
    if model.version is not None and (keep := seconds(spec.keep_loaded)) > 0:
        retained = [Retained(version=model.version, until=rfc3339(now + timedelta(seconds=keep))), *retained][:MOST_KEPT]
    before = f" in place of version {model.version}" if model.version is not None else ""
    change = Change("TookOver", f"{model.name} is answered by version {number}{before}" + (f": {found}" if found else ""))
    return model.model_copy(update={"version": number, "canary": None, "retained": retained, "rolled_back": None}), change


def goes_back(model: EndpointModel, number: int, why: str, now: datetime) -> tuple[EndpointModel, Change]:
    """The version before answers, and this one is not tried again until the FineTunedModel's champion is another one."""
    message = f"{versioned(model.name, number)} went back, version {model.version} answers: {why}"
    gone = RollBack(version=number, at=rfc3339(now), message=message)
    return model.model_copy(update={"canary": None, "rolled_back": gone}), Change("RolledBack", message, good=False)


def _kept(model: EndpointModel, line: ModelLine, spec: FineTuneEndpointSpec) -> EndpointModel:
    """With what stays loaded beside, and the digest of what answers."""
    named = next((served.versions for served in spec.models if served.name == line.name), [])
    numbers = {*(r.version for r in model.retained), *(n for n in named if line.status.version(n) is not None)} - {model.version}
    answers = line.status.version(model.version)
    return model.model_copy(update={"kept": sorted(numbers)[-MOST_KEPT:], "digest": answers.digest if answers is not None else ""})


def _lasts(retained: Retained, now: datetime) -> bool:
    until = parse_time(retained.until)
    return until is not None and now < until


def _arms(traffic: Sequence[CanaryTraffic], model: str, canary: Canary) -> tuple[ArmTraffic, ArmTraffic]:
    """Of all gateways together, in this step."""
    old, new = ArmTraffic(), ArmTraffic()
    for told in traffic:
        if (told.model, told.version, told.since) == (model, canary.version, canary.since):
            old, new = old.plus(told.old), new.plus(told.new)
    return old, new


def first(replicas: Sequence[Replica], name: str, states: Sequence[str]) -> tuple[Replica, ReplicaModel] | None:
    """The first replica on which that version is in one of these states."""
    found = ((replica, model) for replica in replicas for model in replica.models if model.name == name and model.state in states)
    return next(found, None)


def _hopeless(replicas: Sequence[Replica], name: str) -> bool:
    """Whether that version is found bad on every replica: nobody could be given to it."""
    ready = [replica for replica in replicas if replica.ready]
    return bool(ready) and all(any(m.name == name and m.state in BAD for m in replica.models) for replica in ready)


def settled(replicas: Sequence[Replica], name: str) -> int:
    """Replicas that answer, were asked for that version, and of which nothing speaks against it."""
    return sum(replica.ready and any(m.name == name and m.state in SETTLED for m in replica.models) for replica in replicas)
