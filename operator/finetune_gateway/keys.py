"""API keys, as their Secret holds them. Pure. The keys themselves are nowhere."""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Iterable
from datetime import datetime

import msgspec

from finetune_api.api_keys import ApiKey

log = logging.getLogger("finetune.gateway")
Known = dict[str, tuple[str, ApiKey]]
"""By hash: id and key."""


class _Secret(msgspec.Struct):
    type: str = ""
    data: dict[str, str] | None = None


_DECODE = msgspec.json.Decoder(_Secret).decode


def read_keys(raw: bytes) -> Known:
    """The Secret's JSON to its keys. Raises ValueError; an entry that cannot be read is left out, and told by its id."""
    found: Known = {}
    for identifier, value in (_DECODE(raw).data or {}).items():
        try:
            key = ApiKey.model_validate_json(base64.b64decode(value))
            if key.expires_at is not None:
                _time(key.expires_at)
        except (ValueError, binascii.Error) as failure:
            log.warning("the API key %s cannot be read, and is refused: %s", identifier, type(failure).__name__)
            continue
        found[key.hash] = (identifier, key)
    return found


def _time(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("a time without a zone")
    return moment


def expired(key: ApiKey, now: datetime) -> bool:
    """Whether it is not to be taken any more."""
    return key.expires_at is not None and _time(key.expires_at) <= now


class Keys:
    """The keys that are known. A reflector's sink; there is one Secret."""

    def __init__(self) -> None:
        self.known: Known = {}

    def replace(self, values: Iterable[Known]) -> None:
        """These, and no others."""
        self.known = {digest: entry for value in values for digest, entry in value.items()}

    def put(self, value: Known) -> None:
        """The Secret is there, or is different now."""
        self.known = value

    def drop(self, value: Known) -> None:
        """The Secret is gone."""
        self.known = {}

    def refuse(self, status: int, why: str) -> None:
        """It may not be looked at."""
        self.known = {}
