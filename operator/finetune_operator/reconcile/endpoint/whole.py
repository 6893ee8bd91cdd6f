"""A whole model as an endpoint's base: which version its replicas are made with, and which answers while they are replaced. Pure.

Another version is another template of the Deployment. A replica is ready when it was found to serve its version, so none of the
old ones goes before; until the last of them has gone both answer, each for its share of the replicas.
Knows nothing of manifests, nor of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from finetune_api.endpoint import Canary, EndpointModel, FineTuneEndpointSpec, Replica
from finetune_api.serving import OrderedModel
from finetune_api.tuned_model import ModelVersion
from finetune_api.versions import MERGED

from ...model.endpoint import ModelLine, ObservedEndpoint
from ...model.tuned_model import version_named
from .orders import ordered
from .rollout import BAD, Change, first, goes_back, settled, versioned

_MOST_TOLD = 10


@dataclass(frozen=True)
class Whole:
    """The whole model that an endpoint's base names."""

    name: str
    """FineTunedModel."""
    line: ModelLine | None
    wanted: int | None = None
    """Version that the spec means, where it can be served."""
    made: OrderedModel | None = None
    """What replicas are made with: that one, or the one that answers where it went back or cannot be served. None: nothing can be made."""
    reason: str = ""
    message: str = ""
    """Why there is no `wanted`."""


def whole_model(observed: ObservedEndpoint, spec: FineTuneEndpointSpec) -> Whole | None:
    """What is to be served as the base; None where that is no FineTunedModel."""
    named = version_named(spec.base.uri)
    if named is None:
        return None
    name, pinned = named
    if (line := observed.lines.get(name)) is None:
        return Whole(name, None, reason="ModelNotFound", message=f"spec.base.uri: there is no FineTunedModel {name} in this namespace")
    number = pinned if pinned is not None else line.status.champion
    version = line.status.version(number)
    reason, message = _against(name, number, version, line)
    before = next((model for model in observed.status.models if model.name == name), EndpointModel(name=name))
    went_back = before.rolled_back is not None and before.rolled_back.version == number
    if reason or went_back:
        version = line.status.version(before.version)
    folder = _folder(version) if version is not None else None
    made = _made(line, version, folder) if version is not None and folder is not None else None
    return Whole(name, line, None if reason else number, made, reason, message)


def _made(line: ModelLine, version: ModelVersion, folder: str) -> OrderedModel:
    """Without what says nothing of its files: a record that tells more than the job did makes no other replicas."""
    return ordered(line, version, version.number, folder).model_copy(update={"rank": None, "base_fingerprint": ""})


def _folder(version: ModelVersion) -> str | None:
    """Where below the version's folder its whole model lies; None where there is none."""
    return "" if version.form == "Model" else MERGED if version.merged else None


def _against(name: str, number: int | None, version: ModelVersion | None, line: ModelLine) -> tuple[str, str]:
    if number is None:
        return "NoChampion", f"spec.base.uri: {name} has no champion yet"
    if version is None:
        kept = ", ".join(str(v.number) for v in line.status.versions[:_MOST_TOLD]) or "none"
        return "VersionNotFound", f"spec.base.uri: {name} keeps no version {number} (kept: {kept}); name one of them"
    if _folder(version) is None:
        fix = f"name its base in spec.base.uri and {name} in spec.models, or publish it with output.merged"
        return "NotWhole", f"spec.base.uri: {versioned(name, number)} is an adapter: {fix}"
    return "", ""


def replaces(
    before: EndpointModel, whole: Whole, replicas: Sequence[Replica], problems: str, now: datetime
) -> tuple[EndpointModel, Change | None]:
    """The model's entry in the status, without what `replicas` say of it. `problems`: why replicas of the wanted version do not start."""
    number, present = whole.wanted, before.version
    went_back = before.rolled_back is not None and before.rolled_back.version == number
    model = before.model_copy(update={"retained": [], "kept": [], "rolled_back": before.rolled_back if went_back else None})
    if number is None or went_back or number == present:
        return _described(model.model_copy(update={"canary": None}), whole), None
    name = versioned(whole.name, number)
    if bad := first(replicas, name, BAD):
        told = f"replica {bad[0].name}: {bad[1].state}: {bad[1].message}"
        if present is not None and whole.line is not None and whole.line.status.version(present) is not None:
            return goes_back(model, number, told, now)
        return _coming(model, number, 0, told), None  # there is nothing to go back to
    new, old = settled(replicas, name), settled(replicas, versioned(whole.name, present)) if present is not None else 0
    if new and not old:
        instead = f" in place of version {present}" if present is not None else ""
        model = model.model_copy(update={"version": number, "canary": None})
        return _described(model, whole), Change("TookOver", f"{whole.name} is answered by version {number}{instead}")
    told = f"{new} of {len(replicas)} replicas were found to serve it" + (f"; {problems}" if problems else "")
    return _coming(model, number, 100 * new // (new + old) if new else 0, told), None


def _coming(model: EndpointModel, number: int, percent: int, message: str) -> EndpointModel:
    """On its way, for its share of the requests: nobody judges it by them."""
    return model.model_copy(update={"canary": Canary(version=number, percent=percent, message=message)})


def _described(model: EndpointModel, whole: Whole) -> EndpointModel:
    """With the digest of what answers; one whose record is gone keeps it."""
    version = whole.line.status.version(model.version) if whole.line is not None else None
    return model.model_copy(update={"digest": version.digest}) if version is not None else model


def problems_of(observed: ObservedEndpoint, whole: Whole) -> str:
    """Why replicas with the wanted version do not start."""
    name = versioned(whole.name, whole.wanted or 0)
    return "; ".join(f"{pod.name}: {pod.problem}" for pod in observed.pods if pod.version == name and pod.problem)[:400]
