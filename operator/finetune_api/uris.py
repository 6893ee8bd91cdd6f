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
_HOST = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?(:[0-9]{1,5})?"
_OCI = rf"oci://{_HOST}/[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*(:[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?"
_OCI_PINNED = rf"{_OCI}(@sha256:[0-9a-f]{{64}})?"
_MLFLOW = rf"mlflow://{_HOST}/{_SEGMENT}"
_MLFLOW_PINNED = rf"{_MLFLOW}(@[A-Za-z0-9_-]+|/[0-9]{{1,9}})?"
_VERSION = rf"model://{_CLAIM}(\.{_CLAIM})*(@[0-9]{{1,7}})?"
_CONFIGMAP = rf"configmap://{_CLAIM}(\.{_CLAIM})*/{_SEGMENT}"

MODEL = Format(
    pattern=rf"^({_HF}|{_PVC}|{_S3}|{_OCI_PINNED}|{_MLFLOW_PINNED})$",
    name="a model URI",
    write="hf://ORG/MODEL[@REVISION], pvc://CLAIM/PATH, s3://BUCKET/PREFIX, oci://HOST/REPOSITORY[:TAG] or mlflow://HOST/MODEL[@ALIAS]",
    scheme="hf://",
)
BASE = Format(
    pattern=rf"^({_HF}|{_PVC}|{_S3}|{_OCI_PINNED}|{_MLFLOW_PINNED}|{_VERSION})$",
    name="a model URI",
    write="hf://ORG/MODEL[@REVISION], pvc://CLAIM/PATH, s3://BUCKET/PREFIX, oci://HOST/REPOSITORY[:TAG], mlflow://HOST/MODEL[@ALIAS] or model://FINETUNEDMODEL[@VERSION]",
    scheme="hf://",
)
ADAPTER = Format(
    pattern=rf"^({_HF}|pvc://{_CLAIM}/{_PATH}|{_S3}|{_OCI_PINNED}|{_MLFLOW_PINNED}|{_VERSION})$",
    name="an adapter URI",
    write="model://FINETUNEDMODEL[@VERSION], hf://ORG/ADAPTER[@REVISION], pvc://CLAIM/PATH, s3://BUCKET/PREFIX, oci://HOST/REPOSITORY[:TAG] or mlflow://HOST/MODEL[@ALIAS]",
    scheme="hf://",
)
DATASET = Format(
    pattern=rf"^({_HF}|{_PVC}|{_S3}|{_HTTPS}|{_CONFIGMAP}|{_OCI_PINNED}|{_MLFLOW_PINNED})$",
    name="a data set URI",
    write="hf://ORG/DATASET[@REVISION], pvc://CLAIM/PATH, s3://BUCKET/KEY, https://HOST/PATH, configmap://NAME/KEY, oci://HOST/REPOSITORY[:TAG] or mlflow://HOST/MODEL[@ALIAS]",
    scheme="hf://",
)
PUBLISH = Format(
    pattern=rf"^({_HF}|pvc://{_CLAIM}/{_PATH}|{_S3}|{_OCI}|{_MLFLOW})$",
    name="a target URI",
    write="pvc://CLAIM/PATH, hf://ORG/MODEL, s3://BUCKET/PREFIX, oci://HOST/REPOSITORY[:TAG] or mlflow://HOST/MODEL",
    scheme="hf://",
)
STORAGE = Format(
    pattern=rf"^(pvc://{_CLAIM}/{_PATH}|{_S3})$",
    name="a storage URI",
    write="pvc://CLAIM/PATH or s3://BUCKET/PREFIX",
)
ENDPOINT = Format(
    pattern=rf"^https?://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(:[0-9]{{1,5}})?(/{_SEGMENT})*/?$",
    name="an address",
    write="for example http://vllm.models.svc:8000/v1",
)

ModelURI = Annotated[str, Field(max_length=512), MODEL]
BaseURI = Annotated[str, Field(max_length=512), BASE]
DatasetURI = Annotated[str, Field(max_length=512), DATASET]
AdapterURI = Annotated[str, Field(max_length=512), ADAPTER]
PublishURI = Annotated[str, Field(max_length=512), PUBLISH]
StorageURI = Annotated[str, Field(max_length=512), STORAGE]
EndpointURL = Annotated[str, Field(max_length=512), ENDPOINT]


_ANY = Format(
    pattern=rf"^({_HF}|{_PVC}|{_S3}|{_HTTPS}|{_CONFIGMAP}|{_OCI_PINNED}|{_MLFLOW_PINNED}|{_VERSION})$",
    name="a URI",
    write="for example hf://ORG/NAME, pvc://CLAIM/PATH or s3://BUCKET/PREFIX",
    scheme="hf://",
)


@dataclass(frozen=True)
class URI:
    """A parsed URI. `name` is the repository, claim, bucket, host, ConfigMap or FineTunedModel; `path` the path, key, repository or model within it.

    `revision` is a commit or branch (hf), a tag or sha256:DIGEST (oci), an alias or a version (mlflow), a version (model); empty: the newest.
    """

    scheme: str
    name: str
    path: str = ""
    revision: str = ""


def parse_uri(text: str) -> URI:
    """Split a URI that one of the patterns above accepts. Raises ValueError on any other."""
    scheme, rest = _ANY.check(text).split("://", 1)
    if scheme in ("hf", "model"):
        name, _, revision = rest.partition("@")
        return URI(scheme, name, revision=revision)
    name, _, path = rest.partition("/")
    if scheme == "oci":
        path, _, digest = path.partition("@")
        path, _, tag = path.partition(":")
        return URI(scheme, name, path, digest or tag)
    if scheme == "mlflow":
        path, _, revision = path.replace("/", "@").partition("@")
        return URI(scheme, name, path, revision)
    return URI(scheme, name, path)
