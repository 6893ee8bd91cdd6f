"""An OCI registry as a target: a ModelPack artifact under the tag, and an image of the same files under TAG-image.

ModelPack is the CNCF's model-spec (https://github.com/modelpack/model-spec, docs/spec.md, config.md and annotations.md): one layer for
each file, as it is. A pod can mount an image alone (an image volume), whose layers are tar archives: those are the second one. Blobs
come first and the tag last, so that nobody sees half of it. A registry has no conditional write: a tag is looked at right before it is
written, and again when all was read back, so that of two jobs one is told.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import requests

from finetune_api.contract import LINEAGE, SUMS
from finetune_api.spec import PublishTarget
from finetune_api.status import Artifact
from finetune_api.uris import URI, parse_uri

from ..job.context import Context
from ..process.errors import InfrastructureError, UserError
from ..remote.registry import INDEX, LATEST, MANIFEST, Manifest, Registry, digest_of, dumps
from ..remote.retry import with_retries
from ..remote.web import status_of
from .bundle import Held, artifact, artifact_of, files, refuse_foreign

ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
_WEIGHT, _SETTING, _DOC = (f"application/vnd.cncf.model.{kind}.v1.raw" for kind in ("weight", "weight.config", "doc"))
FILEPATH, TITLE = "org.cncf.model.filepath", "org.opencontainers.image.title"
_RECORD, _DIGEST, _BASE = "dev.finetune.record", "dev.finetune.digest", "dev.finetune.base"
"""Annotations: whose result it is, as in finetune.json, the digest of its SHA256SUMS, and the uri of its base."""
_WEIGHTS, _DOCS = (".safetensors", ".gguf", ".onnx", ".onnx_data"), (".md",)
_PLATFORMS = ("amd64", "arm64")
"""An image is of a platform, files are of none: each gets the same layers."""

T = TypeVar("T")


def check_registry(context: Context, target: PublishTarget, field: str) -> Held | None:
    """This job's result where the registry holds it already. Writes nothing that anybody sees.

    Raises UserError or SourceUnavailable when `publish_to_registry` would fail.
    """
    return _asked(target, lambda: _Place(context, target, field).check())


def publish_to_registry(context: Context, target: PublishTarget, field: str, bundle: Path) -> Artifact:
    """Send blobs, then the image, then the artifact; read all of it back. The same job may replace what it published; nobody else."""
    _asked(target, lambda: _Place(context, target, field).publish(bundle))
    return artifact(bundle, target.address)


def _asked(target: PublishTarget, act: Callable[[], T]) -> T:
    uri = parse_uri(target.address)

    def refused(why: str) -> UserError:
        return UserError("PublishRefused", f"{why}: secretRef may not push to {uri.path}, or there is no such repository")

    try:
        return with_retries(act, uri.name, refused)
    except requests.RequestException as failure:
        raise InfrastructureError("PublishFailed", f"the registry did not take it: {failure}") from failure


class _Place:
    """A tag of a repository, as one job sees it."""

    def __init__(self, context: Context, target: PublishTarget, field: str) -> None:
        self.context, self.shown = context, target.address
        self.uri: URI = parse_uri(target.address)
        self.tag = self.uri.revision or LATEST
        self.image_tag = f"{self.tag[:122]}-image"
        self._seen: set[str] = set()
        """What was read back"""
        self.registry = Registry(context, field, self.uri, plain=target.plain_http)

    def check(self) -> Held | None:
        held, image = self._own(self.tag), self._own(self.image_tag)
        if held is not None and image is not None and _digest(held) == _digest(image):
            layers = held.document["layers"]
            blobs = {layer["annotations"][FILEPATH]: layer["digest"] for layer in layers}
            sums, lineage = (b"".join(self.registry.blob(blobs[name])) for name in (SUMS, LINEAGE))
            return Held(artifact_of(sums, sum(layer["size"] for layer in layers), self.shown), lineage)
        self.registry.may_write()
        return None

    def publish(self, bundle: Path) -> None:
        held, image = self._own(self.tag), self._own(self.image_tag)
        annotations = self._annotations(bundle)
        model = self._model(bundle, annotations)
        if image is None or image.document.get("annotations") != annotations or self._damaged(image) is not None:
            index = self._image(bundle, annotations)
            self._own(self.image_tag)
            self.registry.put_manifest(index, self.image_tag)
            image = Manifest(dumps(index), INDEX)
        if held is None or held.body != dumps(model):
            self._own(self.tag)
            self.registry.put_manifest(model, self.tag)
            held = Manifest(dumps(model), MANIFEST)
        for manifest, tag in ((image, self.image_tag), (held, self.tag)):
            if (damaged := self._damaged(manifest)) is not None:
                raise InfrastructureError(
                    "VerificationFailed", f"{self.uri.path}:{tag}: {damaged} is not there as it was sent; remove it there"
                )
            if (now := self._own(tag)) is None or now.digest != manifest.digest:
                raise InfrastructureError("TargetContended", f"another writes to the same tag {tag}")

    def _own(self, tag: str) -> Manifest | None:
        """What this job has published under a tag, None where it is free. Raises UserError where it holds anything else."""
        found = self.registry.manifest(tag)
        if found is not None:
            refuse_foreign((found.document.get("annotations") or {}).get(_RECORD), self.context, "tag or repository")
        return found

    def _annotations(self, bundle: Path) -> dict[str, str]:
        lineage = json.loads((bundle / LINEAGE).read_text())
        return {
            _RECORD: json.dumps({"job": lineage["job"]}, sort_keys=True),
            _DIGEST: artifact(bundle, "").digest,
            TITLE: self.context.job.name,
            _BASE: lineage["base"]["uri"],
        }

    def _model(self, bundle: Path, annotations: dict[str, str]) -> dict[str, Any]:
        """Send the files; the artifact's manifest."""
        layers = []
        for file in [*files(bundle), bundle / SUMS]:
            layers.append({**self._sent(file), "mediaType": _media_type(file)})
            name = str(file.relative_to(bundle))
            layers[-1]["annotations"] = {FILEPATH: name, TITLE: name}
        config = {
            "descriptor": {"name": self.context.job.name, "title": self.context.job.name, "revision": annotations[_DIGEST]},
            "config": {"format": "safetensors", "capabilities": {"inputTypes": ["text"], "outputTypes": ["text"]}},
            "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]},
        }
        described = self._sent_document(config, CONFIG_TYPE)
        return _manifest(MANIFEST, annotations, artifactType=ARTIFACT_TYPE, config=described, layers=layers)

    def _image(self, bundle: Path, annotations: dict[str, str]) -> dict[str, Any]:
        """Send the same files as layers of an image; the index of its manifests, one for each platform."""
        layers = []
        everything = [*files(bundle), bundle / SUMS]
        weights = [file for file in everything if file.suffix in _WEIGHTS]
        for group in ([file for file in everything if file not in weights], *([file] for file in weights)):
            tar = Path(self.context.layout.job, "publish.tar")
            _pack(bundle, group, tar)
            layers.append({**self._sent(tar), "mediaType": "application/vnd.oci.image.layer.v1.tar"})
            tar.unlink()
        manifests = []
        for platform in ({"architecture": architecture, "os": "linux"} for architecture in _PLATFORMS):
            root = {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]}
            config = self._sent_document({**platform, "config": {}, "rootfs": root}, "application/vnd.oci.image.config.v1+json")
            manifest = self.registry.put_manifest(_manifest(MANIFEST, annotations, config=config, layers=layers))
            manifests.append({**manifest, "platform": platform})
        return _manifest(INDEX, annotations, manifests=manifests)

    def _sent(self, file: Path) -> dict[str, Any]:
        with file.open("rb") as stream:
            digest = f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
        self.registry.put_blob(digest, file)
        return {"digest": digest, "size": file.stat().st_size}

    def _sent_document(self, document: dict[str, Any], media_type: str) -> dict[str, Any]:
        body = dumps(document)
        self.registry.put_blob(digest_of(body), body)
        return {"mediaType": media_type, "digest": digest_of(body), "size": len(body)}

    def _damaged(self, manifest: Manifest) -> str | None:
        """Read back all that a manifest, or the manifests of an index, name: the first digest that something else, or nothing, answers to."""
        for digest in sorted({named["digest"] for named in manifest.document.get("manifests", ())}):
            inner = self.registry.manifest(digest)
            if inner is None or (damaged := self._damaged(inner)) is not None:
                return digest if inner is None else damaged
        named = [manifest.document["config"], *manifest.document["layers"]] if "config" in manifest.document else []
        for digest in sorted({one["digest"] for one in named} - self._seen):
            read = hashlib.sha256()
            try:
                for chunk in self.registry.blob(digest):
                    read.update(chunk)
            except requests.HTTPError as failure:
                if status_of(failure) == 404:
                    return str(digest)
                raise
            if f"sha256:{read.hexdigest()}" != digest:
                return str(digest)
            self._seen.add(digest)
        return None


def _digest(manifest: Manifest) -> Any:
    return manifest.document["annotations"].get(_DIGEST)


def _manifest(media_type: str, annotations: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"schemaVersion": 2, "mediaType": media_type, "annotations": annotations, **more}


def _media_type(file: Path) -> str:
    return _WEIGHT if file.suffix in _WEIGHTS else _DOC if file.suffix in _DOCS or file.name == "LICENSE" else _SETTING


def _pack(bundle: Path, group: list[Path], target: Path) -> None:
    """A tar archive of files, the same bytes whenever and by whomever it is made."""
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for file in group:
            entry = tarfile.TarInfo(str(file.relative_to(bundle)))
            entry.size, entry.mode = file.stat().st_size, 0o644
            with file.open("rb") as stream:
                archive.addfile(entry, stream)
