"""What hubs, servers of data and endpoints answer: refused for good, or away and waited for.

401, 403, 404 and 410 are the user's to mend. No answer, 408, 429 and 5xx say nothing about the job: after a few tries the
stage ends with SourceUnavailable, holds nothing meanwhile, and the operator starts it again.
"""

from __future__ import annotations

import email.utils
import errno
import http.client
import os
import re
import socket
import ssl
import time
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from finetune_api.contract import Env, Mounts

from ..process.errors import SourceUnavailable, StageError, UserError

REFUSED, PATIENCE = (401, 403, 404, 410), (408, 425, 429)
UNKNOWN_METHOD = (501, 505)
HUB = "https://huggingface.co"
LONGEST_WAIT = 10.0
"""The longest wait within a process: what takes longer is waited for without a pod."""
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 60
"""Seconds that a server of data has to take a connection, and to send the next bytes."""
_PAUSES = (1.0, 2.0, 4.0)
_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
_TRANSPORT = frozenset({
    "httpx.TransportError", "requests.exceptions.ConnectionError", "requests.exceptions.Timeout", "aiohttp.client_exceptions.ClientError",
    "botocore.exceptions.HTTPClientError", "botocore.exceptions.ConnectionError", "botocore.exceptions.IncompleteReadError",
})  # fmt: skip
"""By name: none of them is imported for this."""
_NOT_FOUND = ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError", "DatasetNotFoundError")
T = TypeVar("T")


def hub_host() -> str:
    """The host of the hub, or of the mirror that an administrator named."""
    return str(urlsplit(os.environ.get(Env.HUB) or HUB).hostname)


def host_unavailable(host: str, what: str, retry_after: float | None = None) -> SourceUnavailable:
    """The error of a host that does not answer, or not now."""
    return SourceUnavailable(host, f"{host} {what}", retry_after)


def error_for_status(host: str, status: int, headers: Mapping[str, str], refused: Callable[[str], UserError]) -> StageError | None:
    """What a status means: the user's error, one that is waited for, or nothing that is known."""
    if status in REFUSED:
        return refused(f"{host} answers {status}")
    if status in PATIENCE or (status >= 500 and status not in UNKNOWN_METHOD):
        return host_unavailable(host, f"answers {status} {http.client.responses.get(status, '')}".rstrip(), retry_after(headers))
    return None


def error_for_exception(failure: BaseException, host: str, refused: Callable[[str], UserError]) -> StageError | None:
    """What an exception of a library means, by itself and by what it came from; None when it tells of nothing remote."""
    for link in _chain(failure):
        if isinstance(link, StageError):
            return link
        if (answer := _answer(link)) is not None:
            status, headers, url = answer
            if (found := error_for_status(str(urlsplit(url).hostname or host), status, headers, refused)) is not None:
                return found
        if type(link).__name__ in _NOT_FOUND:
            return refused(f"{host} does not have it")
        if _is_transport(link):
            untrusted = any("CERTIFICATE_VERIFY_FAILED" in str(other) for other in _chain(link))
            hint = "; the chart value trainer.caBundle names authorities to trust" if untrusted else ""
            return host_unavailable(_asked(link) or host, f"cannot be reached: {_short(link)}{hint}")
    return None


def unavailable_error(failure: BaseException, host: str) -> SourceUnavailable | None:
    """The same, where a refusal is said by what the library makes of it."""
    found = error_for_exception(failure, host, lambda why: UserError("SourceNotFound", why))
    return found if isinstance(found, SourceUnavailable) else None


def with_retries(ask: Callable[[], T], host: str, refused: Callable[[str], UserError]) -> T:
    """Ask, and ask again a few times where that may help. Raises UserError or SourceUnavailable, or what else went wrong."""
    for pause in (*_PAUSES, None):
        try:
            return ask()
        except Exception as failure:
            error = error_for_exception(failure, host, refused)
            if error is None or (error is failure and not isinstance(failure, SourceUnavailable)):
                raise
            slow = any(isinstance(link, TimeoutError) for link in _chain(failure))
            if not isinstance(error, SourceUnavailable) or pause is None or slow or (error.retry_after or 0) > LONGEST_WAIT:
                raise error from failure.__cause__ if error is failure else failure
            time.sleep(max(pause, error.retry_after or 0))
    raise AssertionError("unreachable")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The patience that a server asks for, in seconds: Retry-After as a number or a date, or the reset of its rate limit."""
    named = {str(name).lower(): str(value).strip() for name, value in headers.items()}
    text = named.get("retry-after", "")
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", text):
        return float(text)
    if text:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
        except ValueError:
            return None
    reset = re.search(r"r=0;\s*t=([0-9]{1,9})", named.get("ratelimit", ""))  # draft-ietf-httpapi-ratelimit-headers
    return float(reset.group(1)) if reset else None


def cap_hub_retry_wait() -> None:
    """huggingface_hub itself would sleep as long as Retry-After says, be it an hour, and nobody would see why."""
    import httpx
    import huggingface_hub

    def look(response: httpx.Response) -> None:
        patience = retry_after(response.headers) if response.status_code in (429, 503) else None
        if patience is not None and patience > LONGEST_WAIT:
            raise host_unavailable(str(response.url.host), f"answers {response.status_code} {response.reason_phrase}", patience)

    def client() -> httpx.Client:
        made: httpx.Client = huggingface_hub.utils._http.default_client_factory()
        made.event_hooks["response"].append(look)
        return made

    huggingface_hub.set_client_factory(client)


def trust_authorities(authorities: str = Mounts.AUTHORITIES) -> None:
    """Let every library trust an administrator's certificate authorities, beside those of the system."""
    own = Path(authorities)
    if not own.is_file():
        return
    system = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile
    if system is None or not os.path.exists(system):
        import certifi

        system = certifi.where()
    both = Path(os.environ.get("HOME", "/tmp"), f".authorities-{os.getpid()}.pem")
    both.write_text(Path(system).read_text() + "\n" + own.read_text())
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE"):
        os.environ[name] = str(both)


def _chain(failure: BaseException) -> Iterator[BaseException]:
    """The exception and what it came from, the outermost first."""
    link: BaseException | None = failure
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _answer(failure: BaseException) -> tuple[int, Mapping[str, str], str] | None:
    """Status, headers and address of the answer that an exception tells of."""
    if isinstance(failure, urllib.error.HTTPError):
        return failure.code, dict(failure.headers.items()), failure.url or ""
    response: Any = getattr(failure, "response", None)
    if isinstance(response, dict):  # botocore's
        meta = response.get("ResponseMetadata") or {}
        return (int(meta["HTTPStatusCode"]), meta.get("HTTPHeaders") or {}, "") if "HTTPStatusCode" in meta else None
    status = getattr(response, "status_code", None)
    return (int(status), dict(response.headers), str(getattr(response, "url", "") or "")) if isinstance(status, int) else None


def _is_transport(failure: BaseException) -> bool:
    if isinstance(failure, ConnectionError | TimeoutError | socket.gaierror | ssl.SSLError | http.client.HTTPException):
        return True
    if isinstance(failure, OSError) and failure.errno in _UNREACHABLE:
        return True
    return any(f"{kind.__module__}.{kind.__qualname__}" in _TRANSPORT for kind in type(failure).__mro__)


def _asked(failure: BaseException) -> str | None:
    """The host of the request that an exception of httpx or requests carries."""
    try:
        request = failure.request  # type: ignore[attr-defined]
        return urlsplit(str(request.url)).hostname
    except (AttributeError, RuntimeError):  # httpx raises where there is none
        return None


def _short(failure: BaseException) -> str:
    """One line, without the query of an address: signatures stand there."""
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", str(failure)).strip() or type(failure).__name__
    return text.splitlines()[0][:200]
