"""OCI registries: blobs and manifests by digest, by the OCI distribution spec. Knows nothing of models.

oras-py knows the addresses and the giving of tokens. What differs from it: who may be connected to (`remote/web.py`), that a
refusal ends at once (it sleeps for two minutes first), that a file is not read into memory to be sent, that only the Secret's
credentials count, and that manifests are the bytes that their digest is of.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oras.container
import oras.provider
import requests

from finetune_api.contract import DOCKER_CONFIG
from finetune_api.uris import URI

from ..job.context import Context
from ..process.errors import UserError
from ..process.redaction import add_secret
from .web import CHUNK, SENDING, guard, read_document, save, status_of

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
_ACCEPTED = ", ".join((MANIFEST, INDEX))
LATEST = "latest"
"""The tag of a uri without one, as everywhere."""
_HUB = ("docker.io", "registry-1.docker.io", "https://index.docker.io/v1/")
"""What Docker's own registry is called, where it listens, and what its credentials go by."""


@dataclass(frozen=True)
class Manifest:
    """A manifest or index as a registry has it."""

    body: bytes
    media_type: str

    @property
    def digest(self) -> str:
        return digest_of(self.body)

    @property
    def document(self) -> dict[str, Any]:
        """What it says; empty where it is no JSON object."""
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


def digest_of(body: bytes) -> str:
    """As OCI writes a digest."""
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


class Registry(oras.provider.Registry):
    """One repository of a registry. Raises requests.HTTPError for what it refuses, and what `guard` raises."""

    def __init__(self, context: Context, field: str, uri: URI, *, plain: bool) -> None:
        self.host = _HUB[1] if uri.name == _HUB[0] else uri.name
        super().__init__(hostname=self.host, insecure=plain)
        guard(self.session, plain=plain)
        self._container = oras.container.Container("repository", registry=self.host)  # its parser takes a host without a dot for a folder
        self._container.namespace, _, self._container.repository = uri.path.rpartition("/")
        secret = context.secret(field, DOCKER_CONFIG)
        self._credentials = _credentials(secret, uri.name) if secret is not None else _of_this_machine(uri.name)
        if self._credentials is not None:
            self.auth.set_basic_auth(*self._credentials)

    def do_request(
        self, url: str, method: str = "GET", data: Any = None, headers: Any = None, json: Any = None, stream: bool = False
    ) -> Any:
        """One request, with credentials where they are asked for."""
        headers = {**(headers or {}), **self.auth.get_auth_header()}
        begun = data.tell() if hasattr(data, "tell") else 0
        for last in (False, True):
            if hasattr(data, "seek"):
                data.seek(begun)
            timeout = SENDING if method == "PUT" else None
            answer = self.session.request(method, url, data=data, headers=headers, stream=stream, timeout=timeout)
            challenge = answer.headers.get("Www-Authenticate", "")
            if last or answer.status_code != 401 or not challenge:
                break
            if challenge.lower().startswith("basic"):
                if self._credentials is None:
                    break
                self.session.auth = self._credentials
                headers.pop("Authorization", None)
            else:  # a token, for this repository and purpose
                self.auth.token = None
                headers, changed = self.auth.authenticate_request(answer, headers)
                if not changed:
                    break
        if answer.status_code >= 400 and not (method == "HEAD" and answer.status_code == 404):
            answer.raise_for_status()
        return answer

    def _url(self, place: str) -> str:
        return f"{self.prefix}://{place}"

    def manifest(self, reference: str) -> Manifest | None:
        """What a tag or digest stands for, None where there is nothing. Raises UserError where a digest is another's."""
        try:
            answer = self.do_request(self._url(self._container.manifest_url(reference)), headers={"Accept": _ACCEPTED}, stream=True)
        except requests.HTTPError as failure:
            if status_of(failure) == 404:
                return None
            raise
        found = Manifest(read_document(answer, self.host), answer.headers.get("Content-Type", "").partition(";")[0])
        if reference.startswith("sha256:") and found.digest != reference:
            raise UserError("ModelNotWhole", f"{self.host} answers with something else than {reference}")
        return found

    def put_manifest(self, document: dict[str, Any], tag: str | None = None) -> dict[str, Any]:
        """Write a manifest or index under a tag, or by its digest alone; its descriptor."""
        body = dumps(document)
        described = {"mediaType": document["mediaType"], "digest": digest_of(body), "size": len(body)}
        url = self._url(self._container.manifest_url(tag or described["digest"]))
        self.do_request(url, "PUT", data=body, headers={"Content-Type": document["mediaType"]})
        return described

    def has_blob(self, digest: str) -> bool:
        """Whether the repository holds it."""
        return bool(self.do_request(self._url(self._container.get_blob_url(digest)), "HEAD").status_code == 200)

    def put_blob(self, digest: str, body: bytes | Path) -> None:
        """Send a blob that is not there yet."""
        if self.has_blob(digest):
            return
        place = self._begin()
        whole = f"{place}{'&' if '?' in place else '?'}digest={digest}"
        headers = {"Content-Type": "application/octet-stream"}
        if isinstance(body, bytes):
            self.do_request(whole, "PUT", data=body, headers=headers)
            return
        with body.open("rb") as stream:
            self.do_request(whole, "PUT", data=stream if body.stat().st_size else b"", headers=headers)

    def may_write(self) -> None:
        """Raises what a write would raise: an upload is begun and given up."""
        place = self._begin()
        with contextlib.suppress(requests.HTTPError):  # some do not give up: they forget it by themselves
            self.do_request(place, "DELETE")

    def _begin(self) -> str:
        answer = self.do_request(self._url(self._container.upload_blob_url()), "POST", headers={"Content-Length": "0"})
        return str(self._get_location(answer, self._container))

    def blob(self, digest: str) -> Iterator[bytes]:
        """A blob's bytes as they come."""
        answer = self.do_request(self._url(self._container.get_blob_url(digest)), stream=True)
        yield from answer.iter_content(CHUNK)

    def save_blob(self, digest: str, size: int, target: Path) -> None:
        """Download a blob to a file, going on after what is there. Raises UserError when it is not what its digest says."""
        had = target.stat().st_size if target.exists() else 0
        if had > size:
            target.unlink()
            had = 0
        headers = {"Range": f"bytes={had}-"} if 0 < had < size else {}
        if had < size or not size:
            answer = self.do_request(self._url(self._container.get_blob_url(digest)), headers=headers, stream=True)
            found = save(answer, target, most=size, host=self.host)
        else:
            with target.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        if f"sha256:{found}" != digest:
            target.unlink()
            raise UserError("ModelNotWhole", f"{self.host}: a blob is not what its digest says ({digest}); publish it again")


def dumps(document: dict[str, Any]) -> bytes:
    """JSON whose bytes, and so its digest, are always the same."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _of_this_machine(host: str) -> tuple[str, str] | None:
    """What `docker login` left on the machine of a local run; a pod has none."""
    file = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker", "config.json")
    with contextlib.suppress(OSError, UserError):
        return _credentials(file.read_text(), host)
    return None


def _credentials(config: str, host: str) -> tuple[str, str]:
    """User and password for a host out of a Docker configuration. Raises UserError when it cannot be read, or names other hosts alone."""
    names = _HUB if host in _HUB else (host, f"https://{host}", f"https://{host}/v1/", f"https://{host}/v2/")
    try:
        entries = json.loads(config)["auths"]
        entry = next((entries[name] for name in names if name in entries), None)
        if entry is None:
            raise UserError(
                "SecretNotReadable", f"{DOCKER_CONFIG} in secretRef has no credentials for {host}, only for {', '.join(sorted(entries))}"
            )
        if "auth" in entry:
            user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
        else:
            user, password = str(entry["username"]), str(entry["password"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            "SecretNotReadable",
            f"{DOCKER_CONFIG} in secretRef is no Docker configuration; make it with kubectl create secret docker-registry",
        ) from None
    add_secret(password)
    add_secret(base64.b64encode(f"{user}:{password}".encode()).decode())
    return user, password
