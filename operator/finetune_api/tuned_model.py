"""FineTunedModel: a line of versions, of which one is the champion."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import APIModel, Rule
from .evaluation_status import EvaluationStatus
from .scalars import Count, Duration, Name, Timestamp, Told, Word
from .spec.common import SecretReference
from .status import Condition, Status
from .uris import EndpointURL, StorageURI
from .versions import BaseModelReference, Form, VersionNumber, VersionState

MODEL_KIND, MODEL_PLURAL = "FineTunedModel", "finetunedmodels"
MOST_VERSIONS = 100
MOST_REMOVED = 1000


class Retention(APIModel):
    """Which versions are kept. The champion, what spec.champion names, and what an endpoint serves are never removed."""

    versions: Annotated[int, Field(ge=1, le=MOST_VERSIONS)] = 10
    """The newest so many are kept."""
    age: Duration | None = None
    """Also remove what is older, for example 90d. Unset: of any age."""


class FineTunedModelSpec(APIModel):
    """Where versions are kept, and which of them is the champion."""

    storage: StorageURI
    """Where versions, their records and probes are kept: `pvc://CLAIM/PATH` or `s3://BUCKET/PREFIX`. A new object finds the versions that are there."""
    secret_ref: SecretReference | None = None
    """Secret with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Only for s3://."""
    s3_endpoint: EndpointURL | None = None
    """Address of an S3-compatible server; unset means the administrator's, or AWS. Only for s3://."""
    promotion: Literal["OnImprovement", "Manual", "Always"] = "OnImprovement"
    """When a new version becomes the champion: when it is measurably better than the present one on held-out rows that neither learned from, when spec.champion names it, or at once."""
    champion: VersionNumber | None = None
    """Pins the champion: also how to roll back. Unset: by `promotion`."""
    retention: Retention = Field(default_factory=Retention)
    """Which versions are kept."""

    RULES = (
        Rule(
            cel="has(self.secretRef) == self.storage.startsWith('s3://')",
            message="storage: an s3:// uri needs secretRef with its keys, and a pvc:// uri takes none",
            holds=lambda m: (m.secret_ref is not None) == m.storage.startswith("s3://"),
        ),
        Rule(
            cel="!has(self.s3Endpoint) || self.storage.startsWith('s3://')",
            message="s3Endpoint is only used with an s3:// storage; remove it or change storage",
            holds=lambda m: m.s3_endpoint is None or m.storage.startswith("s3://"),
        ),
    )


class ModelVersion(APIModel):
    """One version."""

    number: VersionNumber
    """From 1; never given twice."""
    state: VersionState = "Candidate"
    """Candidate: not decided about, or for somebody to decide. Champion. Retired: was champion. Rejected: not better than the champion of then."""
    job: Name
    """FineTuneJob that made it."""
    job_uid: Word = ""
    """Its UID."""
    digest: Word = ""
    """sha256 over its files' names and contents."""
    bytes: Count = 0
    """Size of its files."""
    form: Form = "Adapter"
    """Adapter, or a whole Model."""
    rank: Count | None = None
    """Largest rank of a LoRA adapter."""
    merged: bool = False
    """Whether the merged model lies beside the adapter (`output.merged` of its job)."""
    base: BaseModelReference | None = None
    """What it was tuned from."""
    data_digest: Word = ""
    """sha256 of the prepared rows."""
    parent: VersionNumber | None = None
    """Version that it goes on from (`tuning.continueFrom`)."""
    settings: Annotated[dict[Word, Annotated[str, Told(256)]], Field(max_length=128)] = Field(default_factory=dict)
    """`spec.tuning` of its job, by path, for example lora.rank."""
    evaluation: EvaluationStatus | None = None
    """All arms' scores, with the interval of the improvement, and how it compares with the champion of then."""
    message: Annotated[str, Told(1024)] = ""
    """Why it is what it is."""
    created_at: Timestamp | None = None
    """When it was published."""
    promoted_at: Timestamp | None = None
    """When it last became the champion."""


class StorageStatus(APIModel):
    """What was last read from, and written to, `spec.storage`."""

    uri: Annotated[str, Told(1024)] = ""
    """`spec.storage` that all this was read from."""
    written: Word = ""
    """Digest of the states and removals that are on record there."""
    retries: Count = 0
    """Tries that failed since it last succeeded."""
    retry_after: Timestamp | None = None
    """When the next try starts."""
    highest: Count = 0
    """Highest number that was ever given."""
    removing: Annotated[list[VersionNumber], Field(max_length=MOST_REMOVED)] = []
    """Versions that are not kept any more, whose files may still be there."""
    removed: Annotated[list[VersionNumber], Field(max_length=MOST_REMOVED)] = []
    """Versions whose files are gone while their jobs are still there."""


class FineTunedModelStatus(Status):
    """The versions, and who serves them."""

    observed_generation: Count = 0
    """metadata.generation that this status was derived from."""
    conditions: Annotated[
        list[Condition],
        Field(max_length=8, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
    ] = Field(default_factory=list)
    """Ready: there is a champion. StorageReady: the storage can be read and written."""
    champion: VersionNumber | None = None
    """The version that is served under the model's own name."""
    latest: VersionNumber | None = None
    """The newest version."""
    count: Count = 0
    """Versions that are kept."""
    score: Word = ""
    """The champion's first metric, and its base's best, for people."""
    served: Annotated[list[Name], Field(max_length=64)] = []
    """FineTuneEndpoints that serve it."""
    versions: Annotated[
        list[ModelVersion],
        Field(max_length=MOST_VERSIONS, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["number"]}),
    ] = Field(default_factory=list)
    """The newest first."""
    storage: StorageStatus = Field(default_factory=StorageStatus)
    """What is known of the storage."""

    def version(self, number: int | None) -> ModelVersion | None:
        """The version of that number, where it is kept."""
        return next((version for version in self.versions if version.number == number), None)
