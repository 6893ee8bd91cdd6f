"""An S3 bucket as a target: claimed, uploaded unseen, completed, read back; another job's result is never overwritten.

S3 renames nothing, so that a result comes there in three steps. The record of the job is created only where there is none
(conditional writes, https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html); all files are uploaded as
multipart uploads, which nobody sees before they are completed; the list of digests comes last, and what has none is not whole.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_api.contract import LINEAGE, SUMS
from finetune_api.spec import PublishTarget
from finetune_api.status import Artifact
from finetune_api.uris import URI, parse_uri

from ..job.context import Context
from ..job.files import parse_digests
from ..process.errors import InfrastructureError, StageError, UserError
from ..remote.retry import with_retries
from ..remote.s3 import error_code, objects_below, s3_client, s3_host
from .bundle import Held, artifact, artifact_of, files, refuse_foreign

_PART = 64 * 2**20
"""Bytes of a part: at most 10,000 parts make 625 GiB a file."""
_CHUNK = 2**20
_RACES = ("PreconditionFailed", "ConditionalRequestConflict")


def check_bucket(context: Context, target: PublishTarget, field: str) -> Held | None:
    """This job's result where the bucket holds it already. Writes nothing that anybody sees.

    Raises UserError or SourceUnavailable when `publish_to_bucket` would fail.
    """
    return with_retries(lambda: _Place(context, target, field).check(), s3_host(target.s3_endpoint), _refused(target))


def publish_to_bucket(context: Context, target: PublishTarget, field: str, bundle: Path) -> Artifact:
    """Claim the prefix, upload, complete, read back. The same job may replace what it published; nobody else."""
    try:
        with_retries(lambda: _Place(context, target, field).publish(bundle), s3_host(target.s3_endpoint), _refused(target))
    except StageError:
        raise
    except Exception as failure:
        if (code := error_code(failure)) == "":
            raise
        raise InfrastructureError("PublishFailed", f"the bucket did not take it: {code}") from failure
    return artifact(bundle, target.address)


def _refused(target: PublishTarget) -> Callable[[str], UserError]:
    """What it means that S3 refuses."""
    bucket = parse_uri(target.address).name
    return lambda why: UserError("PublishRefused", f"{why}: the keys may not read and write there, or there is no bucket {bucket}")


class _Place:
    """A prefix of a bucket, as one job sees it."""

    def __init__(self, context: Context, target: PublishTarget, field: str) -> None:
        self.context, self.shown = context, target.address
        self.uri: URI = parse_uri(target.address)
        self.client: Any = s3_client(context, field, target.s3_endpoint)

    def check(self) -> Held | None:
        if (record := self._owner()) is not None and (sums := self._read(SUMS)) is not None:
            size = sum(size for _, size in objects_below(self.client, self.uri))
            return Held(artifact_of(sums, size, self.shown), record)
        upload = self.client.create_multipart_upload(**self._at(LINEAGE))  # whether it may be written
        self.client.abort_multipart_upload(**self._at(LINEAGE), UploadId=upload["UploadId"])
        return None

    def publish(self, bundle: Path) -> None:
        names = [str(file.relative_to(bundle)) for file in files(bundle)]
        sums = (bundle / SUMS).read_bytes()
        self._claim((bundle / LINEAGE).read_bytes())
        if self._read(SUMS) != sums or self._damaged(sums) is not None:
            self._abort_uploads()
            self.client.delete_object(**self._at(SUMS))  # until all of the new one is there it is not whole
            uploads = {name: self._upload(name, bundle / name) for name in names if name != LINEAGE}
            for name, completed in uploads.items():
                self.client.complete_multipart_upload(**self._at(name), **completed)
            for name, _ in list(objects_below(self.client, self.uri)):
                if name not in names:
                    self.client.delete_object(**self._at(name))  # of what was published before
            if (damaged := self._damaged(sums)) is not None:
                raise InfrastructureError("VerificationFailed", f"{damaged}: what was written differs from what was sent")
            self.client.put_object(**self._at(SUMS), Body=sums)

    def _at(self, name: str) -> dict[str, str]:
        return {"Bucket": self.uri.name, "Key": f"{self.uri.path}/{name}"}

    def _read(self, name: str) -> bytes | None:
        try:
            return bytes(self.client.get_object(**self._at(name))["Body"].read())
        except self.client.exceptions.ClientError as failure:
            if error_code(failure) == "NoSuchKey":
                return None
            raise

    def _owner(self) -> bytes | None:
        """The record of this job's result, None where the place is free. Raises UserError where it holds anything else."""
        record = self._read(LINEAGE)
        if record is None and next(objects_below(self.client, self.uri), None) is None:
            return None
        refuse_foreign(record, self.context, "prefix")
        return record

    def _claim(self, record: bytes) -> None:
        """Put this job's record there, unless another came first."""
        for _ in range(2):  # where another came between the look and the write, who it was is looked at
            held = self._owner()
            if held == record:
                return
            try:
                self.client.put_object(**self._at(LINEAGE), Body=record, **({"IfNoneMatch": "*"} if held is None else {}))
                return
            except self.client.exceptions.ClientError as failure:
                if error_code(failure) not in _RACES:
                    raise
        raise InfrastructureError("TargetContended", "another writes to the same prefix")

    def _abort_uploads(self) -> None:
        """What a try that was killed has begun is not kept, nor paid for."""
        pages = self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.uri.name, Prefix=f"{self.uri.path}/")
        for upload in (upload for page in pages for upload in page.get("Uploads", ())):
            with contextlib.suppress(self.client.exceptions.ClientError):  # it is gone
                self.client.abort_multipart_upload(Bucket=self.uri.name, Key=upload["Key"], UploadId=upload["UploadId"])

    def _upload(self, name: str, file: Path) -> dict[str, Any]:
        """All parts of a file; what completes it."""
        upload = self.client.create_multipart_upload(**self._at(name))["UploadId"]
        parts: list[dict[str, Any]] = []
        with file.open("rb") as stream:
            while (body := stream.read(_PART)) or not parts:
                number = len(parts) + 1
                answer = self.client.upload_part(**self._at(name), UploadId=upload, PartNumber=number, Body=body)
                parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        return {"UploadId": upload, "MultipartUpload": {"Parts": parts}}

    def _damaged(self, sums: bytes) -> str | None:
        """Read back what was written: the first object that is not what was sent."""
        for name, digest in parse_digests(sums.decode()).items():
            written = hashlib.sha256()
            try:
                for chunk in self.client.get_object(**self._at(name))["Body"].iter_chunks(_CHUNK):
                    written.update(chunk)
            except self.client.exceptions.NoSuchKey:
                return name
            if written.hexdigest() != digest:
                return name
        return None
