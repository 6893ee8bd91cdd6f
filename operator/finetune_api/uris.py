"""Where models and data come from and where results go: URIs with an allow-list of schemes.

A reference never names a namespace: claims, ConfigMaps and Secrets are those of the job's own namespace.
Patterns are RE2 (no look-around) and refuse `..` by allowing a dot only inside a path segment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

_SEGMENT = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"
_PATH = rf"{_SEGMENT}(/{_SEGMENT})*"
_CLAIM = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_HF = rf"hf://{_SEGMENT}(/{_SEGMENT})?(@{_PATH})?"
_PVC = rf"pvc://{_CLAIM}(/{_PATH})?"
_S3 = rf"s3://[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9]/{_PATH}"
_HTTPS = rf"https://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(:[0-9]{{1,5}})?/{_PATH}"
_CONFIGMAP = rf"configmap://{_CLAIM}(\.{_CLAIM})*/{_SEGMENT}"

MODEL_PATTERN = rf"^({_HF}|{_PVC})$"
ADAPTER_PATTERN = rf"^({_HF}|pvc://{_CLAIM}/{_PATH})$"
DATASET_PATTERN = rf"^({_HF}|{_PVC}|{_S3}|{_HTTPS}|{_CONFIGMAP})$"
PUBLISH_PATTERN = rf"^({_HF}|pvc://{_CLAIM}/{_PATH})$"

ModelURI = Annotated[str, Field(pattern=MODEL_PATTERN, max_length=512)]
DatasetURI = Annotated[str, Field(pattern=DATASET_PATTERN, max_length=512)]
AdapterURI = Annotated[str, Field(pattern=ADAPTER_PATTERN, max_length=512)]
PublishURI = Annotated[str, Field(pattern=PUBLISH_PATTERN, max_length=512)]

EXPECTED = {
    MODEL_PATTERN: "hf://ORG/MODEL[@REVISION] or pvc://CLAIM/PATH",
    DATASET_PATTERN: "hf://ORG/DATASET[@REVISION], pvc://CLAIM/PATH, s3://BUCKET/KEY, https://HOST/PATH or configmap://NAME/KEY",
    PUBLISH_PATTERN: "pvc://CLAIM/PATH or hf://ORG/MODEL",
}


@dataclass(frozen=True)
class URI:
    """A parsed URI. `name` is the repository, claim, bucket, host or ConfigMap; `path` the path or key within it."""

    scheme: str
    name: str
    path: str = ""
    revision: str = ""


def parse_uri(text: str) -> URI:
    """Split a URI that one of the patterns above accepts. Raises ValueError on any other."""
    if not any(re.fullmatch(pattern, text) for pattern in (MODEL_PATTERN, DATASET_PATTERN, PUBLISH_PATTERN)):
        raise ValueError(f"{text!r} is not a supported URI; write {EXPECTED[DATASET_PATTERN]}")
    scheme, rest = text.split("://", 1)
    if scheme == "hf":
        name, _, revision = rest.partition("@")
        return URI(scheme, name, revision=revision)
    name, _, path = rest.partition("/")
    return URI(scheme, name, path)
