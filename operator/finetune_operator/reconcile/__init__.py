"""PURE: (job, children, progress, now) -> Plan(actions, status). The state machine lives here alone."""

from .engine import reconcile, refused
from .model import Observed, Plan

__all__ = ["Observed", "Plan", "reconcile", "refused"]
