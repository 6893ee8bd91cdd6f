"""What is secret stays in the pod: the values of mounted Secrets, and what looks like a token, are taken out of all that is said."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{16,}|AKIA[A-Z0-9]{16}|eyJ[A-Za-z0-9_-]{20,}\.[A-Za-z0-9_.-]+)")
_SHORTEST = 6
"""A shorter value would take pieces out of ordinary words."""
_known: set[str] = set()


def add_secrets(folders: Iterable[str]) -> None:
    """Values of these mounted Secrets are never said."""
    for folder in folders:
        for path in Path(folder).glob("*") if os.path.isdir(folder) else ():
            if path.is_file():
                add_secret(path.read_text(errors="replace").strip())


def add_secret(value: str) -> None:
    """This value is never said: what was read out of a Secret that holds more than one."""
    if len(value) >= _SHORTEST:
        _known.add(value)


def redact(text: str) -> str:
    """A text that may leave the pod."""
    for secret in (*_known, os.environ.get("HF_TOKEN", "")):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, "***")
    return _TOKEN.sub("***", text)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _Stream:
    """stdout or stderr of libraries that print what went wrong, headers and addresses included."""

    def __init__(self, inner: TextIO) -> None:
        self._inner = inner

    def write(self, text: str) -> int:
        return self._inner.write(redact(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def configure_logging() -> None:
    """Log to stderr, without secrets; what is printed goes the same way."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), _Stream):
            setattr(sys, name, _Stream(getattr(sys, name)))
