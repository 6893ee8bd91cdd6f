"""What each replica is to serve. Pure: the spec, the models and what is on record -> the order, the same for all replicas.

Knows nothing of what they answer.
"""

from __future__ import annotations

from datetime import timedelta

from finetune_api.endpoint import MOST_MODELS, EndpointModel, FineTuneEndpointSpec
from finetune_api.scalars import seconds
from finetune_api.serving import ExternalEngines, OrderedModel, ReplicaOrder
from finetune_api.tuned_model import ModelVersion

from ...model.endpoint import ModelLine, ObservedEndpoint
from ...model.times import rfc3339
from ...model.tuned_model import version_named
from .rollout import versioned


def selected(observed: ObservedEndpoint, spec: FineTuneEndpointSpec) -> list[str]:
    """Names of the models that it is to serve beside its base, also of those that are not there: those named first."""
    names = [served.name for served in spec.models]
    if spec.model_selector is not None:
        names += sorted(line.name for line in observed.lines.values() if spec.model_selector.selects(dict(line.labels)))
    base = version_named(spec.base.uri)
    if base is None:
        return list(dict.fromkeys(names))[:MOST_MODELS]
    return [name for name in dict.fromkeys(names) if name != base[0]][: MOST_MODELS - 1]


def fits(version: ModelVersion) -> bool:
    """Whether it is loaded beside the base: whole models are not."""
    return version.form == "Adapter"


def order(observed: ObservedEndpoint, spec: FineTuneEndpointSpec) -> ReplicaOrder:
    """Everything that a replica of it is to serve now. One that is being deleted serves no tuned model any more."""
    models: list[OrderedModel] = []
    if not observed.endpoint["metadata"].get("deletionTimestamp"):
        known = {model.name: model for model in observed.status.models}
        for name in selected(observed, spec):
            line = observed.lines.get(name)
            if line is not None and name != observed.endpoint["metadata"]["name"]:
                models += _of(line, known.get(name) or EndpointModel(name=name), spec)
    return ReplicaOrder(
        generation=int(observed.endpoint["metadata"].get("generation") or 0),
        models=models[:MOST_MODELS],
        verify_before=rfc3339(observed.now - timedelta(seconds=seconds(spec.verify_every))),
        external=_external(observed, spec),
    )


def _external(observed: ObservedEndpoint, spec: FineTuneEndpointSpec) -> ExternalEngines | None:
    if spec.external is None:
        return None
    addresses = [pod.address for pod in observed.pods]
    return ExternalEngines(addresses=addresses, adapters_path=spec.external.adapters_path, not_told_apart=observed.not_told_apart)


def _of(line: ModelLine, entry: EndpointModel, spec: FineTuneEndpointSpec) -> list[OrderedModel]:
    """What answers, what is to take over, and what stays loaded, in this order."""
    champion = line.status.champion
    went_back = entry.rolled_back is not None and entry.rolled_back.version == champion
    named = next((served.versions for served in spec.models if served.name == line.name), [])
    numbers = [entry.version, None if went_back else champion, *(r.version for r in entry.retained), *named]
    found = [line.status.version(number) for number in dict.fromkeys(n for n in numbers if n is not None)]
    return [ordered(line, version, entry.version) for version in found if version is not None and fits(version)]


def ordered(line: ModelLine, version: ModelVersion, answers: int | None, folder: str = "") -> OrderedModel:
    """A version as a replica is told of it. `answers`: the one that answers under the model's name. `folder`: of a whole model."""
    return OrderedModel(
        name=versioned(line.name, version.number),
        aliases=[line.name] if version.number == answers else [],
        model=line.name,
        number=version.number,
        storage=line.spec.storage,
        s3_endpoint=line.spec.s3_endpoint,
        folder=folder,
        digest=version.digest,
        rank=version.rank,
        base_fingerprint=version.base.fingerprint if version.base is not None else "",
    )
