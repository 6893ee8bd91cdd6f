"""PURE: why pods do not start, in the kubelet's or scheduler's own words. Knows nothing of what they are for."""

from __future__ import annotations

from collections.abc import Iterable

from ..model.job import PodView

_HARMLESS = frozenset({"", "ContainerCreating", "PodInitializing"})


def why_not_running(pods: Iterable[PodView]) -> tuple[str, str] | None:
    """(reason, message) of the first pod that is kept from starting, in the kubelet's or scheduler's own words."""
    for pod in sorted(pods, key=lambda p: p.rank):
        if pod.waiting_reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"):
            return "ImagePullFailed", f"pod {pod.name}: {pod.waiting_reason}: {pod.waiting_message}"
        if pod.waiting_reason not in _HARMLESS:
            return "ContainerNotStarted", f"pod {pod.name}: {pod.waiting_reason}: {pod.waiting_message}"
        if pod.unschedulable:
            return "Unschedulable", f"pod {pod.name}: {pod.unschedulable}"
    return None
