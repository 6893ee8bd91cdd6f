"""Files that come in parts: each part an object of its own, put together when the client says that all are there."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from dataclasses import replace
from typing import Any

from ..bodies import Refusal
from ..store import uploads as table
from ..store.files import File
from ..store.keeper import Store
from ..store.uploads import CANCELLED, COMPLETED, PENDING, Upload
from .blobs import Blobs
from .files import Files, Limits, Receive, check_form, check_purpose, file_object, new_file, pieces, plain_name
from .form import UploadForm
from .requests import CompleteUpload, CreateUpload
from .rows import RowCheck

PART_BYTES = 64 * 2**20
"""Largest part, as OpenAI has it."""
HOUR = 3600
"""How long an upload may take."""


def upload_object(upload: Upload, file: File | None = None) -> dict[str, Any]:
    """As OpenAI has it."""
    expired = upload.status == PENDING and time.time() > upload.created_at + HOUR
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": upload.created_at,
        "expires_at": upload.created_at + HOUR,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": "expired" if expired else upload.status,
        "file": file_object(file) if file is not None else None,
    }


class Uploads:
    """One namespace's at a time. All of it raises StoreAway while the store does not answer."""

    def __init__(self, store: Store, blobs: Blobs, files: Files, limits: Limits) -> None:
        self._store, self._blobs, self._files = store, blobs, files
        self._most, self._of_part = limits.bytes, replace(limits, bytes=PART_BYTES)

    async def create(self, namespace: str, asked: CreateUpload) -> Upload:
        """A new one; what was left behind of others goes. Raises Refusal."""
        check_purpose(asked.purpose)
        if asked.bytes > self._most:
            raise Refusal(400, f"bytes is more than {self._most}", code="file_too_large", param="bytes")
        now = int(time.time())
        name = plain_name(asked.filename)
        upload = Upload(f"upload_{secrets.token_hex(12)}", namespace, name, asked.purpose, asked.bytes, now, PENDING, "")
        await self._store.write(lambda connection: table.add(connection, upload))
        for old in await self._store.read(lambda connection: table.stale(connection, namespace, now - HOUR)):
            await self._end(old, CANCELLED)
        return upload

    async def find(self, namespace: str, identifier: str) -> Upload:
        """Raises Refusal (404)."""
        found = await self._store.read(lambda connection: table.find(connection, namespace, identifier))
        if found is None:
            raise Refusal(404, f"no such upload: {identifier[:128]}", code="upload_not_found", param="upload_id")
        return found

    async def add_part(self, upload: Upload, headers: Any, receive: Receive) -> dict[str, Any]:
        """A part. Raises Refusal; nothing of it is kept then."""
        _check_pending(upload)
        part = f"part_{secrets.token_hex(12)}"
        form = UploadForm(headers.get("content-type", ""), file_field="data")
        async with self._blobs.part_writer(upload.namespace, upload.id, part) as writer:
            async for piece in pieces(form, headers, receive, self._of_part):
                await writer.write(piece)
            check_form(form, "data", set())
            await writer.finish()
        await self._store.write(lambda connection: table.add_part(connection, upload, part, writer.bytes))
        return {"id": part, "object": "upload.part", "created_at": int(time.time()), "upload_id": upload.id}

    async def complete(self, upload: Upload, asked: CompleteUpload) -> tuple[Upload, File]:
        """The file; of one that is complete already, the same file once more. Raises Refusal."""
        if upload.status == COMPLETED:
            return upload, await self._files.find(upload.namespace, upload.file)
        _check_pending(upload)
        known = await self._store.read(lambda connection: table.parts(connection, upload))
        self._check_parts(upload, asked, known)
        file = await self._put_together(upload, asked)
        if not await self._store.write(lambda connection: table.end(connection, upload, COMPLETED, file)):
            return await self._ended_meanwhile(upload)
        await self._drop(upload, known)
        return await self.find(upload.namespace, upload.id), file

    async def _ended_meanwhile(self, upload: Upload) -> tuple[Upload, File]:
        found = await self.find(upload.namespace, upload.id)
        if found.status != COMPLETED:
            _check_pending(found)
        return found, await self._files.find(found.namespace, found.file)

    def _check_parts(self, upload: Upload, asked: CompleteUpload, known: dict[str, int]) -> None:
        missing = next((part for part in asked.part_ids if part not in known), None)
        if missing is not None:
            raise Refusal(400, f"no such part: {missing}", code="part_not_found", param="part_ids")
        size = sum(known[part] for part in asked.part_ids)
        if size != upload.bytes:
            told = f"the parts have {size} bytes together, and the upload was announced with {upload.bytes}"
            raise Refusal(400, told, code="invalid_value", param="part_ids")

    async def _put_together(self, upload: Upload, asked: CompleteUpload) -> File:
        check, summed = RowCheck(), hashlib.md5(usedforsecurity=False)
        async with self._blobs.writer(upload.namespace) as writer:
            for part in asked.part_ids:
                async for piece in await self._blobs.read(self._blobs.part_key(upload.namespace, upload.id, part)):
                    check.feed(piece)
                    summed.update(piece)
                    await writer.write(piece)
            if asked.md5 is not None and asked.md5.lower() != summed.hexdigest():
                told = f"md5 is {asked.md5}, and that of the parts is {summed.hexdigest()}: send what is broken again"
                raise Refusal(400, told, code="invalid_md5", param="md5")
            check.end()
            digest = await writer.finish()
        return new_file(upload.namespace, upload.filename, writer.bytes, digest, check)

    async def cancel(self, upload: Upload) -> Upload:
        """Raises Refusal where it is complete."""
        if upload.status != CANCELLED:
            _check_pending(upload)
            await self._end(upload, CANCELLED)
        return await self.find(upload.namespace, upload.id)

    async def _end(self, upload: Upload, status: str) -> None:
        known = await self._store.read(lambda connection: table.parts(connection, upload))
        if await self._store.write(lambda connection: table.end(connection, upload, status)):
            await self._drop(upload, known)

    async def _drop(self, upload: Upload, parts: dict[str, int]) -> None:
        with contextlib.suppress(Refusal):  # nobody reads them any more; what stays is in the administrator's bucket
            await self._blobs.remove(*(self._blobs.part_key(upload.namespace, upload.id, part) for part in parts))


def _check_pending(upload: Upload) -> None:
    status = upload_object(upload)["status"]
    if status != PENDING:
        raise Refusal(400, f"{upload.id} is {status}", code="invalid_upload_state", param="upload_id")
