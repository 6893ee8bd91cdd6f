"""Files' bytes in a bucket, by namespace and digest: PREFIX/NAMESPACE/sha256-DIGEST.jsonl. In pieces: nothing is ever whole in memory.

boto3 blocks: each call is in a thread. Knows nothing of files' names and purposes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from finetune_api.uris import parse_uri

from ..bodies import Refusal

log = logging.getLogger("finetune.gateway")
T = TypeVar("T")
PART = 5 * 2**20
"""Bytes of a part, S3's least: an upload holds one that comes and one that goes."""
_READ = 256 * 2**10
_THREADS = 8
_FULL = frozenset(
    ("QuotaExceeded", "XMinioStorageFull", "StorageFull", "InsufficientCapacity", "InsufficientStorage", "ServiceQuotaExceeded")
)


def _refusal(failure: Exception) -> Refusal:
    code = str(failure.response.get("Error", {}).get("Code", "")) if isinstance(failure, ClientError) else type(failure).__name__
    if code in _FULL:
        told = "the storage of files is full: delete files, or ask an administrator for more"
        return Refusal(403, told, code="insufficient_quota", kind="insufficient_quota", x_should_retry="false")
    log.warning("the storage of files does not do what it is asked for: %s", code)
    return Refusal(503, "the storage of files does not answer now", code="storage_unavailable", kind="server_error", retry_after="5")


class Blobs:
    """A bucket, by `s3://BUCKET/PREFIX`; keys come from the environment, as the AWS SDKs read them."""

    def __init__(self, uri: str, endpoint: str = "") -> None:
        """`endpoint`: address of an S3-compatible server; empty: AWS, or AWS_ENDPOINT_URL_S3."""
        import boto3

        place = parse_uri(uri)
        self._bucket, self._prefix = place.name, place.path
        settings = Config(
            connect_timeout=5,
            read_timeout=60,
            retries={"total_max_attempts": 3},
            s3={"addressing_style": "path"} if endpoint else None,
            max_pool_connections=_THREADS,
        )
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        self._client: Any = boto3.client("s3", endpoint_url=endpoint or None, region_name=region, config=settings)
        self._threads = ThreadPoolExecutor(_THREADS, "files")

    def key(self, namespace: str, digest: str) -> str:
        """Of the object."""
        return f"{self._prefix}/{namespace}/sha256-{digest}.jsonl"

    def uri(self, namespace: str, digest: str) -> str:
        """As a FineTuneJob names it."""
        return f"s3://{self._bucket}/{self.key(namespace, digest)}"

    async def call(self, what: Callable[[Any], T]) -> T:
        """Do it with the client, in a thread. Raises Refusal: full (403), or away (503)."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, what, self._client)
        except (ClientError, BotoCoreError, OSError) as failure:
            raise _refusal(failure) from None

    def writer(self, namespace: str) -> Writer:
        """For one object."""
        return Writer(self, self._bucket, f"{self._prefix}/{namespace}", lambda digest: self.key(namespace, digest))

    def part_key(self, namespace: str, upload: str, part: str) -> str:
        """Of a part of a file that is not whole yet."""
        return f"{self._prefix}/{namespace}/.uploads/{upload}/{part}"

    def part_writer(self, namespace: str, upload: str, part: str) -> Writer:
        """For one part."""
        return Writer(self, self._bucket, f"{self._prefix}/{namespace}", lambda _: self.part_key(namespace, upload, part))

    async def read(self, key: str) -> AsyncIterator[bytes]:
        """The bytes of an object. Raises Refusal."""
        found = await self.call(lambda client: client.get_object(Bucket=self._bucket, Key=key))
        body = found["Body"]

        async def pieces() -> AsyncIterator[bytes]:
            try:
                while piece := await self.call(lambda _: body.read(_READ)):
                    yield piece
            finally:
                body.close()

        return pieces()

    async def remove(self, *keys: str) -> None:
        """Those that are not there are no error. Raises Refusal."""
        for key in keys:
            await self.call(lambda client, key=key: client.delete_object(Bucket=self._bucket, Key=key))  # type: ignore[misc]

    def close(self) -> None:
        """No more calls."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Writer:
    """One object on its way: nothing is to be seen of it before `finish`, and nothing is left of it where the block fails."""

    def __init__(self, blobs: Blobs, bucket: str, folder: str, key: Callable[[str], str]) -> None:
        self._blobs, self._bucket, self._key = blobs, bucket, key
        self._draft = f"{folder}/.uploads/{uuid.uuid4().hex}"
        self._buffer = bytearray()
        self._digest = hashlib.sha256()
        self._upload = ""
        self._parts: list[dict[str, Any]] = []
        self._sending: asyncio.Task[None] | None = None
        self.bytes = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            await asyncio.shield(self.abort())

    async def write(self, data: bytes) -> None:
        """The next bytes. Raises Refusal."""
        self._digest.update(data)
        self.bytes += len(data)
        self._buffer += data
        while len(self._buffer) >= PART:
            part = bytes(self._buffer[:PART])
            del self._buffer[:PART]
            await self._sent()
            self._sending = asyncio.create_task(self._send(part))

    async def _sent(self) -> None:
        """Until the part that goes is there."""
        if (sending := self._sending) is not None:
            await sending
            self._sending = None

    async def _send(self, part: bytes) -> None:
        where = {"Bucket": self._bucket, "Key": self._draft}
        if not self._upload:
            self._upload = (await self._blobs.call(lambda client: client.create_multipart_upload(**where)))["UploadId"]
        number, upload = len(self._parts) + 1, self._upload
        sent = await self._blobs.call(lambda client: client.upload_part(**where, UploadId=upload, PartNumber=number, Body=part))
        self._parts.append({"ETag": sent["ETag"], "PartNumber": number})

    async def finish(self) -> str:
        """SHA-256 of its bytes, by which it can be read now. Raises Refusal."""
        await self._sent()
        digest, rest = self._digest.hexdigest(), bytes(self._buffer)
        target = {"Bucket": self._bucket, "Key": self._key(digest)}
        if not self._upload:
            await self._blobs.call(lambda client: client.put_object(**target, Body=rest))
            return digest
        if rest:
            await self._send(rest)
        draft = {"Bucket": self._bucket, "Key": self._draft}
        upload, parts = self._upload, self._parts
        await self._blobs.call(lambda client: client.complete_multipart_upload(**draft, UploadId=upload, MultipartUpload={"Parts": parts}))
        self._upload = ""
        try:
            await self._blobs.call(lambda client: client.copy_object(**target, CopySource=draft))
        finally:
            await self._blobs.call(lambda client: client.delete_object(**draft))
        return digest

    async def abort(self) -> None:
        """Leave nothing behind, as far as the storage answers."""
        with contextlib.suppress(Refusal):
            await self._sent()
        if self._upload:
            where, upload = {"Bucket": self._bucket, "Key": self._draft}, self._upload
            self._upload = ""
            with contextlib.suppress(Refusal):
                await self._blobs.call(lambda client: client.abort_multipart_upload(**where, UploadId=upload))
