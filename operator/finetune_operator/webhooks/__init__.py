"""Admission webhooks: what cannot be run is refused at apply, what is unwise is warned of, who applied it is noted."""

from .bundle import Bundle
from .server import AdmissionServer

__all__ = ["AdmissionServer", "Bundle"]
