"""How a stage ends: exceptions that carry an exit code, a reason and a message for people."""

from __future__ import annotations

import traceback
from typing import Any

from finetune_api.contract import WAITING_FOR_SOURCE, ExitCode, StageResult, Unavailable
from finetune_api.signatures import recognise

from .redaction import redact


class StageError(Exception):
    """A stage cannot go on."""

    code = ExitCode.INFRASTRUCTURE

    def __init__(self, reason: str, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason, self.message, self.details = reason, message, details or {}

    def __reduce__(self) -> tuple[Any, ...]:
        """As it is, whatever its constructor takes: errors travel between processes, and one that did not arrive would never be known."""
        return _same, (type(self), self.args, dict(self.__dict__))

    def result(self) -> StageResult:
        """The last words of the pod."""
        return StageResult(reason=self.reason[:128], message=redact(self.message)[:3000], result=self.details)


def _same(kind: type[StageError], args: tuple[Any, ...], state: dict[str, Any]) -> StageError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class UserError(StageError):
    """Bad data or settings: the same input fails again, so it is never retried."""

    code = ExitCode.USER_ERROR


class OutOfMemory(StageError):
    """The device's memory was not enough."""

    code = ExitCode.OUT_OF_MEMORY


class InfrastructureError(StageError):
    """Something around the job broke: worth another try."""


class SourceUnavailable(InfrastructureError):
    """A hub or server does not answer, or asks for patience: the stage ends, and is tried again later."""

    code = ExitCode.SOURCE_UNAVAILABLE

    def __init__(self, host: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(WAITING_FOR_SOURCE, message, Unavailable(host=host[:253], retry_after_seconds=retry_after).to_wire())
        self.host, self.retry_after = host, retry_after


class Hang(StageError):
    """No step ended for too long."""

    code = ExitCode.HANG


class Stopped(StageError):
    """Stopped on request."""

    code = ExitCode.STOPPED


_LIBRARIES = (
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "huggingface_hub",
    "liger_kernel",
    "lm_eval",
    "gguf",
)
BY_CODE: dict[ExitCode, type[StageError]] = {kind.code: kind for kind in (UserError, OutOfMemory, InfrastructureError, Hang, Stopped)}


def classify(failure: BaseException) -> StageError:
    """Give an exception of a library its class."""
    if isinstance(failure, StageError):
        return failure
    text = f"{type(failure).__name__}: {failure}"
    if (known := recognise(text)) is not None:
        return BY_CODE[known.code](known.reason, f"{known.meaning}: {text}")
    name = type(failure).__name__
    if name in ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError", "DatasetNotFoundError"):
        return UserError("SourceNotFound", f"{failure}; check the uri, and secretRef if it is gated or private")
    if (library := _refused_by(failure)) is not None:
        return UserError("SettingsRefused", f"{library} refuses these settings, or this model: {failure}")
    return InfrastructureError("UnexpectedError", text)


def _refused_by(failure: BaseException) -> str | None:
    """The library that raised a ValueError of its own: it says what is wrong with what it was asked for, and would again."""
    if not isinstance(failure, ValueError | NotImplementedError | ImportError) or isinstance(failure, OSError | UnicodeError):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(failure.__traceback__)]
    library = str(frames[-1].f_globals.get("__name__", "")).partition(".")[0] if frames else ""
    return library if library in _LIBRARIES else None


def combine(failed: list[tuple[str, StageError]], rest: str) -> StageError:
    """One error for all targets: what will never go is said at once, what may go by itself is waited for."""
    message = "; ".join(f"{uri}: {error.message}" for uri, error in failed) + rest
    errors = [error for _, error in failed]
    first = min(errors, key=lambda error: (not isinstance(error, UserError), isinstance(error, SourceUnavailable)))
    if isinstance(first, SourceUnavailable):
        return SourceUnavailable(first.host, message, max(e.retry_after or 0 for e in errors if isinstance(e, SourceUnavailable)) or None)
    return type(first)(first.reason, message)
