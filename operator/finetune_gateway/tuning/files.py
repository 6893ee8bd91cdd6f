"""Files: their bytes go to the bucket as they come, what is known of them into the store."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from finetune_api.scalars import printable

from ..bodies import Refusal
from ..store import files as table
from ..store.files import File
from ..store.keeper import Store, StoreAway
from .blobs import Blobs
from .form import UploadForm
from .requests import FilePage
from .rows import RowCheck

PURPOSE = "fine-tune"
_FILENAME = 255
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


def away() -> Refusal:
    """The store does not answer."""
    return Refusal(503, "the store of the gateway does not answer now", code="store_unavailable", kind="server_error", retry_after="5")


class Files:
    """One namespace's at a time."""

    def __init__(self, store: Store, blobs: Blobs, *, most_bytes: int, piece_seconds: float) -> None:
        """`piece_seconds`: how long a client may send nothing."""
        self._store, self._blobs, self._most, self._patience = store, blobs, most_bytes, piece_seconds

    async def create(self, namespace: str, headers: Any, receive: Receive) -> File:
        """An upload. Raises Refusal; nothing of it is kept then."""
        told = headers.get("content-length", "")
        if told.isdigit() and int(told) > self._most + 65_536:
            raise self._too_large()
        form, check, writer = UploadForm(headers.get("content-type", "")), RowCheck(), self._blobs.writer(namespace)
        try:
            async for data in self._body(receive):
                for piece in form.feed(data):
                    if writer.bytes + len(piece) > self._most:
                        raise self._too_large()
                    check.feed(piece)
                    await writer.write(piece)
            _check_form(form)
            check.end()
            digest = await writer.finish()
        except BaseException:
            await asyncio.shield(writer.abort())
            raise
        name = (form.filename or "").replace("\\", "/").rpartition("/")[2][:_FILENAME] or "file.jsonl"
        name = "".join(c if c.isprintable() and c != '"' else "_" for c in name)
        file = File(
            f"file-{secrets.token_hex(12)}",
            namespace,
            name,
            PURPOSE,
            writer.bytes,
            int(time.time()),
            digest,
            check.form,
            check.rows,
            printable(check.problem),
        )
        try:
            await self._store.write(lambda connection: table.add(connection, file))
        except StoreAway:
            raise away() from None
        return file

    async def _body(self, receive: Receive) -> AsyncIterator[bytes]:
        while True:
            try:
                async with asyncio.timeout(self._patience):
                    message = await receive()
            except TimeoutError:
                told = f"nothing of the file came for {self._patience:g} s"
                raise Refusal(408, told, code="body_timeout", connection="close") from None
            if message["type"] != "http.request":
                raise Refusal(400, "the file broke off", code="body_incomplete", connection="close")
            yield message["body"]
            if not message.get("more_body"):
                return

    def _too_large(self) -> Refusal:
        told = f"the file has more than {self._most // 2**20} MB"
        return Refusal(413, told, code="file_too_large", param="file", connection="close")

    async def find(self, namespace: str, identifier: str, param: str = "file_id") -> File:
        """Raises Refusal (404)."""
        if not _PLAIN.fullmatch(identifier):
            raise no_file(identifier, param)
        try:
            found = await self._store.read(lambda connection: table.find(connection, namespace, identifier))
        except StoreAway:
            raise away() from None
        if found is None:
            raise no_file(identifier, param)
        return found

    async def page(self, namespace: str, asked: FilePage) -> tuple[list[File], bool]:
        """And whether there are more."""
        after = await self.find(namespace, asked.after, "after") if asked.after else None
        ascending, most, purpose = asked.order == "asc", asked.limit + 1, asked.purpose or ""
        try:
            found = await self._store.read(lambda connection: table.page(connection, namespace, after, most, purpose, ascending=ascending))
        except StoreAway:
            raise away() from None
        return found[: asked.limit], len(found) > asked.limit

    async def content(self, file: File) -> AsyncIterator[bytes]:
        """Its bytes."""
        return await self._blobs.read(file.namespace, file.digest)

    async def remove(self, file: File) -> None:
        """Its bytes go when no other file of the namespace has the same."""
        try:
            last = await self._store.write(lambda connection: table.remove(connection, file))
        except StoreAway:
            raise away() from None
        if last:
            with contextlib.suppress(Refusal):  # it is not listed any more; what stays is in the administrator's bucket
                await self._blobs.remove(file.namespace, file.digest)

    def uri(self, file: File) -> str:
        """As a FineTuneJob names it."""
        return self._blobs.uri(file.namespace, file.digest)


def _check_form(form: UploadForm) -> None:
    if not form.ended:
        raise Refusal(400, "the form broke off", code="invalid_form")
    if form.filename is None:
        raise Refusal(400, "you must provide file", code="missing_required_parameter", param="file")
    if unknown := sorted(form.fields.keys() - {"purpose"}):
        param = unknown[0][:80]
        what = "is not supported here: files stay until they are deleted" if param.startswith("expires_after") else "is not known"
        raise Refusal(400, f"unknown parameter: {param} {what}", code="unknown_parameter", param=param)
    if form.fields.get("purpose") != PURPOSE:
        given = form.fields.get("purpose")
        told = "you must provide purpose" if given is None else f"purpose {given[:40]!r} is not supported here; write {PURPOSE}"
        raise Refusal(400, told, code="invalid_purpose", param="purpose")
