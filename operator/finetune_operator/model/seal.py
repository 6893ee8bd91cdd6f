"""Seals of what the operator wrote where tenants may write, too: it believes nothing there that does not bear one of its own.

Knows nothing of what is sealed.
"""

from __future__ import annotations

import hashlib
import hmac


def seal(key: str, uid: str, text: str) -> str:
    """HMAC-SHA256 (RFC 2104) over a job's UID and a text, in hexadecimal; empty without a key."""
    return hmac.new(key.encode(), f"{uid}\0{text}".encode(), hashlib.sha256).hexdigest() if key else ""


def is_sealed(key: str, uid: str, text: str, found: str) -> bool:
    """Whether the seal is the operator's, of this text for this job. Without a key none is."""
    return bool(key) and hmac.compare_digest(seal(key, uid, text).encode(), found.encode())
