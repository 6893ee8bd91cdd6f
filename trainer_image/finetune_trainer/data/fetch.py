"""Fetch rows from elsewhere into the job's folder, once: what was fetched is what trains (case F34).

A data set's host must have public addresses, at every redirect (case A6): metadata services and cluster addresses
are out of reach unless an administrator names the host. The connection goes to the address that was checked.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import shutil
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from finetune_api.spec import DatasetSource
from finetune_api.uris import URI, parse_uri

from ..job.context import Context
from ..process.errors import InfrastructureError, SourceUnavailable, UserError
from ..remote.addresses import allowed_addresses
from ..remote.artifacts import from_mlflow, from_registry
from ..remote.retry import CONNECT_TIMEOUT, READ_TIMEOUT, error_for_status, host_unavailable, with_retries
from ..remote.s3 import error_code, s3_client, s3_host

SIZE_LIMIT = 200 * 2**30
"""Bytes of one file."""
TYPES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
"""Files that hold rows; also with .gz."""
_REDIRECTS, _CHUNK = 5, 1 << 20
_FOLDERS = {"oci": from_registry, "mlflow": from_mlflow}
_FILES = [f"*{kind}{packed}" for kind in TYPES for packed in ("", ".gz")]


def fetch(context: Context, source: DatasetSource, field: str) -> Path:
    """The file of an https:// or s3:// source, the folder of an oci:// or mlflow:// one, downloaded when it is not there yet."""
    uri = parse_uri(source.uri)
    folder = Path(context.layout.data, "downloads", hashlib.sha256(source.uri.encode()).hexdigest()[:16])
    target = folder / (Path(uri.path).name if uri.scheme not in _FOLDERS else "files")
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")

    def refused(why: str) -> UserError:
        return UserError("DatasetNotFound", f"{source.uri}: {why}; check the uri and secretRef")

    def download() -> None:
        if (artifact := _FOLDERS.get(uri.scheme)) is not None:
            partial.unlink(missing_ok=True)
            partial.symlink_to(artifact(context, field, uri, source.plain_http, _FILES)[0])
        elif uri.scheme == "s3":
            _from_s3(context, source, uri, field, partial)
        else:
            _from_https(source.uri, context.secret(field), partial, refused)

    try:
        with_retries(download, _host(source, uri), refused)
    except OSError as failure:
        raise InfrastructureError("DownloadFailed", f"{source.uri}: {failure}") from failure
    partial.rename(target)
    return target


def _host(source: DatasetSource, uri: URI) -> str:
    """Who is asked, where an error does not say so itself."""
    return s3_host(source.s3_endpoint) if uri.scheme == "s3" else str(urlsplit(source.uri).hostname)


def _connect(host: str, port: int) -> http.client.HTTPSConnection:
    """A connection to an address that may be connected to; through the proxy where an administrator set one, which then looks names up."""
    via = None if proxy_bypass(host) else getproxies().get("https")
    if via is None:
        return _Pinned(host, port, allowed_addresses(host, port)[0])
    with contextlib.suppress(SourceUnavailable):
        allowed_addresses(host, port)
    proxy = urlsplit(via if "://" in via else f"http://{via}")
    connection = http.client.HTTPSConnection(str(proxy.hostname), proxy.port or 80, timeout=READ_TIMEOUT)
    token = base64.b64encode(f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()).decode() if proxy.username else ""
    connection.set_tunnel(host, port, {"Proxy-Authorization": f"Basic {token}"} if token else {})
    return connection


class _Pinned(http.client.HTTPSConnection):
    """Connects to an address that was checked, whatever the name means a moment later."""

    def __init__(self, host: str, port: int, address: str) -> None:
        self._context = ssl.create_default_context()
        super().__init__(host, port, timeout=READ_TIMEOUT, context=self._context)
        self._address = address

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), CONNECT_TIMEOUT)
        plain.settimeout(READ_TIMEOUT)
        self.sock = self._context.wrap_socket(plain, server_hostname=self.host)


def _from_https(url: str, token: str | None, target: Path, refused: Callable[[str], UserError]) -> None:
    first = urlsplit(url).hostname
    for _ in range(_REDIRECTS):
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.username or parts.password:
            raise UserError(
                "RedirectRefused", f"the data set's address leads to {parts.scheme}://{parts.hostname}; only https:// is followed"
            )
        port = parts.port or 443
        connection = _connect(parts.hostname, port)
        headers = {"User-Agent": "finetune-operator", "Accept-Encoding": "identity"}
        if token and parts.hostname == first:  # never to another host
            headers["Authorization"] = f"Bearer {token}"
        try:
            connection.request("GET", parts.path + (f"?{parts.query}" if parts.query else ""), headers=headers)
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308):
                url = urljoin(url, answer.headers.get("Location", ""))
                continue
            if (error := error_for_status(parts.hostname, answer.status, dict(answer.headers.items()), refused)) is not None:
                raise error
            if answer.status != 200:
                raise InfrastructureError("DownloadFailed", f"https://{parts.hostname}{parts.path} answers {answer.status}")
            _save(answer, target, answer.headers.get("Content-Length"), parts.hostname)
            return
        finally:
            connection.close()
    raise UserError("TooManyRedirects", f"the data set's address redirects more than {_REDIRECTS} times")


def _save(stream: Any, target: Path, announced: str | None, host: str) -> None:
    size = 0
    with target.open("wb") as sink:
        while chunk := stream.read(_CHUNK):
            size += len(chunk)
            if size > SIZE_LIMIT:
                raise UserError("DatasetTooLarge", f"the file is over {SIZE_LIMIT // 2**30} GiB")
            sink.write(chunk)
    if announced is not None and announced.isdigit() and int(announced) != size:
        raise host_unavailable(host, f"broke off: {size} of {announced} bytes arrived")


def _from_s3(context: Context, source: DatasetSource, uri: URI, field: str, target: Path) -> None:
    client = s3_client(context, field, source.s3_endpoint)
    try:
        answer = client.get_object(Bucket=uri.name, Key=uri.path)
    except client.exceptions.ClientError as failure:
        if (code := error_code(failure)) in ("NoSuchKey", "NoSuchBucket", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
            raise UserError("DatasetNotFound", f"{source.uri}: {code}; check the uri and secretRef") from None
        raise
    _save(answer["Body"], target, str(answer["ContentLength"]), _host(source, uri))


def remove_downloads(context: Context) -> None:
    """Remove what was fetched: the prepared rows are in the workspace."""
    shutil.rmtree(Path(context.layout.data, "downloads"), ignore_errors=True)
