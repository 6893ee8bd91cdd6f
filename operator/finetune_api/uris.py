"""Where models and data come from and where results go: URIs with an allow-list of schemes.

A reference never names a namespace: claims, ConfigMaps and Secrets are those of the job's own namespace.
Patterns are RE2 (no look-around) and refuse `..` by allowing a dot only inside a path segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from .base import Format

_SEGMENT = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"
_PATH = rf"{_SEGMENT}(/{_SEGMENT})*"
_CLAIM = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_HF = rf"hf://{_SEGMENT}(/{_SEGMENT})?(@{_PATH})?"
_PVC = rf"pvc://{_CLAIM}(/{_PATH})?"
_S3 = rf"s3://[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9]/{_PATH}"
_HTTPS = rf"https://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(:[0-9]{{1,5}})?/{_PATH}"
_CONFIGMAP = rf"configmap://{_CLAIM}(\.{_CLAIM})*/{_SEGMENT}"

MODEL = Format(
    pattern=rf"^({_HF}|{_PVC}|{_S3})$",
    name="a model URI",
    write="hf://ORG/MODEL[@REVISION], pvc://CLAIM/PATH or s3://BUCKET/PREFIX",
    scheme="hf://",
)
ADAPTER = Format(
    pattern=rf"^({_HF}|pvc://{_CLAIM}/{_PATH})$",
    name="an adapter URI",
    write="hf://ORG/ADAPTER[@REVISION] or pvc://CLAIM/PATH",
    scheme="hf://",
)
DATASET = Format(
    pattern=rf"^({_HF}|{_PVC}|{_S3}|{_HTTPS}|{_CONFIGMAP})$",
    name="a data set URI",
    write="hf://ORG/DATASET[@REVISION], pvc://CLAIM/PATH, s3://BUCKET/KEY, https://HOST/PATH or configmap://NAME/KEY",
    scheme="hf://",
)
PUBLISH = Format(
    pattern=rf"^({_HF}|pvc://{_CLAIM}/{_PATH}|{_S3})$",
    name="a target URI",
    write="pvc://CLAIM/PATH, hf://ORG/MODEL or s3://BUCKET/PREFIX",
    scheme="hf://",
)
ENDPOINT = Format(
    pattern=rf"^https?://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(:[0-9]{{1,5}})?(/{_SEGMENT})*/?$",
    name="an address",
    write="for example http://vllm.models.svc:8000/v1",
)

ModelURI = Annotated[str, Field(max_length=512), MODEL]
DatasetURI = Annotated[str, Field(max_length=512), DATASET]
AdapterURI = Annotated[str, Field(max_length=512), ADAPTER]
PublishURI = Annotated[str, Field(max_length=512), PUBLISH]
EndpointURL = Annotated[str, Field(max_length=512), ENDPOINT]


@dataclass(frozen=True)
class URI:
    """A parsed URI. `name` is the repository, claim, bucket, host or ConfigMap; `path` the path or key within it."""

    scheme: str
    name: str
    path: str = ""
    revision: str = ""


def parse_uri(text: str) -> URI:
    """Split a URI that one of the patterns above accepts. Raises ValueError on any other. What a model, an adapter or a target may be, a data set may be, too."""
    scheme, rest = DATASET.check(text).split("://", 1)
    if scheme == "hf":
        name, _, revision = rest.partition("@")
        return URI(scheme, name, revision=revision)
    name, _, path = rest.partition("/")
    return URI(scheme, name, path)
