"""From a document to a FineTuneJobSpec, or to errors that name the field, the value and the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from . import API_VERSION, KIND
from .base import SHOWN, APIModel, shortened
from .endpoint import ENDPOINT_KIND, FineTuneEndpointSpec
from .queue import QUEUE_KIND, FineTuneQueueSpec
from .scalars import DNS_SUBDOMAIN
from .spec import FineTuneJobSpec
from .tuned_model import MODEL_KIND, FineTunedModelSpec

MAX_ERRORS = 20
Spec = TypeVar("Spec", bound=BaseModel)
_SPECS: dict[str, type[APIModel]] = {
    KIND: FineTuneJobSpec,
    QUEUE_KIND: FineTuneQueueSpec,
    MODEL_KIND: FineTunedModelSpec,
    ENDPOINT_KIND: FineTuneEndpointSpec,
}


@dataclass(frozen=True)
class FieldError:
    """One thing wrong with a document."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class InvalidDocument(ValueError):
    """A document that is not valid; `errors` says why, field by field."""

    def __init__(self, errors: list[FieldError]) -> None:
        self.errors = errors[:MAX_ERRORS]
        super().__init__("; ".join(str(error) for error in self.errors))


def parse_spec(raw: Any, *, strict: bool = True) -> FineTuneJobSpec:
    """Parse a spec. Strict refuses unknown fields; the operator is lenient, to survive newer objects.

    Raises InvalidDocument.
    """
    return _parse(FineTuneJobSpec, raw, strict=strict)


def parse_queue(document: Mapping[str, Any], *, strict: bool = True) -> FineTuneQueueSpec:
    """Parse the spec of a whole FineTuneQueue document, as `parse_spec` does. Raises InvalidDocument."""
    return _parse(FineTuneQueueSpec, document.get("spec"), strict=strict)


def parse_model(document: Mapping[str, Any], *, strict: bool = True) -> FineTunedModelSpec:
    """Parse the spec of a whole FineTunedModel document, as `parse_spec` does. Raises InvalidDocument."""
    return _parse(FineTunedModelSpec, document.get("spec"), strict=strict)


def parse_endpoint(document: Mapping[str, Any], *, strict: bool = True) -> FineTuneEndpointSpec:
    """Parse the spec of a whole FineTuneEndpoint document, as `parse_spec` does. Raises InvalidDocument."""
    return _parse(FineTuneEndpointSpec, document.get("spec"), strict=strict)


def _parse(model: type[Spec], raw: Any, *, strict: bool) -> Spec:
    try:
        return model.model_validate(raw, extra="forbid" if strict else "ignore", by_alias=True, by_name=False)
    except ValidationError as failure:
        raise InvalidDocument([_explain(model, error) for error in failure.errors(include_url=False)]) from None


def parse_job(document: Any) -> tuple[dict[str, Any], FineTuneJobSpec]:
    """Parse a whole FineTuneJob document strictly: (metadata, spec). Raises InvalidDocument."""
    return _metadata(document, [KIND]), parse_spec(document.get("spec"))


def parse_document(document: Any) -> tuple[str, dict[str, Any], APIModel]:
    """Parse a whole document of any of our kinds strictly: (kind, metadata, spec). Raises InvalidDocument."""
    metadata = _metadata(document, list(_SPECS))
    kind = str(document["kind"])
    return kind, metadata, _parse(_SPECS[kind], document.get("spec"), strict=True)


def _metadata(document: Any, kinds: list[str]) -> dict[str, Any]:
    """The metadata of a document of one of these kinds, which has nothing unknown beside it."""
    if not isinstance(document, Mapping):
        raise InvalidDocument([FieldError("", f"expected a {kinds[0]} document, got {type(document).__name__}")])
    errors = []
    if document.get("apiVersion") != API_VERSION:
        errors.append(FieldError("apiVersion", f"{document.get('apiVersion')!r} is not supported; write {API_VERSION}"))
    if (kind := document.get("kind")) not in kinds:
        near = difflib.get_close_matches(str(kind), kinds, n=1, cutoff=0) or kinds
        errors.append(FieldError("kind", f"{kind!r} is not supported; write {near[0]}"))
    for unknown in set(document) - {"apiVersion", "kind", "metadata", "spec", "status"}:
        errors.append(FieldError(str(unknown), "unknown field" + _did_you_mean(str(unknown), ["metadata", "spec"])))
    metadata = document.get("metadata")
    name = metadata.get("name") or metadata.get("generateName") if isinstance(metadata, Mapping) else None
    if not isinstance(name, str) or not name:
        errors.append(FieldError("metadata.name", "is required"))
    elif not re.fullmatch(DNS_SUBDOMAIN.pattern, name.rstrip("-")) or len(name) > 253:
        errors.append(
            FieldError("metadata.name", f"{_shown(name)} is not a valid name; use at most 253 lower-case letters, digits, '-' and '.'")
        )
    if errors:
        raise InvalidDocument(errors)
    return dict(metadata or {})


def _explain(model: type[BaseModel], error: Any) -> FieldError:
    location = error["loc"]
    path = "spec" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    value, kind, context = error.get("input"), error["type"], error.get("ctx", {})
    if kind == "rule":
        return FieldError(path, context["message"])
    if kind == "missing":
        return FieldError(path, "is required")
    if kind == "extra_forbidden":
        return FieldError(path, "unknown field" + _did_you_mean(str(location[-1]), _siblings(model, location)))
    if kind == "literal_error":
        expected = str(context.get("expected", ""))
        choices = re.findall(r"'([^']*)'", expected)
        return FieldError(path, f"{_shown(value)} is not one of {', '.join(choices)}{_did_you_mean(str(value), choices)}")
    return FieldError(path, f"{_shown(value)}: {error['msg'][:1].lower()}{error['msg'][1:]}")


def _shown(value: Any) -> str:
    return shortened(repr(value), SHOWN)


def _did_you_mean(word: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if not close:  # case and separators are the commonest slips: learning_rate, LearningRate
        folded = {re.sub(r"[-_]", "", c).lower(): c for c in choices}
        close = [folded[key] for key in [re.sub(r"[-_]", "", word).lower()] if key in folded]
    return f"; did you mean {close[0]!r}?" if close else (f"; known here: {', '.join(sorted(choices))}" if len(choices) < 16 else "")


def _siblings(root: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    model: Any = root
    for part in location[:-1]:
        if isinstance(part, int) or model is None:
            continue
        field = next((f for n, f in model.model_fields.items() if (f.alias or n) == part), None)
        model = _model_in(field.annotation) if field else None
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
