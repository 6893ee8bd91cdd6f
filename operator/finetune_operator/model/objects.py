"""Objects as the API server sends them, and how those of ours are told apart. Knows nothing of what is in them."""

from __future__ import annotations

from typing import Any

from finetune_api import KIND
from finetune_api.endpoint import ENDPOINT_KIND
from finetune_api.tuned_model import MODEL_KIND

Object = dict[str, Any]
Key = tuple[str, str]
"""(namespace, name); no namespace for what has none"""
Ref = tuple[str, Key]
"""(kind, key) of an object of a reconciled kind"""


def as_object(value: Any) -> Object:
    """The value where it is an object; else an empty one: what a user or another release wrote may be anything."""
    return value if isinstance(value, dict) else {}


def version_of(raw: Object) -> int:
    """Its resourceVersion, by which states of one object are told older from newer; 0 where it has none that can be compared."""
    text = str(raw["metadata"].get("resourceVersion", ""))
    return int(text) if text.isdigit() else 0


def key_of(raw: Object) -> Key:
    """The key of an object that has a namespace."""
    meta = raw["metadata"]
    return meta["namespace"], meta["name"]


RECONCILED = (KIND, MODEL_KIND, ENDPOINT_KIND)
"""Kinds of ours with a namespace. Nothing can be done without the first; of the others the definitions may be absent."""
CHILD_KINDS = ("Pod", "Job", "ConfigMap", "Service", "PersistentVolumeClaim", "NetworkPolicy")
"""What objects of these kinds own."""


def child_kinds(*, network_policies: bool) -> tuple[str, ...]:
    """Kinds that the operator makes and watches. Where it makes no NetworkPolicies it may not look at them."""
    return tuple(kind for kind in CHILD_KINDS if network_policies or kind != "NetworkPolicy")
