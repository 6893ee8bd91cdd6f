"""Files: their bytes go to the bucket as they come, what is known of them into the store."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from finetune_api.scalars import printable

from ..bodies import Refusal
from ..store import files as table
from ..store.files import File
from ..store.keeper import Store
from .blobs import Blobs
from .form import UploadForm
from .requests import FilePage
from .rows import RowCheck

PURPOSE = "fine-tune"
_FILENAME = 255
_AROUND = 65_536
"""Bytes of a form beside its file."""
_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What ids are made of: nothing else is looked up."""
Receive = Callable[[], Awaitable[Any]]


def file_object(file: File) -> dict[str, Any]:
    """As OpenAI has it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "error" if file.problem else "processed",
        "status_details": file.problem or None,
        "expires_at": None,
    }


def results_object(identifier: str, name: str, created_at: int, size: int) -> dict[str, Any]:
    """A job's step metrics as a file."""
    file = File(identifier, "", f"{name}.csv", "fine-tune-results", size, created_at, "", "", 0, "")
    return file_object(file)


def no_file(identifier: str, param: str = "file_id") -> Refusal:
    """There is none, or it is another's: nobody can tell which."""
    return Refusal(404, f"no such file: {identifier[:128]}", code="file_not_found", param=param)


@dataclass(frozen=True)
class Limits:
    """Of what a client sends."""

    bytes: int
    piece_seconds: float
    """How long it may send nothing."""
    seconds: float
    """How long all of it may take."""


class Files:
    """One namespace's at a time. All of it raises StoreAway while the store does not answer."""

    def __init__(self, store: Store, blobs: Blobs, limits: Limits) -> None:
        self._store, self._blobs, self._limits = store, blobs, limits

    async def create(self, namespace: str, headers: Any, receive: Receive) -> File:
        """An upload. Raises Refusal; nothing of it is kept then."""
        form, check = UploadForm(headers.get("content-type", "")), RowCheck()
        async with self._blobs.writer(namespace) as writer:
            async for piece in pieces(form, headers, receive, self._limits):
                check.feed(piece)
                await writer.write(piece)
            check_form(form, "file", {"purpose"})
            check_purpose(form.fields.get("purpose"))
            check.end()
            digest = await writer.finish()
        file = new_file(namespace, plain_name(form.filename or ""), writer.bytes, digest, check)
        await self._store.write(lambda connection: table.add(connection, file))
        return file

    async def find(self, namespace: str, identifier: str, param: str = "file_id") -> File:
        """Raises Refusal (404)."""
        if not _PLAIN.fullmatch(identifier):
            raise no_file(identifier, param)
        found = await self._store.read(lambda connection: table.find(connection, namespace, identifier))
        if found is None:
            raise no_file(identifier, param)
        return found

    async def page(self, namespace: str, asked: FilePage) -> tuple[list[File], bool]:
        """And whether there are more."""
        after = await self.find(namespace, asked.after, "after") if asked.after else None
        ascending, most, purpose = asked.order == "asc", asked.limit + 1, asked.purpose or ""
        found = await self._store.read(lambda connection: table.page(connection, namespace, after, most, purpose, ascending=ascending))
        return found[: asked.limit], len(found) > asked.limit

    async def content(self, file: File) -> AsyncIterator[bytes]:
        """Its bytes."""
        return await self._blobs.read(self._blobs.key(file.namespace, file.digest))

    async def remove(self, file: File) -> None:
        """Its bytes go when no other file of the namespace has the same."""
        last = await self._store.write(lambda connection: table.remove(connection, file))
        if last:
            with contextlib.suppress(Refusal):  # it is not listed any more; what stays is in the administrator's bucket
                await self._blobs.remove(self._blobs.key(file.namespace, file.digest))

    def uri(self, file: File) -> str:
        """As a FineTuneJob names it."""
        return self._blobs.uri(file.namespace, file.digest)


async def pieces(form: UploadForm, headers: Any, receive: Receive, limits: Limits) -> AsyncIterator[bytes]:
    """A form's file as it comes. Raises Refusal: too large, too slow, or broken off."""
    told, size = headers.get("content-length", ""), 0
    if told.isdigit() and int(told) > limits.bytes + _AROUND:
        raise _too_large(limits.bytes)
    more, until = True, time.monotonic() + limits.seconds
    while more:
        try:
            async with asyncio.timeout(min(limits.piece_seconds, until - time.monotonic())):
                message = await receive()
        except TimeoutError:
            slow = f"nothing of the file came for {limits.piece_seconds:g} s, or all of it not within {limits.seconds:g} s"
            raise Refusal(408, slow, code="body_timeout", connection="close") from None
        if message["type"] != "http.request":
            raise Refusal(400, "the file broke off", code="body_incomplete", connection="close")
        for piece in form.feed(message["body"]):
            size += len(piece)
            if size > limits.bytes:
                raise _too_large(limits.bytes)
            yield piece
        more = bool(message.get("more_body"))


def _too_large(most_bytes: int) -> Refusal:
    told = f"the file has more than {most_bytes // 2**20} MB"
    return Refusal(413, told, code="file_too_large", param="file", connection="close")


def check_form(form: UploadForm, file_field: str, fields: set[str]) -> None:
    """Raises Refusal where it is not whole, or has fields beside these."""
    if not form.ended:
        raise Refusal(400, "the form broke off", code="invalid_form")
    if form.filename is None:
        raise Refusal(400, f"you must provide {file_field}", code="missing_required_parameter", param=file_field)
    if unknown := sorted(form.fields.keys() - fields):
        param = unknown[0][:80]
        what = "is not supported here: files stay until they are deleted" if param.startswith("expires_after") else "is not known"
        raise Refusal(400, f"unknown parameter: {param} {what}", code="unknown_parameter", param=param)


def check_purpose(given: str | None) -> None:
    """Raises Refusal for all but fine-tune."""
    if given != PURPOSE:
        told = "you must provide purpose" if given is None else f"purpose {given[:40]!r} is not supported here; write {PURPOSE}"
        raise Refusal(400, told, code="invalid_purpose", param="purpose")


def plain_name(filename: str) -> str:
    """The last part of a path, without what no header or terminal takes."""
    name = filename.replace("\\", "/").rpartition("/")[2][:_FILENAME] or "file.jsonl"
    return "".join(c if c.isprintable() and c != '"' else "_" for c in name)


def new_file(namespace: str, name: str, size: int, digest: str, check: RowCheck) -> File:
    """With an id that tells nothing."""
    identifier, problem = f"file-{secrets.token_hex(12)}", printable(check.problem)
    return File(identifier, namespace, name, PURPOSE, size, int(time.time()), digest, check.form, check.rows, problem)
