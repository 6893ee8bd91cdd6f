"""Jobs in little memory: what many of them say alike is kept once. Knows nothing of what the words mean.

A job as Python objects is seven times its JSON, and most of a spec is its defaults, or its team's template.
"""

from __future__ import annotations

import hashlib
from sys import intern
from typing import Any

from finetune_api.spec import FineTuneJobSpec

from ..model.objects import Object

MOST = 8192
"""Blocks that are remembered; those that were asked for longest ago go, and are only shared no more"""
_SHORT = 64
"""Characters of a text that may be one of many; longer ones are hardly alike"""


class Shared:
    """Blocks of specs, by what they say. Whoever gets one reads it, and changes nothing in it."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._blocks: dict[tuple[str, bytes], Any] = {}

    def job(self, raw: Object) -> Object:
        """The same job, in objects that others use too."""
        spec = raw.get("spec")
        if isinstance(spec, dict):
            blocks = {
                intern(name): self._one("raw", block, block) if isinstance(block, dict) else slim(block) for name, block in spec.items()
            }
            raw = {**raw, "spec": blocks}
        return {key: value if key == "spec" else slim(value) for key, value in raw.items()}

    def parsed(self, raw: Object, spec: FineTuneJobSpec) -> FineTuneJobSpec:
        """The spec, just parsed from `raw`, with blocks that others have too."""
        for name, field in type(spec).model_fields.items():
            spec.__dict__[name] = self._one(name, raw.get(field.alias or name), spec.__dict__[name])  # what is unset stays unset
        return spec

    def _one(self, what: str, said: Any, value: Any) -> Any:
        key = what, hashlib.blake2b(repr(said).encode(), digest_size=16).digest()
        known = self._blocks.pop(key, None)
        if known is None:
            known = slim(value) if what == "raw" else value
            while len(self._blocks) >= self._most:
                del self._blocks[next(iter(self._blocks))]
        self._blocks[key] = known
        return known


def slim(value: Any) -> Any:
    """The same value, in which a short text that is written twice is one object."""
    if isinstance(value, str):
        return intern(value) if len(value) <= _SHORT else value
    if isinstance(value, dict):
        return {intern(name): slim(inner) for name, inner in value.items()}
    return [slim(inner) for inner in value] if isinstance(value, list) else value
