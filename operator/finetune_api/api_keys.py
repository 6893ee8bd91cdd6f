"""API keys of the gateway: what is kept of one. Pure.

Of a key only its SHA-256 is kept. It is 32 random bytes, so nobody finds it from the hash, and no salt or slow hash is needed.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

from pydantic import Field

from .base import APIModel, Format
from .scalars import DNSLabel, Timestamp, Told

KEY_PREFIX = "ftk_"
KEYS_SECRET, KEYS_SECRET_TYPE = "finetune-gateway-keys", "finetune.dev/api-keys"
"""In the gateway's namespace. One Secret, so that the gateway needs no right on any other; an entry for each key, by its id."""
KEY_ID = Format(
    pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$",
    name="a key's id",
    write="at most 63 lower-case letters, digits and '-', for example ci-1",
)


def digest_of_key(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKey(APIModel):
    """An entry of the Secret, as JSON."""

    hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the key, in hexadecimal."""
    namespace: DNSLabel
    """Its FineTuneEndpoints may be used with the key, and no others."""
    requests_per_minute: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Unset: any number."""
    tokens_per_minute: Annotated[int, Field(ge=1, le=2**40)] | None = None
    """Of prompts and answers together. Unset: any number."""
    fine_tuning: bool = False
    """Whether the fine-tuning API takes it, beside the models: with the rights of a service account of the namespace."""
    description: Annotated[str, Told(256)] = ""
    """Who uses it, and for what."""
    created_at: Timestamp | None = None
    """When it was made."""
    created_by: Annotated[str, Told(256)] = ""
    """Who made it, as the API server knows them."""
    expires_at: Timestamp | None = None
    """It is refused from then on. Unset: never."""
