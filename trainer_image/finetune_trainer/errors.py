"""How a stage ends: exceptions that carry an exit code, a reason and a message for people."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from finetune_api.contract import PEER_LOST, ExitCode, StageResult

_SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{16,}|AKIA[A-Z0-9]{16}|eyJ[A-Za-z0-9_-]{20,}\.[A-Za-z0-9_.-]+)")


class StageError(Exception):
    """A stage cannot go on."""

    code = ExitCode.INFRASTRUCTURE

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason, self.message = reason, message

    def result(self) -> StageResult:
        """The last words of the pod."""
        return StageResult(reason=self.reason[:128], message=redact(self.message)[:3000])


class UserError(StageError):
    """Bad data or settings: the same input fails again, so it is never retried."""

    code = ExitCode.USER_ERROR


class OutOfMemory(StageError):
    """The device's memory was not enough."""

    code = ExitCode.OUT_OF_MEMORY


class InfrastructureError(StageError):
    """Something around the job broke: worth another try."""


class Stopped(StageError):
    """Stopped on request."""

    code = ExitCode.STOPPED


_PEER = re.compile(
    r"connection (reset|closed|refused)|broken pipe|ncclRemoteError|ncclSystemError|gloo.*(timeout|timed out)|remote worker", re.I
)

BY_CODE = {kind.code: kind for kind in (UserError, OutOfMemory, InfrastructureError, Stopped)}


def redact(text: str, secrets: Sequence[str] = ()) -> str:
    """Take tokens out of a text that leaves the pod."""
    for secret in (*secrets, os.environ.get("HF_TOKEN", "")):
        if len(secret) >= 6:
            text = text.replace(secret, "***")
    return _SECRET.sub("***", text)


def classify(failure: BaseException) -> StageError:
    """Give an exception of a library its class."""
    if isinstance(failure, StageError):
        return failure
    text = f"{type(failure).__name__}: {failure}"
    if "OutOfMemoryError" in type(failure).__name__ or re.search(r"out of memory|DefaultCPUAllocator: can't allocate", text, re.I):
        return OutOfMemory("OutOfMemory", text)
    if isinstance(failure, OSError) and failure.errno == 28:
        return InfrastructureError("NoSpaceLeft", f"the workspace is full: {failure}")
    if _PEER.search(text):
        return InfrastructureError(PEER_LOST, f"another worker went away: {text}")
    name = type(failure).__name__
    if name in ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError", "DatasetNotFoundError"):
        return UserError("SourceNotFound", f"{failure}; check the uri, and secretRef if it is gated or private")
    return InfrastructureError("UnexpectedError", text)
