"""One session for registries and model servers of users: only to addresses that may be connected to, whatever an answer leads to.

Redirects, the places of uploads and the givers of tokens are named by the server that is asked: each connection is checked (case A6),
and goes to the address that was checked.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from ..process.errors import SourceUnavailable, UserError
from .addresses import allowed_addresses, is_allowed
from .retry import CONNECT_TIMEOUT, READ_TIMEOUT

SIZE_LIMIT = 4 * 2**40
"""Bytes of a model, all files together."""
CHUNK = 2**20
SENDING = (CONNECT_TIMEOUT, 600)
"""Seconds for a connection, and for the answer to a file that was sent, which servers digest first."""
_DOCUMENT = 4 * 2**20
"""Bytes of a manifest or another document."""


class _Plain(HTTPConnection):
    def _new_conn(self) -> Any:
        with _checked(self):
            return super()._new_conn()


class _Secure(HTTPSConnection):
    def _new_conn(self) -> Any:
        with _checked(self):
            return super()._new_conn()


@contextlib.contextmanager
def _checked(connection: Any) -> Any:
    """Connect to an address that was checked, whatever the name means a moment later; the certificate is the name's."""
    name = connection._dns_host
    connection._dns_host = allowed_addresses(name.rstrip("."), connection.port)[0]
    try:
        yield
    finally:
        connection._dns_host = name


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _Plain


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _Secure


class _Adapter(HTTPAdapter):
    def __init__(self, plain: bool) -> None:
        super().__init__()
        self._plain = plain

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _PlainPool, "https": _SecurePool}

    def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        parts = urlsplit(request.url)
        host = str(parts.hostname)
        if parts.scheme == "http" and not (self._plain and is_allowed(host)):
            raise UserError(
                "PlainHTTPRefused", f"http://{host}: {'an administrator must allow this host' if self._plain else 'TLS is asked for'}"
            )
        if requests.utils.select_proxy(request.url, kwargs.get("proxies") or {}):  # which looks the name up
            with contextlib.suppress(SourceUnavailable):
                allowed_addresses(host, parts.port or (443 if parts.scheme == "https" else 80))
        kwargs["timeout"] = kwargs.get("timeout") or (CONNECT_TIMEOUT, READ_TIMEOUT)
        return super().send(request, *args, **kwargs)


def guard(session: requests.Session, *, plain: bool) -> requests.Session:
    """Let a session reach only what may be reached; HTTP without TLS only where it is asked for and an administrator allows the host.

    Its requests raise UserError (PlainHTTPRefused, AddressNotAllowed) and SourceUnavailable besides what requests raises.
    """
    for scheme in ("https://", "http://"):
        session.mount(scheme, _Adapter(plain))
    session.max_redirects = 5
    session.headers["Accept-Encoding"] = "identity"  # digests are of what is stored
    return session


def read_document(answer: requests.Response, host: str) -> bytes:
    """A streamed answer's body, which has to be small. Raises UserError when it is not."""
    body = b""
    for chunk in answer.iter_content(CHUNK):
        body += chunk
        if len(body) > _DOCUMENT:
            raise UserError("ModelTooLarge", f"{host}: a document of over {_DOCUMENT // 2**20} MiB; it is no model")
    return body


def save(answer: requests.Response, target: Path, *, most: int, host: str) -> str:
    """Write a streamed answer to a file, after what is there where the server goes on from it (206); the SHA-256 of all of it.

    Raises UserError when there are more than `most` bytes.
    """
    goes_on = answer.status_code == 206
    digest, size = hashlib.sha256(), 0
    if goes_on:
        with target.open("rb") as had:
            while chunk := had.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
    with target.open("ab" if goes_on else "wb") as sink:
        for chunk in answer.iter_content(CHUNK):
            size += len(chunk)
            if size > most:
                raise UserError("ModelTooLarge", f"{host}: {target.name.strip('.')} has over {most} bytes, more than was said or may be")
            sink.write(chunk)
            digest.update(chunk)
    return digest.hexdigest()


def status_of(failure: requests.HTTPError) -> int:
    """The status of an answer that was refused."""
    return 0 if failure.response is None else failure.response.status_code
