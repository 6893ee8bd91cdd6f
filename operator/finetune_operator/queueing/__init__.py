"""PURE: quota, fair share, gang fit, preemption: (queues, jobs, nodes, now) -> who is admitted, who waits for what, who gives way."""

from .admission import decide
from .blind import missing_rights

__all__ = ["decide", "missing_rights"]
