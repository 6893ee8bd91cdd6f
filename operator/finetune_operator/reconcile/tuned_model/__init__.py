"""PURE: (model, jobs, endpoints, catalog pods, now) -> Plan. Which versions there are, and which of them is the champion."""

from .engine import reconcile, refused, unreadable

__all__ = ["reconcile", "refused", "unreadable"]
