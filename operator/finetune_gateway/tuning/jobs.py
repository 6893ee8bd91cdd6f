"""FineTuneJobs as they are seen by the watch, and what of a request stands on them. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from finetune_api import GROUP
from finetune_api.lenient import read_status
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_api.validation import InvalidDocument, parse_spec

from .requests import CreateJob

ANNOTATION_REQUEST = f"openai.{GROUP}/request"
"""On a job that was made by this API: the request, as JSON."""
ANNOTATION_TWIN = f"openai.{GROUP}/twin"
"""Beside it: what its retries are known by, as JSON (`Twin`)."""
JOB_PREFIX = "ftjob-"


class _Meta(msgspec.Struct):
    name: str
    namespace: str
    uid: str
    creationTimestamp: str = ""
    annotations: dict[str, str] | None = None


class _Raw(msgspec.Struct):
    metadata: _Meta
    spec: Any = None
    status: Any = None


_DECODE = msgspec.json.Decoder(_Raw).decode


class Twin(msgspec.Struct, frozen=True):
    """What tells a retry from a second wish."""

    digest: str
    """Of the caller and the body, or of the caller and the Idempotency-Key."""
    slot: int
    """How many of that digest were there before it."""
    body: str
    """Digest of the body."""
    attempt: str
    """Of the one try that made it."""
    retry: bool
    """Whether that try said that it was a retry."""


_READ_TWIN = msgspec.json.Decoder(Twin).decode


@dataclass(frozen=True)
class Job:
    """A FineTuneJob."""

    namespace: str
    name: str
    uid: str
    created: str
    spec: FineTuneJobSpec | None
    """None where it cannot be read."""
    status: FineTuneJobStatus = field(repr=False)
    request: dict[str, Any] = field(default_factory=dict, repr=False)
    """As it was sent; empty for a job that was made otherwise."""
    twin: Twin | None = None

    @property
    def id(self) -> str:
        """As this API calls it. A UID is random: it tells nothing."""
        return JOB_PREFIX + self.uid.replace("-", "")


def base_name(job: Job) -> str:
    """The model as the request named it; of a job that was made otherwise, the last part of its base's uri."""
    if job.request:
        return str(job.request["model"])
    uri = job.spec.model.uri if job.spec is not None else ""
    return re.sub(r"[^A-Za-z0-9._-]", "-", uri.partition("://")[2].partition("@")[0].rpartition("/")[2]) or "unknown"


def model_name(job: Job) -> str:
    """ft:BASE:ORG:SUFFIX:ID."""
    suffix = re.sub(r"[^A-Za-z0-9._-]", "-", str(job.request.get("suffix") or ""))
    return f"ft:{base_name(job)}:{job.namespace}:{suffix}:{short_id(job.uid)}"


def short_id(uid: str) -> str:
    """12 characters of a UID: enough among the jobs of a cluster."""
    return uid.replace("-", "")[:12]


def read_job(raw: bytes) -> Job:
    """A FineTuneJob's JSON. Raises ValueError where it is none."""
    return job_of(_DECODE(raw))


def job_of(found: Any) -> Job:
    """The same of an object that was read already."""
    raw = found if isinstance(found, _Raw) else msgspec.convert(found, _Raw)
    meta = raw.metadata
    notes = meta.annotations or {}
    try:
        spec = parse_spec(raw.spec, strict=False)
    except InvalidDocument:
        spec = None
    return Job(meta.namespace, meta.name, meta.uid, meta.creationTimestamp, spec, read_status(raw.status), _request(notes), _twin(notes))


def _request(notes: dict[str, str]) -> dict[str, Any]:
    """Whoever may edit the job may have written anything: what is no request is none."""
    try:
        return CreateJob.model_validate_json(notes.get(ANNOTATION_REQUEST, "")).model_dump(
            mode="json", exclude_none=True, exclude_unset=True
        )
    except (ValueError, RecursionError):
        return {}


def _twin(notes: dict[str, str]) -> Twin | None:
    try:
        return _READ_TWIN(notes.get(ANNOTATION_TWIN, "").encode())
    except (msgspec.MsgspecError, ValueError):
        return None


class Jobs:
    """All jobs that are known. A reflector's sink. `changed` is told of each that has come or is different."""

    def __init__(self, changed: Callable[[Job], None] = lambda job: None) -> None:
        self._by_uid: dict[str, Job] = {}
        self._by_short: dict[str, str] = {}
        self._in_order: dict[str, list[Job]] = {}
        """By namespace, where nothing has changed since it was asked for."""
        self._changed = changed

    def of(self, namespace: str) -> Sequence[Job]:
        """Newest first."""
        if namespace not in self._in_order:
            found = [job for job in self._by_uid.values() if job.namespace == namespace]
            self._in_order[namespace] = sorted(found, key=lambda job: (job.created, job.uid), reverse=True)
        return self._in_order[namespace]

    def find(self, namespace: str, identifier: str) -> Job | None:
        """By the id of this API; None for what is not there, or is another namespace's."""
        hexadecimal = identifier.removeprefix(JOB_PREFIX)
        if not identifier.startswith(JOB_PREFIX) or len(hexadecimal) != 32:
            return None
        parts = (hexadecimal[:8], hexadecimal[8:12], hexadecimal[12:16], hexadecimal[16:20], hexadecimal[20:])
        job = self._by_uid.get("-".join(parts))
        return job if job is not None and job.namespace == namespace else None

    def knows(self, uid: str) -> bool:
        """Whether it is there."""
        return uid in self._by_uid

    def named(self, model: str) -> Job | None:
        """The job whose result has this name, whoever may use it."""
        job = self._by_uid.get(self._by_short.get(model.rpartition(":")[2], ""))
        return job if job is not None and model_name(job) == model else None

    def replace(self, values: Iterable[Job], namespace: str = "") -> None:
        """These, and no others, are there (of a namespace, or of all)."""
        came = {job.uid: job for job in values}
        kept = {uid: job for uid, job in self._by_uid.items() if namespace and job.namespace != namespace}
        self._by_uid = {**kept, **came}
        self._in_order.clear()
        self._by_short = {short_id(uid): uid for uid in self._by_uid}
        for job in came.values():
            self._changed(job)

    def put(self, value: Job) -> None:
        """One has come, or is different now."""
        self._by_uid[value.uid] = value
        self._in_order.pop(value.namespace, None)
        self._by_short[short_id(value.uid)] = value.uid
        self._changed(value)

    def learn(self, value: Job) -> None:
        """One that was made just now. What the watch told of it already is newer."""
        if value.uid not in self._by_uid:
            self.put(value)

    def drop(self, value: Job) -> None:
        """One is gone."""
        self._by_uid.pop(value.uid, None)
        self._in_order.pop(value.namespace, None)
        self._by_short.pop(short_id(value.uid), None)

    def refuse(self, status: int, why: str) -> None:
        """Nothing new can be known: what was known stays, and the gateway is not ready."""
