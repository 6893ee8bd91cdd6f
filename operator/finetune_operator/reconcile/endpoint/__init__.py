"""What a FineTuneEndpoint needs, which versions answer, and what is said of it. Pure."""

from .engine import reconcile, refused
from .orders import order
from .room import expected

__all__ = ["expected", "order", "reconcile", "refused"]
