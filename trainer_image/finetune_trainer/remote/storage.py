"""Where a FineTunedModel keeps its versions: a folder of a volume, or a prefix of a bucket. Knows nothing of what lies there.

Names are paths below `spec.storage`. What is written comes there whole: files by a rename, objects as S3 has it.
"""

from __future__ import annotations

import hashlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from finetune_api.contract import SUMS, ModelStorage
from finetune_api.uris import URI, parse_uri

from ..job.context import Context, inside
from ..job.files import write_bytes
from ..process.errors import InfrastructureError, UserError
from .retry import with_retries
from .s3 import client_of, error_code, objects_below, s3_host

T = TypeVar("T")
_CHUNK = 4 << 20
_TRIES = 10
"""Of a change that others come before."""
_CLAIMED = ("PreconditionFailed", "ConditionalRequestConflict")


class Storage(ABC):
    """The folder or prefix. Every verb raises UserError where it is refused, InfrastructureError where it fails."""

    uri: str

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names of files and folders right below a folder; none where there is no such folder."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A file's content, or None where there is none."""

    @abstractmethod
    def chunks(self, name: str) -> Iterator[bytes]:
        """A file's content, piece by piece. Raises FileNotFoundError where there is none."""

    @abstractmethod
    def write(self, name: str, body: bytes) -> None:
        """Put a file in the place of what is there."""

    @abstractmethod
    def change(self, name: str, make: Callable[[bytes | None], bytes | None]) -> None:
        """Put what `make` makes of a file (None where there is none) in its place, unless it makes None. In a bucket on condition that
        nobody else changed it meanwhile, else again.
        """

    @abstractmethod
    def claim(self, folder: str, name: str, body: bytes) -> bool:
        """Make a folder that holds this one file. False where there is one with anything in it: of two at once one succeeds."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove a folder with all that is in it, or a file."""

    @abstractmethod
    def fetch(self, folder: str, into: Path, patterns: Sequence[str]) -> Path:
        """A local folder with the files of a folder (not of those below it) whose names match: on a volume the folder itself."""


def open_storage(model: ModelStorage, mounts: Mapping[str, str], keys: str | None) -> Storage:
    """The storage of a FineTunedModel. `mounts`: folder of each claim, by `pvc://name`; `keys`: the folder of an s3:// storage's keys."""
    uri = parse_uri(model.storage)
    if uri.scheme == "s3":
        return _Bucket(model, uri, keys)
    root = mounts.get(f"pvc://{uri.name}")
    if root is None:
        raise UserError("SourceNotMounted", f"{model.storage}: the claim {uri.name} is not mounted here")
    return _Volume(model.storage, root, uri)


def storage_of(context: Context, name: str, mounts: Mapping[str, str]) -> Storage:
    """The storage of a FineTunedModel that the job refers to, with the claims of this stage: `sources` to read, `targets` to write."""
    model = context.job.models.get(name)
    if model is None:
        raise UserError("ModelNotFound", f"FineTunedModel {name} is not known here; name one of the job's namespace")
    return open_storage(model, mounts, context.job.secrets.get(f"model-{name}"))


class _Volume(Storage):
    def __init__(self, shown: str, root: str, uri: URI) -> None:
        self.uri, self._root, self._base = shown, root, uri

    def names(self, folder: str) -> list[str]:
        with self._told():
            path = self._at(folder)
            return sorted(p.name for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else []

    def read(self, name: str) -> bytes | None:
        with self._told():
            path = self._at(name)
            return path.read_bytes() if path.is_file() else None

    def chunks(self, name: str) -> Iterator[bytes]:
        path = self._at(name)
        if not path.is_file():
            raise FileNotFoundError(name)
        with self._told(), path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk

    def write(self, name: str, body: bytes) -> None:
        with self._told():
            path = self._at(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, body)

    def change(self, name: str, make: Callable[[bytes | None], bytes | None]) -> None:
        body = make(self.read(name))
        if body is not None:
            self.write(name, body)

    def claim(self, folder: str, name: str, body: bytes) -> bool:
        with self._told():
            target = self._at(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f".{target.name}.{hashlib.sha256(body).hexdigest()[:8]}")  # a try that was killed left the same
            aside.mkdir(exist_ok=True)
            (aside / name).write_bytes(body)
            try:
                aside.rename(target)  # which no file system does onto a folder that holds something
            except OSError:
                shutil.rmtree(aside, ignore_errors=True)
                if not target.exists():
                    raise
                return False
            return True

    def remove(self, path: str) -> None:
        with self._told():
            target = self._at(path)
            aside = target.with_name(f".{target.name}.removed")
            shutil.rmtree(aside, ignore_errors=True)  # of a try that was killed
            if target.is_dir():
                target.rename(aside)
                shutil.rmtree(aside)
            else:
                target.unlink(missing_ok=True)

    def fetch(self, folder: str, into: Path, patterns: Sequence[str]) -> Path:
        return self._at(folder)

    def _at(self, name: str) -> Path:
        return inside(self._root, URI("pvc", self._base.name, f"{self._base.path}/{name}"))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as failure:
            raise InfrastructureError("StorageFailed", f"{self.uri}: {failure.strerror or failure}") from failure


class _Bucket(Storage):
    def __init__(self, model: ModelStorage, uri: URI, keys: str | None) -> None:
        self.uri, self._base, self._host = model.storage, uri, s3_host(model.s3_endpoint)
        self._client: Any = client_of(keys, model.s3_endpoint)

    def names(self, folder: str) -> list[str]:
        prefix = f"{self._base.path}/{folder}/"

        def ask() -> list[str]:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._base.name, Prefix=prefix, Delimiter="/")
            keys = [k for page in pages for k in (*page.get("Contents", ()), *page.get("CommonPrefixes", ()))]
            return sorted(str(k.get("Key") or k["Prefix"]).removeprefix(prefix).rstrip("/") for k in keys)

        return self._asked(ask)

    def read(self, name: str) -> bytes | None:
        def ask() -> bytes | None:
            try:
                return bytes(self._client.get_object(**self._at(name))["Body"].read())
            except self._client.exceptions.ClientError as failure:
                if error_code(failure) == "NoSuchKey":
                    return None
                raise

        return self._asked(ask)

    def chunks(self, name: str) -> Iterator[bytes]:
        def ask() -> Any:
            try:
                return self._client.get_object(**self._at(name))["Body"]
            except self._client.exceptions.NoSuchKey:
                return None

        if (body := self._asked(ask)) is None:
            raise FileNotFoundError(name)
        try:
            yield from body.iter_chunks(_CHUNK)
        except Exception as failure:  # what botocore's body raises while it is read
            raise InfrastructureError("StorageFailed", f"{self.uri}/{name}: {type(failure).__name__}") from failure

    def write(self, name: str, body: bytes) -> None:
        self._asked(lambda: self._client.put_object(**self._at(name), Body=body))

    def change(self, name: str, make: Callable[[bytes | None], bytes | None]) -> None:
        def ask() -> bool:
            try:
                held = self._client.get_object(**self._at(name))
                body, condition = make(held["Body"].read()), {"IfMatch": held["ETag"]}
            except self._client.exceptions.NoSuchKey:
                body, condition = make(None), {"IfNoneMatch": "*"}
            if body is None:
                return True
            try:
                self._client.put_object(**self._at(name), Body=body, **condition)
            except self._client.exceptions.ClientError as failure:
                if error_code(failure) not in (*_CLAIMED, "NoSuchKey"):
                    raise
                return False
            return True

        for _ in range(_TRIES):
            if self._asked(ask):
                return
        raise InfrastructureError("StorageFailed", f"{self.uri}/{name}: others change it all the time; try again")

    def claim(self, folder: str, name: str, body: bytes) -> bool:
        if self.names(folder):
            return False

        def ask() -> bool:
            try:
                self._client.put_object(**self._at(f"{folder}/{name}"), Body=body, IfNoneMatch="*")
            except self._client.exceptions.ClientError as failure:
                if error_code(failure) not in _CLAIMED:
                    raise
                return False
            return True

        return self._asked(ask)

    def remove(self, path: str) -> None:
        def ask() -> None:
            below = [f"{path}/{name}" for name, _ in objects_below(self._client, URI("s3", self._base.name, f"{self._base.path}/{path}"))]
            for name in sorted(below, key=lambda name: not name.endswith(f"/{SUMS}")) or [path]:  # what has no list of digests is not whole
                self._client.delete_object(**self._at(name))

        self._asked(ask)

    def fetch(self, folder: str, into: Path, patterns: Sequence[str]) -> Path:
        def ask() -> Path:
            partial = into.with_name(f".{into.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, _ in objects_below(self._client, URI("s3", self._base.name, f"{self._base.path}/{folder}")):
                if "/" not in name and any(fnmatch(name, pattern) for pattern in patterns):
                    self._client.download_file(self._base.name, self._at(f"{folder}/{name}")["Key"], str(partial / name))
            partial.rename(into)
            return into

        return into if into.is_dir() else self._asked(ask)

    def _at(self, name: str) -> dict[str, str]:
        return {"Bucket": self._base.name, "Key": f"{self._base.path}/{name}"}

    def _asked(self, ask: Callable[[], T]) -> T:
        def refused(why: str) -> UserError:
            told = f"{self.uri}: {why}: its keys may not read and write there, or there is no bucket {self._base.name}"
            return UserError("StorageRefused", f"{told}; check storage and secretRef of the FineTunedModel")

        try:
            return with_retries(ask, self._host, refused)
        except self._client.exceptions.ClientError as failure:
            raise InfrastructureError("StorageFailed", f"{self.uri}: {error_code(failure)}") from failure
