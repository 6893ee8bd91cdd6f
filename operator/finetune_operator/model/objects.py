"""Objects as the API server sends them, and how those of ours are told apart."""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]
Key = tuple[str, str]
"""(namespace, name); no namespace for what has none"""


CHILD_KINDS = ("Pod", "Job", "ConfigMap", "Service", "PersistentVolumeClaim", "NetworkPolicy")
"""What a job owns."""


def child_kinds(*, network_policies: bool) -> tuple[str, ...]:
    """Kinds that the operator makes and watches. Where it makes no NetworkPolicies it may not look at them."""
    return tuple(kind for kind in CHILD_KINDS if network_policies or kind != "NetworkPolicy")
