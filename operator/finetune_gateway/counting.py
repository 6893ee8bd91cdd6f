"""What is counted: tokens of an answer, requests of a canary's two versions, limits of a key. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

import msgspec

from finetune_api.serving import ArmTraffic, CanaryTraffic

from .choosing import Target

_USAGE = re.compile(rb'"usage":\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
_LONGEST_USAGE = 1024
_BYTES_PER_TOKEN = 4


class Usage(msgspec.Struct):
    """Tokens of a request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


_DECODE = msgspec.json.Decoder(Usage).decode


class Meter:
    """Reads an answer as it passes: its `usage` where it tells one, else the events of a stream stand for tokens."""

    __slots__ = ("_events", "_found", "_stream", "_tail", "size")

    def __init__(self, *, stream: bool) -> None:
        self._stream, self._tail, self._found, self._events = stream, b"", b"", 0
        self.size = 0

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the answer."""
        self.size += len(chunk)
        if self._stream:
            self._events += chunk.count(b"data: {")
        window = self._tail + chunk
        # within a string of the answer its quotes would be escaped
        if b'"usage":' in window and (matches := _USAGE.findall(window)):
            self._found = matches[-1]
        self._tail = window[-_LONGEST_USAGE:]

    def usage(self, prompt_bytes: int) -> tuple[Usage, bool]:
        """The tokens, and whether the answer told them; else an estimate."""
        if self._found:
            try:
                found = _DECODE(self._found)
                return Usage(max(0, found.prompt_tokens), max(0, found.completion_tokens)), True
            except msgspec.MsgspecError:
                pass
        completion = self._events if self._stream else self.size // _BYTES_PER_TOKEN
        return Usage(prompt_bytes // _BYTES_PER_TOKEN, completion), False


class CanaryBoard:
    """What the two versions of each canary answered since its step began."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str], CanaryTraffic] = {}

    def count(self, target: Target, seconds: float, *, failed: bool) -> None:
        """One request, or one try that failed. `seconds`: until its first byte."""
        canary = target.canary
        if canary is None or not canary.since:
            return
        key = (*target.endpoint, target.model)
        known = self._known.get(key)
        if known is None or (known.version, known.since) != (canary.version, canary.since):
            if known is not None and known.since > canary.since:  # it began under an earlier step
                return
            namespace, endpoint, model = key
            known = CanaryTraffic(namespace=namespace, endpoint=endpoint, model=model, version=canary.version, since=canary.since)
        arm = "new" if target.is_new else "old"
        counted: ArmTraffic = getattr(known, arm).with_request(seconds, failed=failed)
        self._known[key] = known.model_copy(update={arm: counted})

    def traffic(self, present: Collection[tuple[str, str]]) -> list[CanaryTraffic]:
        """All counts of endpoints that are there; those of others are forgotten."""
        self._known = {key: value for key, value in self._known.items() if key[:2] in present}
        return list(self._known.values())


@dataclass
class _Bucket:
    left: float
    at: float


class Limits:
    """Requests and tokens a minute, by key: a bucket each that fills evenly and holds a minute's worth."""

    def __init__(self, monotonic: Callable[[], float], share: float = 1.0) -> None:
        """`share`: of each limit, which this gateway lets through."""
        self._monotonic, self._share = monotonic, share
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def _bucket(self, key: str, what: str, limit: int) -> tuple[_Bucket, float]:
        most, now = max(1.0, limit * self._share), self._monotonic()
        bucket = self._buckets.setdefault((key, what), _Bucket(most, now))
        bucket.left = min(most, bucket.left + (now - bucket.at) * most / 60)
        bucket.at = now
        return bucket, most

    def admit(self, key: str, requests: int | None, tokens: int | None) -> tuple[str, float] | None:
        """None, and the request is counted; or what is used up, `requests` or `tokens`, and the seconds until there is some again.

        Tokens are known afterwards: a request is let through while there are any left, and the next ones wait for what it took.
        """
        if tokens is not None:
            bucket, most = self._bucket(key, "tokens", tokens)
            if bucket.left <= 0:
                return "tokens", (1 - bucket.left) * 60 / most
        if requests is not None:
            bucket, most = self._bucket(key, "requests", requests)
            if bucket.left < 1:
                return "requests", (1 - bucket.left) * 60 / most
            bucket.left -= 1
        return None

    def spend(self, key: str, limit: int | None, tokens: int) -> None:
        """Tokens that an answer took."""
        if limit is not None:
            self._bucket(key, "tokens", limit)[0].left -= tokens

    def forget(self, present: Collection[str]) -> None:
        """Keep only these keys."""
        self._buckets = {known: bucket for known, bucket in self._buckets.items() if known[0] in present}
