"""PURE: quota, fair share, gang fit, preemption: (queues, jobs, nodes, now) -> who is admitted, who waits for what, who gives way."""

from .admission import decide
from .model import Admission, Decisions, Snapshot, Verdict

__all__ = ["Admission", "Decisions", "Snapshot", "Verdict", "decide"]
