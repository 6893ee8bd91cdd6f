"""FineTunedModels that a job refers to: found once, before anything begins, and asked at the end whether its version is on record.

Knows nothing of stages.
"""

from __future__ import annotations

from finetune_api.contract import Champion
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Artifact, ConditionType, ModelInUse

from ...model.tuned_model import TunedModel, version_named
from .draft import Draft

NOT_FOUND, FOUND = "ModelNotFound", "ModelFound"
RECORDING = "RecordingVersion"
"""Reason of Succeeded while the FineTunedModel does not list the version yet"""


def with_models(draft: Draft, spec: FineTuneJobSpec) -> FineTuneJobSpec | None:
    """The spec with the version that tuning.continueFrom stands for. None while the job waits for a model, and while what was found
    is put on record: from then on it is what the job goes by, whatever becomes of the models.
    """
    continued = version_named(spec.tuning.continue_from)
    published = [target.model for target in spec.publish if target.model is not None]
    names = list(dict.fromkeys([*published, *([continued[0]] if continued is not None else [])]))
    known = {model.name: model for model in draft.status.models}
    if any(name not in known for name in names):
        _find(draft, continued, published, [name for name in names if name not in known])
        return None
    if continued is None:
        return spec
    version = known[continued[0]].version
    uri = f"model://{continued[0]}@{version}"
    return spec.model_copy(update={"tuning": spec.tuning.model_copy(update={"continue_from": uri})})


def _find(draft: Draft, continued: tuple[str, int | None] | None, published: list[str], missing: list[str]) -> None:
    found: list[ModelInUse] = []
    wrong: dict[ConditionType, str] = {}
    for name in missing:
        view = draft.observed.models.get(name)
        for type_, field in (("TargetsReady", "publish[].model"), ("DataReady", "tuning.continueFrom")):
            refers = name in published if type_ == "TargetsReady" else continued is not None and name == continued[0]
            if refers and (why := _problem(view, name)):
                wrong.setdefault(type_, f"{field}: {why}")  # type: ignore[arg-type]
        version = None
        if continued is not None and name == continued[0] and view is not None and not _problem(view, name):
            version, why = _version(draft, view, continued[1])
            if why:
                wrong.setdefault("DataReady", f"tuning.continueFrom: {why}")
        if view is not None and view.spec is not None:
            secret = view.spec.secret_ref.name if view.spec.secret_ref is not None else ""
            used = ModelInUse(name=name, storage=view.spec.storage, s3_endpoint=view.spec.s3_endpoint, secret=secret, version=version)
            found.append(used)
    for type_, message in wrong.items():
        known = draft.status.condition(type_)
        if known is None or known.reason != NOT_FOUND:
            draft.event("Warning", NOT_FOUND, message)
        draft.set(type_, "False", NOT_FOUND, message)
    if wrong:
        return  # the model wakes the job
    for waited in ("TargetsReady", "DataReady"):
        if (known := draft.status.condition(waited)) is not None and known.reason == NOT_FOUND:
            draft.set(waited, "Unknown", FOUND, "the FineTunedModel is there")  # type: ignore[arg-type]
    draft.status.models = sorted([*draft.status.models, *found], key=lambda model: model.name)


def _problem(view: TunedModel | None, name: str) -> str:
    if view is None:
        return f"there is no FineTunedModel {name} in this namespace; the job waits until it is made"
    if view.deleting:
        return f"FineTunedModel {name} is being deleted; the job waits until it is made again"
    return f"the spec of FineTunedModel {name} is not valid; its condition Ready says why" if view.spec is None else ""


def _version(draft: Draft, view: TunedModel, wanted: int | None) -> tuple[int | None, str]:
    """The version to go on from, or what the job waits for."""
    number = wanted if wanted is not None else draft.observed.continues_from or view.status.champion
    if number is None:
        return None, f"FineTunedModel {view.name} has no champion yet; name a version (model://{view.name}@VERSION), or wait for one"
    version = view.status.version(number)
    if version is None:
        kept = ", ".join(str(v.number) for v in view.status.versions[:10]) or "none"
        return None, f"FineTunedModel {view.name} keeps no version {number} (kept: {kept})"
    if version.form == "Model":
        return None, f"version {number} of FineTunedModel {view.name} is a whole model; go on from it by model.uri in place of continueFrom"
    return number, ""


def as_written(kept: FineTuneJobSpec, wanted: FineTuneJobSpec) -> FineTuneJobSpec:
    """The spec of job.json, which names the version of tuning.continueFrom, as it is in the job, which may leave it open."""
    ours, theirs = version_named(kept.tuning.continue_from), version_named(wanted.tuning.continue_from)
    if ours is None or theirs is None or ours[0] != theirs[0] or theirs[1] is not None:
        return kept
    return kept.model_copy(update={"tuning": kept.tuning.model_copy(update={"continue_from": wanted.tuning.continue_from})})


def champion_of(draft: Draft, spec: FineTuneJobSpec) -> Champion | None:
    """The present champion of the first FineTunedModel that the job publishes to: one more arm of the evaluation."""
    for target in spec.publish:
        if target.model is not None and (view := _same_storage(draft, target.model)) is not None and view.champion is not None:
            return view.champion
    return None


def versions_recorded(draft: Draft) -> bool:
    """Whether every FineTunedModel lists the version that the job has made for it; else the condition Succeeded says which does not."""
    artifact = next((a for a in draft.status.artifacts if not _recorded(draft, a)), None)
    if artifact is None:
        return True
    view = draft.observed.models.get(str(artifact.model))
    what = f"version {artifact.version} of FineTunedModel {artifact.model}, which is at {artifact.uri}, is not on record yet"
    if view is None or view.spec is None:
        what = f"{what}: the FineTunedModel is gone; it finds the version when it is made again"
    elif _same_storage(draft, view.name) is None:
        what = f"{what}: it keeps its versions at {view.spec.storage} now; set spec.storage back, or copy the version there"
    draft.phase("Publishing")
    draft.set("Succeeded", "Unknown", RECORDING, what)
    return False


def _recorded(draft: Draft, artifact: Artifact) -> bool:
    if artifact.model is None or artifact.version is None:
        return True
    view = _same_storage(draft, artifact.model)
    return view is not None and view.has_recorded(artifact.version)


def _same_storage(draft: Draft, name: str) -> TunedModel | None:
    """The model, where it keeps its versions at the place that the job knows."""
    view = draft.observed.models.get(name)
    used = next((model for model in draft.status.models if model.name == name), None)
    same = view is not None and view.spec is not None and used is not None and view.spec.storage == used.storage
    return view if same else None
