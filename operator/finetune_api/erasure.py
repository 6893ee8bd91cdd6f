"""What `finetune erase` and the trainer tell each other: whose rows go, where they may lie, and what was removed. Pure.

The request is one line on the standard input of `python -m finetune_trainer erase`, and the answer one line on its standard output:
texts of the person's stand in no object of the cluster, no command line and no log.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from .base import APIModel
from .contract import ModelStorage
from .scalars import Count
from .versions import VersionNumber

ERASE = "erase"
"""Name of the trainer's command."""
ERASURES = "erasures.json"
"""Beside what was erased from, in a job's folder and at a FineTunedModel's storage: when, and how many rows; nothing of them."""
ERASED = "(erased)"
"""What stands in a report in place of a text that was erased."""


class Reading(APIModel):
    """How a job reads its rows: `dataset.format` and `dataset.columns`."""

    format: str = "auto"
    columns: dict[str, str] = {}


class RowsFile(APIModel):
    """Rows that are to go, as they stand in a data set."""

    name: str
    """Its file name, which says its type."""
    content: str
    """Base64."""


class TrainedOn(APIModel):
    """Prompts of erased rows that a job trained on, by the first 8 bytes of their SHA-256 in hexadecimal digits."""

    job: str
    """Beginning of the job's UID."""
    erased: list[str] = []
    still_used: list[str] = []
    """Those of them that rows which were not erased begin with, too."""


class ErasureRequest(APIModel):
    """One line of JSON. Names a workspace, or the storage of a FineTunedModel. What is not wholly understood is refused."""

    model_config = ConfigDict(extra="forbid")

    dry_run: bool = False
    containing: list[str] = []
    """Texts: whatever holds one of them goes, with any case and white space."""
    rows: RowsFile | None = None
    where: dict[str, str] = {}
    """Of `rows` those alone that have these values, by column; a dot leads into an object."""
    readings: list[Reading] = []
    workspace: str | None = None
    """Folder of the workspace."""
    folders: list[str] | None = None
    """Folders of jobs in it; None for all that are there."""
    storage: ModelStorage | None = None
    mounts: dict[str, str] = {}
    """Folder of the storage's claim, by `pvc://name`."""
    keys: str | None = None
    """Folder of the keys of an s3:// storage."""
    trained: list[TrainedOn] = []
    """What was found in workspaces before."""


class Erased(APIModel):
    """One file that held something of the person's."""

    file: str
    """Below the workspace or the storage."""
    what: Literal["rows", "mentions", "probes", "prompt digests", "leftovers"]
    count: Count
    kept: bool = False
    """Whether it is only told: what was published, or is sealed, stays as it is."""


class Learned(APIModel):
    """A job, or a version of a model, whose weights learned from rows that were erased."""

    job: str = ""
    """namespace/name and folder."""
    version: Annotated[int, Field(ge=1)] | None = None
    rows: Count = 0
    """Training rows, or prompts, that are erased now."""
    earlier: Count = 0
    """By earlier erasures."""
    through: VersionNumber | None = None
    """The version that it goes on from and that learned from them, where it did not itself."""
    published: list[str] = []
    """Where the result went, as far as the folder says."""


class ErasureReport(APIModel):
    """The answer's `result`."""

    dry_run: bool = False
    matching: Count = 0
    """Rows of the file that were looked for."""
    looked: list[str] = []
    """Folders of jobs, or versions."""
    files: list[Erased] = []
    learned: list[Learned] = []
    notes: list[str] = []
    """What could not be looked into."""
    trained: list[TrainedOn] = []


class Erasure(APIModel):
    """An entry of ERASURES, written before anything is removed."""

    at: str
    job: str = ""
    """namespace/name, as far as it is known."""
    train_rows: Count = 0
    eval_rows: Count = 0
    prompts: dict[str, int] = Field(default_factory=dict)
    """Prompts by version, at a storage."""


def read_erasures(document: Any) -> list[Erasure]:
    """The entries of an ERASURES file. Raises ValueError."""
    return [Erasure.model_validate(entry) for entry in document]
