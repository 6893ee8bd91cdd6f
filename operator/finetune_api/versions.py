"""What is kept of each version of a FineTunedModel at its `spec.storage`, and under which names. Pure.

The trainer writes it when it publishes, the stage `catalog` lists it, and the object can be made again from it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .base import APIModel
from .evaluation_status import EvaluationStatus
from .scalars import Count, Name, Timestamp, Told, Word

VersionState = Literal["Candidate", "Champion", "Retired", "Rejected"]
MOST_NUMBER = 1_000_000
VersionNumber = Annotated[int, Field(ge=1, le=MOST_NUMBER)]
Form = Literal["Adapter", "Model"]
"""An adapter needs its base beside it; a model (methods full and partial) does not."""
MERGED = "merged"
"""Folder below an adapter's with the whole model that it makes (`output.merged`)."""


class VersionPaths:
    """Names below `spec.storage`. A number is claimed by creating the folder's record (`finetune.json`), and never given again."""

    RECORDS, VERSIONS = "records", "versions"

    @staticmethod
    def artifact(number: int) -> str:
        """Folder of the files that are served: as published anywhere else."""
        return f"versions/{number}"

    @staticmethod
    def record(number: int) -> str:
        """JSON of a VersionRecord; written last: a version that has one is whole."""
        return f"records/{number}.json"

    @staticmethod
    def probes(number: int) -> str:
        """JSON of Probes. Rows of the user's: nowhere else."""
        return f"probes/{number}.json"

    @staticmethod
    def prompts(number: int) -> str:
        """Digests of the prompts that it was trained on: the first 8 bytes of each one's SHA-256, sorted, one after the other."""
        return f"prompts/{number}.bin"


class BaseModelReference(APIModel):
    """The base of a version."""

    uri: Annotated[str, Told(1024)]
    """Where the job read it from."""
    revision: Word = ""
    """The commit that an hf:// uri stood for."""
    fingerprint: Word = ""
    """Digest of its weights and configuration."""


class VersionJob(APIModel):
    """The FineTuneJob that made a version."""

    name: Name
    """Its name."""
    uid: Word
    """Its UID."""
    namespace: Name = ""
    """Where it was."""
    spec: Word = ""
    """`result_digest` of its spec: one of the same name that agrees in it is this job, restored."""


class VersionRecord(APIModel):
    """records/NUMBER.json."""

    number: VersionNumber
    """From 1; never given twice."""
    job: VersionJob
    """Who made it."""
    uri: Annotated[str, Told(1024)]
    """Folder of its files."""
    digest: Word
    """sha256 over the files' names and contents, as in `status.artifacts` of the job."""
    bytes: Count
    """Size of its files."""
    form: Form = "Adapter"
    """Whether its base is needed beside it."""
    rank: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Largest rank of a LoRA adapter."""
    merged: bool = False
    """Whether the merged model lies beside the adapter."""
    base: BaseModelReference
    """What it was tuned from."""
    data_digest: Word = ""
    """sha256 of the prepared rows."""
    parent: VersionNumber | None = None
    """Version of the same line that `tuning.continueFrom` named."""
    tuning: dict[str, Any] = Field(default_factory=dict)
    """`spec.tuning` of the job."""
    evaluation: EvaluationStatus | None = None
    """All arms' scores, with the interval of the improvement, and what the champion of then scored."""
    created_at: Timestamp
    """When it was published."""
    state: VersionState = "Candidate"
    """As it was last decided; written by the stage `catalog`."""
    removed_at: Timestamp | None = None
    """When its files were removed. The record stays: later versions may descend from it."""
