"""PURE: (job, children, progress, now) -> Plan. A job's state machine lives here alone."""

from .engine import reconcile, refused, unreadable

__all__ = ["reconcile", "refused", "unreadable"]
