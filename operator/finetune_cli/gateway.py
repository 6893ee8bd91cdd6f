"""The gateway as an OpenAI-compatible server: which models there are, a chat whose answer comes in pieces, and what was used."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlencode, urlsplit

import urllib3
from kubernetes import config

from finetune_api.scalars import printable
from finetune_api.usage import USAGE_PATH, UsageReport

from .options import near

Message = dict[str, str]
_CONNECT_SECONDS, _SILENT_SECONDS = 10.0, 300.0
_SHOWN = 400
REACH = "kubectl port-forward -n finetune-system svc/finetune-gateway 8080:80, then --url http://localhost:8080"
"""How to come to a gateway that has no address outside the cluster."""


class ChatError(Exception):
    """Why there is no answer, in one line. `code` is the exit code: 2 for wrong input, 1 for what may be tried again."""

    def __init__(self, text: str, code: int = 1, *, final: bool = False) -> None:
        super().__init__(printable(" ".join(text.split())))
        self.code = code
        self.final = final
        """Whether any other question would be answered the same."""


class Gateway:
    """At `url`, with or without /v1 at its end."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ChatError(f"--url {url}: write http://HOST[:PORT] or https://HOST", 2)
        self._headers = {"Accept": "text/event-stream, application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        timeout = urllib3.Timeout(connect=_CONNECT_SECONDS, read=_SILENT_SECONDS)
        self._pool = urllib3.PoolManager(retries=False, timeout=timeout, ssl_context=ssl.create_default_context())

    def models(self) -> list[dict[str, Any]]:
        """What the caller may ask. Raises ChatError."""
        answer = self._request("GET", "/v1/models")
        _refuse(answer, self.url)
        try:
            return [model for model in json.loads(answer.data)["data"] if isinstance(model["id"], str)]
        except (ValueError, KeyError, TypeError):
            raise ChatError(f"{self.url}/v1/models: this is no list of models; is the address that of the gateway?", 2) from None

    def ask(self, model: str, messages: list[Message], options: dict[str, Any]) -> Iterator[str]:
        """The answer, piece by piece. Raises ChatError."""
        body = json.dumps({"model": model, "messages": messages, "stream": True, **options})
        answer = self._request("POST", "/v1/chat/completions", body)
        try:
            if answer.status == 404:
                raise self._unknown(model, answer)
            _refuse(answer, self.url)
            yield from pieces(_lines(answer))
        except urllib3.exceptions.HTTPError as failure:
            raise ChatError(f"the answer broke off: {failure}") from None
        finally:
            answer.close()

    def usage(self, asked: dict[str, str | int]) -> UsageReport:
        """What was used, as far as the caller may see it. Raises ChatError."""
        answer = self._request("GET", f"{USAGE_PATH}?{urlencode(asked)}")
        if answer.status == 503:
            raise ChatError(f"the gateway cannot tell what was used now ({_told(answer)}); try again")
        _refuse(answer, self.url)
        try:
            return UsageReport.model_validate_json(answer.data)
        except ValueError:
            raise ChatError(f"{self.url}{USAGE_PATH}: this tells no usage; is the address that of the gateway?", 2) from None

    def _request(self, method: str, path: str, body: str | None = None) -> urllib3.BaseHTTPResponse:
        headers = {**self._headers, "Content-Type": "application/json"} if body is not None else self._headers
        try:
            return self._pool.request(
                method, self.url + path, body=body, headers=headers, preload_content=body is None, redirect=False, retries=False
            )
        except urllib3.exceptions.HTTPError as failure:
            raise ChatError(f"{self.url} does not answer ({_cause(failure)}); to reach the gateway: {REACH}", final=True) from None

    def _unknown(self, model: str, answer: urllib3.BaseHTTPResponse) -> ChatError:
        told = _told(answer)
        try:
            known = [str(found["id"]) for found in self.models()]
        except ChatError:
            known = []
        said = told or f"there is no model {model}"
        names_some = set(re.findall(r"[\w./@-]*\w", said)) & set(known)
        return ChatError(said if names_some else said.rstrip(". ") + near(model, known), 2, final=True)


def _refuse(answer: urllib3.BaseHTTPResponse, url: str) -> None:
    """Raises ChatError unless it is a 200."""
    status = answer.status
    if status == 200:
        return
    told = f"({status}{': ' + text if (text := _told(answer)) else ''})"
    if status == 401:
        hint = "give one with --token or FINETUNE_API_KEY, or use a kubeconfig that has a token"
        raise ChatError(f"{url} does not accept the token {told}; {hint}", 2, final=True)
    if status == 403:
        raise ChatError(f"you may not ask this model {told}", 2, final=True)
    if status == 429:
        wait = f"; try again in {answer.headers['Retry-After']} s" if answer.headers.get("Retry-After", "").isdigit() else ""
        raise ChatError(f"the limit of requests or tokens is reached {told}{wait}")
    if status == 503:
        raise ChatError(f"no replica can answer now {told}; finetune models list and kubectl get fte say what is served")
    if status >= 500:
        raise ChatError(f"the gateway or a replica failed {told}")
    if 300 <= status < 400:
        raise ChatError(f"{url} sends to another address ({status}: {answer.headers.get('Location', '')}); give that with --url", 2)
    raise ChatError(f"the request is refused {told}", 2, final=status == 404)


def _told(answer: urllib3.BaseHTTPResponse) -> str:
    """The server's own words, of an OpenAI error or of anything else."""
    try:
        text = answer.data.decode(errors="replace") if answer.data else ""
    except urllib3.exceptions.HTTPError:
        return ""
    try:
        found = json.loads(text)
        error = found.get("error", found)
        return str(error["message"] if isinstance(error, dict) else error)[:_SHOWN]
    except (ValueError, KeyError, AttributeError):
        return "" if text.lstrip().startswith("<") else text.strip()[:_SHOWN]


def _cause(failure: urllib3.exceptions.HTTPError) -> str:
    text = str(failure.__cause__ or failure)
    return text.split(": ", 1)[-1] if isinstance(failure, urllib3.exceptions.NewConnectionError) else text


def _lines(answer: urllib3.BaseHTTPResponse) -> Iterator[str]:
    """As they come, whatever the transfer's encoding."""
    rest = b""
    while chunk := answer.read1(65536):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.rstrip(b"\r").decode(errors="replace") for line in lines)
    if rest:
        yield rest.decode(errors="replace")


def pieces(lines: Iterable[str]) -> Iterator[str]:
    """The text in the events of a streamed chat completion. Raises ChatError where it ends before its end."""
    ended = False
    for line in lines:
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if not data:  # a comment that keeps the connection open, or another field of the event
            continue
        try:
            event = json.loads(data)
            if "error" in event:
                raise ChatError(f"the answer broke off: {event['error'].get('message', event['error'])}")
            for choice in event.get("choices", ())[:1]:
                if text := choice.get("delta", {}).get("content"):
                    yield str(text)
                ended = ended or choice.get("finish_reason") is not None
        except (ValueError, AttributeError, TypeError):
            raise ChatError(f"the answer is none that OpenAI's API knows: {data[:80]}", 2) from None
    if not ended:
        raise ChatError("the answer broke off: the connection was closed before its end")


def gateway_at(url: str | None, token: str | None, kubeconfig: str | None, context: str | None) -> Gateway:
    """The gateway that a command was told of. Raises ChatError."""
    if url is None:
        raise ChatError(f"where is the gateway? Give --url or FINETUNE_GATEWAY_URL; without an address of its own: {REACH}", 2)
    return Gateway(url, token or token_of(kubeconfig, context, url))


def token_of(kubeconfig: str | None, context: str | None, url: str) -> str | None:
    """The bearer token of the kubeconfig, where there is one: for TLS and this machine only, since it is good for the whole cluster."""
    parts = urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        return None
    try:
        connection = config.new_client_from_config(kubeconfig, context=context).configuration
    except config.ConfigException:
        return None
    value = connection.get_api_key_with_prefix("BearerToken", alias="authorization")
    return str(value).removeprefix("Bearer ").strip() if value else None
