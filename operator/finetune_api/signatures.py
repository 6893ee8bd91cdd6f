"""One table of what failures look like in exceptions and logs; the trainer and the operator read it alike."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .contract import PEER_LOST, ExitCode

GPU_ERROR = "GPUError"
"""Reason of a failure that a GPU's hardware or driver caused: its node is to blame."""


@dataclass(frozen=True)
class Signature:
    """A kind of failure by its words."""

    pattern: re.Pattern[str]
    code: ExitCode
    reason: str
    meaning: str
    """For people, before the words themselves."""


def _words(pattern: str, code: ExitCode, reason: str, meaning: str) -> Signature:
    return Signature(re.compile(pattern, re.IGNORECASE), code, reason, meaning)


#: first match wins
SIGNATURES = (
    _words(
        r"OutOfMemoryError|out of memory|DefaultCPUAllocator: can't allocate|CUBLAS_STATUS_ALLOC_FAILED",
        ExitCode.OUT_OF_MEMORY,
        "OutOfMemory",
        "the memory was not enough",
    ),
    # https://docs.nvidia.com/deploy/xid-errors/
    _words(
        r"\bXid\b.*\d|uncorrectable (ECC|NVLink)|fallen off the bus|GPU is lost|NVML_ERROR|no CUDA-capable device|CUDA driver initialization failed"
        r"|CUDA error: (unknown error|an illegal instruction|hardware stack error|misaligned address|initialization error|uncorrectable)",
        ExitCode.INFRASTRUCTURE,
        GPU_ERROR,
        "a GPU or its driver failed",
    ),
    # torch says of a full disk only that its writer is not where it expected
    _words(
        r"No space left on device|Disk quota exceeded|PytorchStreamWriter failed|inline_container.*(unexpected pos|write failed)",
        ExitCode.INFRASTRUCTURE,
        "NoSpaceLeft",
        "the workspace is full",
    ),
    _words(
        r"Stale file handle|Input/output error|Transport endpoint is not connected",
        ExitCode.INFRASTRUCTURE,
        "StorageError",
        "a volume failed",
    ),
    _words(
        r"connection (reset|closed|refused)|broken pipe|ncclRemoteError|ncclSystemError|ncclInternalError|NCCL.*(timeout|timed out|watchdog)"
        r"|gloo.*(timeout|timed out)|remote worker",
        ExitCode.INFRASTRUCTURE,
        PEER_LOST,
        "another worker went away",
    ),
)


def recognise(text: str) -> Signature | None:
    """The first signature that a text shows."""
    return next((signature for signature in SIGNATURES if signature.pattern.search(text)), None)
