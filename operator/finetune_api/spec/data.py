"""The data: where it is, what it looks like, how strictly it is checked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ..base import APIModel, Rule, without_nulls
from ..scalars import PlainName
from ..uris import DatasetURI, EndpointURL
from .common import SecretReference

DatasetFormat = Literal[
    "auto", "messages", "prompt-completion", "text", "alpaca", "sharegpt", "preference", "unpaired-preference", "prompt-only"
]

Column = Literal[
    "messages", "conversations", "prompt", "completion", "text", "instruction", "input", "output", "history", "system", "tools",
    "chosen", "rejected", "label", "answer", "solution",
]  # fmt: skip
"""What the formats call their columns."""


class DatasetSource(APIModel):
    """Rows to train on, from one place."""

    uri: DatasetURI
    """`hf://ORG/DATASET[@REVISION]`, `pvc://CLAIM/PATH`, `s3://BUCKET/KEY`, `https://HOST/PATH`, `configmap://NAME/KEY`, `oci://HOST/REPOSITORY[:TAG]` or `mlflow://HOST/MODEL[@ALIAS]`; JSONL, JSON, CSV or Parquet, also gzipped."""
    split: PlainName = "train"
    """Split to load from an hf:// data set; other sources have none."""
    secret_ref: SecretReference | None = None
    """Secret for private data: a Hugging Face token (hf://), a bearer token (https://, mlflow://), the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (s3://), or .dockerconfigjson (oci://)."""
    s3_endpoint: EndpointURL | None = None
    """Address of an S3-compatible server; unset means AWS. Only for s3://."""
    plain_http: bool = Field(default=False, alias="plainHTTP")
    """Talk http:// to the registry or tracking server, where an administrator allows it. Only for oci:// and mlflow://."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """How often each row is seen per epoch: 2 is twice; 0.5 takes half of the rows, chosen by `hyperparameters.seed`."""

    RULES = (
        Rule(
            cel="!has(self.secretRef) || !(self.uri.startsWith('pvc://') || self.uri.startsWith('configmap://'))",
            message="dataset: secretRef is not used with pvc:// and configmap:// uris; remove it or change the uri",
            holds=lambda m: m.secret_ref is None or not m.uri.startswith(("pvc://", "configmap://")),
        ),
        Rule(
            cel="!has(self.s3Endpoint) || self.uri.startsWith('s3://')",
            message="dataset: s3Endpoint is only used with an s3:// uri; remove it or change the uri",
            holds=lambda m: m.s3_endpoint is None or m.uri.startswith("s3://"),
        ),
        Rule(
            cel="!self.plainHTTP || self.uri.startsWith('oci://') || self.uri.startsWith('mlflow://')",
            message="dataset: plainHTTP is only used with an oci:// or mlflow:// uri; remove it or change the uri",
            holds=lambda m: not m.plain_http or m.uri.startswith(("oci://", "mlflow://")),
        ),
    )


class EvalDataset(APIModel):
    """The rows that are held out: either a share of the training rows, or a source of their own."""

    split_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training rows held out, whole prompts at a time, chosen by `hyperparameters.seed`; for example 0.1."""
    uri: DatasetURI | None = None
    """A source of its own for the held-out rows, with the same schemes, secret and S3 endpoint as `train.uri`."""
    split: PlainName = "test"
    """Split to load from an hf:// data set; other sources have none."""
    group_by: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """Column of the rows, for example a customer or a document: rows that agree in it are held out together. Unset: rows of one prompt are."""

    RULES = (
        Rule(
            cel="has(self.splitFraction) != has(self.uri)",
            message="dataset.eval takes exactly one of splitFraction and uri; set one and remove the other",
            holds=lambda m: (m.split_fraction is None) != (m.uri is None),
        ),
    )


class DatasetChecks(APIModel):
    """What prepare does about the rows it finds. Secrets, personal data, outliers of length and language are always reported, never refused."""

    min_examples: Annotated[int, Field(ge=1, le=100_000_000)] = 50
    """Fewest usable training rows; with fewer the job fails before it asks for a GPU."""
    duplicates: Literal["drop", "keep", "fail"] = "drop"
    """Exact duplicates among training rows: drop all but the first, keep them, or fail."""
    near_duplicates: Literal["report", "drop", "fail", "ignore"] = "report"
    """Training rows nearly equal to an earlier one (MinHash): report, drop, fail, or do not look."""
    leakage: Literal["fail", "drop", "ignore"] = "fail"
    """Training rows whose prompt (or group, by `eval.groupBy`) is also held out: fail, drop them from training, or ignore."""
    near_leakage: Literal["report", "drop", "fail", "ignore"] = "report"
    """Training rows nearly equal to a held-out one (MinHash): report, drop them from training, fail, or do not look."""
    similarity: Annotated[float, Field(ge=0.5, le=1)] = 0.85
    """Jaccard similarity of word triples from which two rows count as nearly equal."""
    too_long: Literal["truncate", "drop", "fail"] = "truncate"
    """Rows longer than `hyperparameters.maxLength` tokens: truncate, drop, or fail."""
    invalid_rows: Literal["fail", "drop"] = "fail"
    """Rows that cannot be read or have broken roles or empty answers: fail with their line numbers, or drop them."""


class Dataset(APIModel):
    """The data: where it is, what it looks like, how strictly it is checked."""

    train: DatasetSource
    """The rows to train on."""
    mix: Annotated[list[DatasetSource], Field(max_length=16)] = Field(default_factory=list)
    """More rows to train on, of the same format or of one that is converted to it; `weight` says how often each is seen."""
    eval: EvalDataset | None = None
    """The held-out rows that base and tuned model are compared on. Never trained on."""
    format: DatasetFormat = "auto"
    """Format of the rows; `auto` looks at the first rows of each source and says what it found. docs/data.md shows them all."""
    columns: Annotated[dict[str, Column], Field(max_length=32), BeforeValidator(without_nulls)] = Field(default_factory=dict)
    """What your columns are in the format's terms, yours first: `question: prompt`. Holds for every source; others keep their names."""
    checks: DatasetChecks = Field(default_factory=DatasetChecks)
    """What prepare does about duplicates, leakage, and rows that are too long or broken."""

    @property
    def sources(self) -> dict[str, DatasetSource]:
        """The sources to train on, by the name that their secrets and rows go by: train, mix-0, mix-1 and so on."""
        return {"train": self.train, **{f"mix-{index}": source for index, source in enumerate(self.mix)}}
