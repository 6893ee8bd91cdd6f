"""The models that a job reads: the base, a teacher, an OpenAI-compatible endpoint."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from ..base import APIModel, Rule
from ..uris import EndpointURL, ModelURI
from .common import SecretReference


class Model(APIModel):
    """The base model."""

    uri: ModelURI
    """Where the base model is: `hf://ORG/MODEL[@REVISION]`, `pvc://CLAIM/PATH`, `s3://BUCKET/PREFIX`, `oci://HOST/REPOSITORY[:TAG]` or `mlflow://HOST/MODEL[@ALIAS]` (files that `from_pretrained` loads)."""
    secret_ref: SecretReference | None = None
    """Secret with a token for hf:// and mlflow://, with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://, or with .dockerconfigjson for oci://."""
    s3_endpoint: EndpointURL | None = None
    """Address of an S3-compatible server; unset means the administrator's, or AWS. Only for s3://."""
    plain_http: bool = Field(default=False, alias="plainHTTP")
    """Speak HTTP without TLS with an oci:// registry or an mlflow:// server, which an administrator must allow."""
    trust_remote_code: bool = False
    """Run Python code that the model repository ships. An administrator must allow it for the namespace too."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.secretRef) || !self.uri.startsWith('pvc://')",
            message="model.secretRef is not used with a pvc:// uri; remove it or change model.uri",
            holds=lambda m: m.secret_ref is None or not m.uri.startswith("pvc://"),
        ),
        Rule(
            cel="!has(self.s3Endpoint) || self.uri.startsWith('s3://')",
            message="model.s3Endpoint is only used with an s3:// uri; remove it or change model.uri",
            holds=lambda m: m.s3_endpoint is None or m.uri.startswith("s3://"),
        ),
        Rule(
            cel="!self.plainHTTP || self.uri.startsWith('oci://') || self.uri.startsWith('mlflow://')",
            message="model.plainHTTP is only used with an oci:// or mlflow:// uri; remove it or change model.uri",
            holds=lambda m: not m.plain_http or m.uri.startswith(("oci://", "mlflow://")),
        ),
    )


class Endpoint(APIModel):
    """An OpenAI-compatible server of chat completions, such as vLLM's or Ollama's."""

    url: EndpointURL
    """Base address with the version, for example `http://vllm.models.svc:8000/v1`."""
    model: Annotated[str, Field(min_length=1, max_length=256)]
    """Name of the model at that server."""
    secret_ref: SecretReference | None = None
    """Secret with the server's API key."""
