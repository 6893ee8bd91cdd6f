"""PURE: FineTunedModels as decisions see them, and which of them a job refers to. Knows nothing of what is decided."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from finetune_api import KIND
from finetune_api.contract import CatalogReport, Champion
from finetune_api.endpoint import ENDPOINT_KIND, FineTuneEndpointStatus
from finetune_api.lenient import read
from finetune_api.tuned_model import FineTunedModelSpec, FineTunedModelStatus, ModelVersion
from finetune_api.uris import parse_uri
from finetune_api.validation import InvalidDocument, parse_model

from .job import ChildJobView, PodView
from .objects import Key, Object, as_object
from .workload import has_ended

_SCHEME = "model://"
_PIN = "f:champion"


@dataclass(frozen=True)
class TunedModel:
    """A FineTunedModel as a job sees it."""

    name: str
    spec: FineTunedModelSpec | None
    """None where it is not valid."""
    status: FineTunedModelStatus
    deleting: bool = False

    def has_recorded(self, number: int) -> bool:
        """Whether a version is on record, or was until it was removed. Numbers are never given twice."""
        storage = self.status.storage
        return self.status.version(number) is not None or number in {*storage.removing, *storage.removed}

    @property
    def champion(self) -> Champion | None:
        """The version that a job's result is compared with."""
        found = self.status.version(self.status.champion)
        if found is None:
            return None
        return Champion(model=self.name, number=found.number, digest=found.digest, ancestors=ancestors(self.status, found))


def ancestors(status: FineTunedModelStatus, version: ModelVersion) -> list[int]:
    """Versions that one descends from, the nearest first; of one that is not kept any more its parent is not known."""
    found: list[int] = []
    parent = version.parent
    while parent is not None and parent not in found and parent != version.number:
        found.append(parent)
        earlier = status.version(parent)
        parent = earlier.parent if earlier is not None else None
    return found


def tuned_model(raw: Object) -> TunedModel:
    """Read one leniently."""
    meta = raw["metadata"]
    try:
        spec = parse_model(raw, strict=False)
    except InvalidDocument:
        spec = None
    return TunedModel(meta["name"], spec, read(FineTunedModelStatus, raw.get("status")), bool(meta.get("deletionTimestamp")))


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What an endpoint serves of a model, or is told to."""

    endpoint: str
    answers: bool
    """A version answers under the model's name."""
    versions: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class ObservedModel:
    """Everything that a decision about a FineTunedModel may depend on."""

    raw: Object
    """The FineTunedModel."""
    jobs: tuple[Object, ...] = ()
    """FineTuneJobs of its namespace that publish to it, or go on from a version of it."""
    serving: tuple[Serving, ...] = ()
    catalogs: tuple[ChildJobView, ...] = ()
    """Jobs of the stage catalog that it owns."""
    pods: tuple[PodView, ...] = ()
    """Their pods."""
    applied: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """(kind, name) -> applied hash, of what it owns."""
    report: CatalogReport | None = None
    """The newest that its catalog pods sent, until it is on record."""
    reported_by: str = ""
    """Name of the Job whose pod sent it."""
    now: datetime


def models_published_to(job: Object) -> list[str]:
    """Names of the FineTunedModels that a job's result becomes a version of."""
    spec = job.get("spec")
    publish = spec.get("publish") if isinstance(spec, dict) else None
    found = [t["model"] for t in publish if isinstance(t, dict) and isinstance(t.get("model"), str)] if isinstance(publish, list) else []
    return list(dict.fromkeys(found)) if found else found


def models_named(job: Object) -> list[str]:
    """Names of the FineTunedModels that a job publishes to, or goes on from."""
    found, spec = models_published_to(job), job.get("spec")
    tuning = spec.get("tuning") if isinstance(spec, dict) else None
    uri = tuning.get("continueFrom") if isinstance(tuning, dict) else None
    if isinstance(uri, str) and uri.startswith(_SCHEME) and (source := uri.removeprefix(_SCHEME).partition("@")[0]) not in found:
        return [*found, source]
    return found


def version_named(uri: str | None) -> tuple[str, int | None] | None:
    """Name and version, if it names one, of the FineTunedModel that a model:// uri means; None where it means none."""
    if uri is None or not uri.startswith(_SCHEME):
        return None
    parsed = parse_uri(uri)
    return parsed.name, int(parsed.revision) if parsed.revision else None


def continued_version(job: Object, model: str) -> int | None:
    """The version of a model that a job which has not ended goes on from."""
    used = as_object(job.get("status")).get("models")
    found = [m.get("version") for m in map(as_object, used if isinstance(used, list) else []) if m.get("name") == model]
    return found[0] if found and type(found[0]) is int and not has_ended(job) else None


def serving_of(endpoint: Object, model: str) -> Serving | None:
    """What an endpoint serves of a model; None where it has nothing to do with it."""
    status = read(FineTuneEndpointStatus, endpoint.get("status"))
    known = next((m for m in status.models if m.name == model), None)
    wanted = {number for entry in _served(endpoint) if entry.get("name") == model for number in _numbers(entry.get("versions"))}
    if (base := base_named(endpoint)) is not None and base[0] == model and base[1] is not None:
        wanted.add(base[1])
    if known is None and not wanted:
        return None
    versions = set(wanted)
    if known is not None:
        versions.update(known.kept, *([[known.version]] if known.version else []), *([[known.canary.version]] if known.canary else []))
    answers = known is not None and known.version is not None
    return Serving(endpoint=endpoint["metadata"]["name"], answers=answers, versions=frozenset(versions))


def models_served(endpoint: Object) -> list[str]:
    """Names of the FineTunedModels that an endpoint names, its base among them, or says that it serves."""
    told = as_object(endpoint.get("status")).get("models")
    entries = [*_served(endpoint), *(as_object(m) for m in (told if isinstance(told, list) else []))]
    base = base_named(endpoint)
    named = [*([base[0]] if base is not None else []), *(_text(entry.get("name")) for entry in entries)]
    return list(dict.fromkeys(filter(None, named)))


def base_named(endpoint: Object) -> tuple[str, int | None] | None:
    """Name and version, if it names one, of the FineTunedModel that is an endpoint's base; None where it is none, or cannot be read."""
    uri = as_object(as_object(endpoint.get("spec")).get("base")).get("uri")
    try:
        return version_named(uri if isinstance(uri, str) else None)
    except ValueError:
        return None


def _served(endpoint: Object) -> Iterator[Object]:
    entries = as_object(endpoint.get("spec")).get("models")
    yield from (as_object(entry) for entry in (entries if isinstance(entries, list) else []))


def _numbers(value: Any) -> list[int]:
    return [number for number in value if type(number) is int] if isinstance(value, list) else []


def models_touched(kind: str, raw: Object) -> list[Key]:
    """FineTunedModels that are to be looked at when another object is different now, or gone: a job that has published to one or
    has ended, an endpoint that serves one.
    """
    namespace = raw["metadata"]["namespace"]
    if kind == KIND and (has_ended(raw) or as_object(raw.get("status")).get("artifacts")):
        return [(namespace, name) for name in models_published_to(raw)]
    return [(namespace, name) for name in models_served(raw)] if kind == ENDPOINT_KIND else []


def has_unready_storage(raw: Object) -> bool:
    """Whether a model's storage cannot be read or written, as its status says."""
    conditions = as_object(raw.get("status")).get("conditions")
    found = map(as_object, conditions if isinstance(conditions, list) else [])
    return any((c.get("type"), c.get("status")) == ("StorageReady", "False") for c in found)


def pinned_by(raw: Object) -> str:
    """Who wrote `spec.champion` last, by the object's managedFields; empty where it is not told."""
    managers = raw["metadata"].get("managedFields")
    found = [
        (_text(as_object(entry).get("time")), _text(as_object(entry).get("manager")))
        for entry in (managers if isinstance(managers, list) else [])
        if _PIN in as_object(as_object(as_object(entry).get("fieldsV1")).get("f:spec"))
    ]
    return max(found, default=("", ""))[1]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
