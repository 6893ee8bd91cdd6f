"""The models that a job reads: the base, a teacher, an OpenAI-compatible endpoint."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..base import APIModel, Rule
from ..uris import EndpointURL, ModelURI
from .common import SecretReference


class Model(APIModel):
    """The base model."""

    uri: ModelURI
    """Where the base model is: `hf://ORG/MODEL[@REVISION]`, `pvc://CLAIM/PATH` or `s3://BUCKET/PREFIX` (a folder that `from_pretrained` loads)."""
    secret_ref: SecretReference | None = None
    """Secret with a Hugging Face token for gated or private models, or with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (s3://)."""
    s3_endpoint: EndpointURL | None = None
    """Address of an S3-compatible server; unset means the administrator's, or AWS. Only for s3://."""
    trust_remote_code: bool = False
    """Run Python code that the model repository ships. An administrator must allow it for the namespace too."""

    RULES = (
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
    )


class Endpoint(APIModel):
    """An OpenAI-compatible server of chat completions, such as vLLM's or Ollama's."""

    url: EndpointURL
    """Base address with the version, for example `http://vllm.models.svc:8000/v1`."""
    model: Annotated[str, Field(min_length=1, max_length=256)]
    """Name of the model at that server."""
    secret_ref: SecretReference | None = None
    """Secret with the server's API key."""
