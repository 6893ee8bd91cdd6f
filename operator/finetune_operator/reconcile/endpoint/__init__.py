"""What a FineTuneEndpoint needs, which versions answer, and what is said of it. Pure."""

from .engine import reconcile, refused
from .orders import order

__all__ = ["order", "reconcile", "refused"]
