"""Files out of buckets, OCI registries and MLflow: pinned by digest or version, compared with their digests, gone on with after a wait."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_api.contract import LINEAGE, SUMS
from finetune_api.uris import URI

from ..job.context import Context
from ..job.files import damaged_file
from ..process.errors import UserError
from .mlflow import Server
from .registry import INDEX, LATEST, Registry
from .s3 import objects_below
from .web import SIZE_LIMIT

_PATHS = ("org.cncf.model.filepath", "org.opencontainers.image.title")
"""Annotations of a layer that name its file: ModelPack's, and ORAS's."""
_MOST_FILES = 10_000
_BOMB = 100
"""Bytes that a compressed one may become, beyond the first GiB."""


def from_bucket(context: Context, client: Any, uri: URI, patterns: list[str]) -> tuple[Path, str]:
    """Folder and digest of the files below a prefix, not of folders below it; the digest only of what this operator published."""
    shown = f"s3://{uri.name}/{uri.path}"
    found = {name: size for name, size in objects_below(client, uri) if _wanted(name, patterns)}
    if sum(found.values()) > SIZE_LIMIT:
        raise UserError("ModelTooLarge", f"{shown} has over {SIZE_LIMIT // 2**40} TiB")
    sums = client.get_object(Bucket=uri.name, Key=f"{uri.path}/{SUMS}")["Body"].read() if SUMS in found else b""
    revision = f"sha256:{hashlib.sha256(sums).hexdigest()}" if sums else ""

    def fill(folder: Path) -> None:
        for name in found:
            if not (folder / name).exists():
                client.download_file(uri.name, f"{uri.path}/{name}", str(folder / name))

    key = (uri.name, uri.path, revision, *(f"{name} {size}" for name, size in sorted(found.items())))
    return _whole(context, key, patterns, shown, fill), revision


def from_registry(context: Context, field: str, uri: URI, plain: bool, patterns: list[str]) -> tuple[Path, str]:
    """Folder and manifest digest of a ModelPack artifact, or of one with named files as ORAS pushes it."""
    registry = Registry(context, field, uri, plain=plain)
    shown = f"oci://{uri.name}/{uri.path}"
    manifest = registry.manifest(uri.revision or LATEST)
    if manifest is None:
        raise UserError("SourceNotFound", f"{shown} has no {uri.revision or LATEST}; check the uri and its tag")
    layers = manifest.document.get("layers")
    if manifest.media_type == INDEX or not isinstance(layers, list) or not all(map(_is_layer, layers)) or len(layers) > _MOST_FILES:
        raise UserError("ModelNotReadable", f"{shown}: {uri.revision or LATEST} is an image, or no artifact; name a ModelPack artifact")
    if sum(layer["size"] for layer in layers) > SIZE_LIMIT:
        raise UserError("ModelTooLarge", f"{shown} has over {SIZE_LIMIT // 2**40} TiB")

    def fill(folder: Path) -> None:
        for layer in layers:
            kind = str(layer["mediaType"])
            archive = kind.rpartition(".")[2] if ".tar" in kind else ""
            named = next((layer["annotations"][key] for key in _PATHS if key in (layer.get("annotations") or {})), None)
            if archive:
                _unpack(registry, layer, archive, folder, patterns, shown)
            elif named is not None and _wanted(name := safe_name(named, shown), patterns):
                registry.save_blob(layer["digest"], layer["size"], folder / name)

    return _whole(context, (uri.name, uri.path, manifest.digest), patterns, shown, fill), manifest.digest


def from_mlflow(context: Context, field: str, uri: URI, plain: bool, patterns: list[str]) -> tuple[Path, str]:
    """Folder and version of a registered model, whose files come through the tracking server."""
    server = Server(context, field, uri, plain=plain)
    version = server.version(uri.path, uri.revision)
    shown, root = f"mlflow://{uri.name}/{uri.path}/{version['version']}", server.files_of(version)

    def fill(folder: Path) -> None:
        listed = {safe_name(name, shown): size for name, size in server.list_files(root)}
        wanted = {name: size for name, size in listed.items() if _wanted(name, patterns)}
        if sum(wanted.values()) > SIZE_LIMIT:
            raise UserError("ModelTooLarge", f"{shown} has over {SIZE_LIMIT // 2**40} TiB")
        for name, size in wanted.items():
            if not (folder / name).exists():
                server.download(f"{root}/{name}", folder / f".{name}.part", size)
                (folder / f".{name}.part").rename(folder / name)

    key = (uri.name, uri.path, str(version["version"]), str(version.get("creation_timestamp")), root)
    return _whole(context, key, patterns, shown, fill), str(version["version"])


def safe_name(name: Any, shown: str) -> str:
    """A file's name within its folder. Raises UserError where it leads out of it."""
    path = PurePosixPath(name) if isinstance(name, str) else None
    if path is None or path.is_absolute() or ".." in path.parts or not path.parts or not str(path).isprintable() or "\\" in str(path):
        raise UserError("PathLeavesVolume", f"{shown} names a file {str(name)[:80]!r}, which leads out of its folder; publish it again")
    return str(path)


def _wanted(name: str, patterns: list[str]) -> bool:
    return "/" not in name and not name.startswith(".") and any(fnmatch(name, pattern) for pattern in [*patterns, SUMS])


def _is_layer(layer: Any) -> bool:
    if not isinstance(layer, dict) or not isinstance(layer.get("mediaType"), str) or not isinstance(layer.get("annotations") or {}, dict):
        return False
    digest, size = layer.get("digest"), layer.get("size")
    return isinstance(digest, str) and len(digest) == 71 and digest.startswith("sha256:") and isinstance(size, int) and size >= 0


def _whole(context: Context, key: tuple[str, ...], patterns: list[str], shown: str, fill: Callable[[Path], None]) -> Path:
    """The folder of what was fetched, under its name when all of it is there; a try that ended early is gone on with."""
    name = hashlib.sha256("\0".join([*key, *patterns]).encode()).hexdigest()[:24]
    folder = Path(context.layout.cache, "models", f"fetched--{name}")
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.{context.job.uid[:8]}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    fill(partial)
    for left in partial.glob(".*"):
        left.unlink()
    if not any(partial.iterdir()):
        raise UserError("SourceNotFound", f"{shown} holds none of {', '.join(patterns)}; check the uri")
    try:
        compare(partial, shown)
    except UserError:
        shutil.rmtree(partial)
        raise
    if folder.is_dir():  # another job came first
        shutil.rmtree(partial)
    else:
        partial.rename(folder)
    return folder


def _unpack(registry: Registry, layer: dict[str, Any], kind: str, folder: Path, patterns: list[str], shown: str) -> None:
    """The wanted files of a layer that is an archive. Links, devices and names that lead out of it are refused."""
    done = folder / f".{layer['digest'][7:]}.done"
    if done.exists():
        return
    if kind not in ("tar", "tar+gzip"):
        raise UserError(
            "ModelNotReadable", f"{shown} has a layer of type {kind}, which is not read here; push its files as they are, or as tar"
        )
    blob, total = folder / f".{layer['digest'][7:]}.tar", 0
    registry.save_blob(layer["digest"], layer["size"], blob)
    try:
        with tarfile.open(blob, "r|gz" if kind.endswith("gzip") else "r|") as archive:
            for entry in archive:
                total += entry.size
                if total > 2**30 + _BOMB * layer["size"]:
                    raise UserError("DecompressionBomb", f"{shown}: a layer becomes over {_BOMB} times as large when it is unpacked")
                name = safe_name(entry.name, shown) if entry.name not in (".", "./") else "."
                if not (entry.isreg() or entry.isdir()):
                    raise UserError("ModelNotReadable", f"{shown}: {name} is neither a file nor a folder; push files")
                if entry.isreg() and _wanted(name, patterns) and (stream := archive.extractfile(entry)) is not None:
                    with (folder / name).open("wb") as sink:
                        shutil.copyfileobj(stream, sink)
    except (tarfile.TarError, EOFError, OSError) as failure:
        if isinstance(failure, OSError) and failure.errno is not None:
            raise
        raise UserError("ModelNotReadable", f"{shown}: a layer is no archive: {failure}") from failure
    done.touch()
    os.unlink(blob)


def compare(folder: Path, shown: str) -> None:
    """Raises UserError where a published result is not whole, or not what was published."""
    if not (folder / SUMS).is_file():
        if (folder / LINEAGE).is_file():
            raise UserError("ModelNotWhole", f"{shown} has no {SUMS}: publishing it has not ended; name a whole one")
        return
    if (name := damaged_file(folder, (folder / SUMS).read_text())) is not None:
        raise UserError("ModelNotWhole", f"{shown}/{name} is not what {SUMS} says; publish it again")
