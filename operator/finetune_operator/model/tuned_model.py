"""PURE: which FineTunedModels a job refers to. Knows nothing of what becomes of them."""

from __future__ import annotations

from typing import Any

from .objects import Object, as_object

_SCHEME = "model://"


def models_published_to(job: Object) -> list[str]:
    """Names of the FineTunedModels that a job's result becomes a version of."""
    publish = as_object(job.get("spec")).get("publish")
    found = [_text(as_object(target).get("model")) for target in publish] if isinstance(publish, list) else []
    return list(dict.fromkeys(filter(None, found)))


def models_named(job: Object) -> list[str]:
    """Names of the FineTunedModels that a job publishes to, or goes on from."""
    uri = _text(as_object(as_object(job.get("spec")).get("tuning")).get("continueFrom"))
    source = [uri.removeprefix(_SCHEME).partition("@")[0]] if uri.startswith(_SCHEME) else []
    return list(dict.fromkeys((*models_published_to(job), *source)))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
