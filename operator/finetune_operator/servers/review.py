"""PURE: an AdmissionReview's request -> its response (https://kubernetes.io/docs/reference/access-authn-authz/extensible-admission-controllers/).

Knows nothing of the cluster but what it is told (`webhooks.py`).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api import KIND, names
from finetune_api.advice import advice
from finetune_api.base import shortened
from finetune_api.queue import QUEUE_KIND
from finetune_api.spec import FineTuneJobSpec
from finetune_api.validation import InvalidDocument, parse_queue, parse_spec

from ..reconcile.job.immutability import REMOTE_CODE_REFUSED

_WARNING_LIMIT, _WARNINGS = 250, 8
_USER_LIMIT = 253


@dataclass(frozen=True)
class Rights:
    """What the cluster allows the job's namespace."""

    remote_code: bool = False
    queue_refused: str = ""
    """Why the queue that the job names may not be used; empty when it may, or is not there yet."""
    queue_unknown: str = ""
    """Why it is not known whether it may; nothing is refused by that."""


@dataclass(frozen=True)
class Answer:
    """Allowed or why not, what to warn of, and how the object is changed."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    patch: list[dict[str, Any]] = field(default_factory=list)

    def to_wire(self, uid: str) -> dict[str, Any]:
        """The AdmissionReview that goes back."""
        response: dict[str, Any] = {"uid": uid, "allowed": not self.errors}
        if self.errors:
            response["status"] = {"code": 422, "reason": "Invalid", "message": "; ".join(self.errors)}
        if self.warnings:
            response["warnings"] = [shortened(w, _WARNING_LIMIT) for w in self.warnings[:_WARNINGS]]
        if self.patch:
            response["patchType"] = "JSONPatch"
            response["patch"] = base64.b64encode(json.dumps(self.patch).encode()).decode()
        return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}


def parsed(raw: Any) -> FineTuneJobSpec | None:
    """The spec of a FineTuneJob that can be read."""
    try:
        return parse_spec(raw.get("spec") if isinstance(raw, Mapping) else None, strict=False)
    except InvalidDocument:
        return None


def validate(request: Mapping[str, Any], rights: Rights) -> Answer:
    """Refuse what can never run; never an object that is being deleted, whatever it looks like."""
    new, old = request.get("object") or {}, request.get("oldObject") or {}
    if (new.get("metadata") or {}).get("deletionTimestamp") or request.get("operation") not in ("CREATE", "UPDATE"):
        return Answer()
    kind = (request.get("kind") or {}).get("kind")
    if request["operation"] == "UPDATE" and new.get("spec") == old.get("spec"):
        return Answer()  # labels and finalizers of a job that an older release took are its owner's business
    try:
        if kind == QUEUE_KIND:
            parse_queue(new)
            return Answer()
        if kind != KIND:
            return Answer()
        spec = parse_spec(new.get("spec"), strict=False)
    except InvalidDocument as failure:
        return Answer(errors=[str(error) for error in failure.errors])
    errors = []
    if spec.runs_remote_code and not rights.remote_code:
        errors.append(f"spec.model.trustRemoteCode: {REMOTE_CODE_REFUSED}")
    if rights.queue_refused and (request["operation"] == "CREATE" or spec.scheduling.queue != _queue(old)):
        errors.append(f"spec.scheduling.queue: {rights.queue_refused}")
    if errors:
        return Answer(errors=errors)
    unknown = [f"spec.scheduling.queue: {rights.queue_unknown}; the job's condition Admitted will tell"] if rights.queue_unknown else []
    return Answer(warnings=unknown + (advice(spec) if request["operation"] == "CREATE" else []))


def _queue(raw: Mapping[str, Any]) -> str | None:
    spec = parsed(raw)
    return spec.scheduling.queue if spec is not None else None


def mutate(request: Mapping[str, Any]) -> Answer:
    """Note who created the object, and keep others from changing the note. Nothing of the spec is changed: Git holds it."""
    new, old = request.get("object") or {}, request.get("oldObject") or {}
    told = (new.get("metadata") or {}).get("annotations")
    present = (told or {}).get(names.ANNOTATION_CREATED_BY)
    if request.get("operation") == "CREATE":
        wanted: str | None = str((request.get("userInfo") or {}).get("username") or "")[:_USER_LIMIT]
    elif request.get("operation") == "UPDATE":
        wanted = ((old.get("metadata") or {}).get("annotations") or {}).get(names.ANNOTATION_CREATED_BY)
    else:
        return Answer()
    if present == wanted or not (present or wanted):
        return Answer()
    path = "/metadata/annotations/" + names.ANNOTATION_CREATED_BY.replace("~", "~0").replace("/", "~1")
    if not wanted:
        return Answer(patch=[{"op": "remove", "path": path}])
    if told is None:
        return Answer(patch=[{"op": "add", "path": "/metadata/annotations", "value": {names.ANNOTATION_CREATED_BY: wanted}}])
    return Answer(patch=[{"op": "add", "path": path, "value": wanted}])
