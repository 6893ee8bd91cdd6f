"""Container images without Docker and without a registry.

Our own are built by buildah from their Dockerfiles, on a Debian base made by mmdebstrap, and handed to containerd as an OCI archive.
A layer lies on the disk once: the archive carries only what the store of the nodes does not have yet (store.py).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import debian, machine
from .shell import CACHE, REPO, cached, digest_of, locked, run, say, step

#: a registry that answers nothing: a missing image fails at once instead of being looked for elsewhere
TRAINER = "localhost/finetune-trainer"
OPERATOR = "localhost/finetune-operator"
PAUSE = "localhost/pause:1"
SUITE = "trixie"
"""Debian's current release, as in the Dockerfiles."""
STORAGE = CACHE / "images"
LAYOUT = CACHE / "node-images" / "layout"  # beside what was unpacked of it: store.py
_BASE_COMMAND = (
    "mmdebstrap",
    "--variant=minbase",
    "--mode=root",
    *(f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "locale", "info")),
    SUITE,
)
_PAUSE_SOURCE = """
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
static void stop(int s) { _exit(0); }
static void reap(int s) { while (waitpid(-1, 0, WNOHANG) > 0); }
int main(void) { signal(SIGTERM, stop); signal(SIGINT, stop); signal(SIGCHLD, reap); for (;;) pause(); }
"""
CODE = {
    "trainer": [REPO / "operator" / "finetune_api", REPO / "trainer_image" / "finetune_trainer"],
    "operator": [REPO / "operator" / "finetune_api", REPO / "operator" / "finetune_operator"],
}
"""Our own code in each image."""
_PLACES = {"trainer": REPO / "trainer_image", "operator": REPO / "operator"}


@dataclass(frozen=True)
class Image:
    """A reference, whose tag tells its content, and the folder with its OCI layout."""

    reference: str
    layout: Path

    @property
    def manifest(self) -> tuple[str, dict[str, Any]]:
        """(digest, manifest)"""
        index = json.loads((self.layout / "index.json").read_text())["manifests"]
        name = "org.opencontainers.image.ref.name"
        digest = next(entry["digest"] for entry in index if entry["annotations"][name] == self.reference)
        return digest, json.loads(self.blob(digest).read_text())

    def blob(self, digest: str) -> Path:
        """File of a blob."""
        return self.layout / "blobs" / "sha256" / digest.removeprefix("sha256:")

    @property
    def layers(self) -> list[tuple[str, int]]:
        """(digest, bytes) of its layers, the lowest first. They are not compressed, so these digests are the diff IDs too."""
        return [(layer["digest"], layer["size"]) for layer in self.manifest[1]["layers"]]

    @property
    def size(self) -> int:
        """Bytes of all layers."""
        return sum(size for _, size in self.layers)


_BUILDAH: list[str | Path] = ["buildah", "--root", STORAGE, "--runroot", "/run/finetune-images"]
_STORAGE_DRIVER = {"STORAGE_DRIVER": "overlay"}
_UV_LOCK = Path(__file__).with_name("locks") / "uv.txt"


def buildah(*words: str | Path) -> str:
    """Run buildah on our own storage."""
    return run([*_BUILDAH, *words], env=_STORAGE_DRIVER)


def _known(reference: str) -> bool:
    return bool(buildah("images", "--quiet", "--filter", f"reference={reference}").strip())


def base() -> str:
    """The machine's own stand-in for debian:trixie-slim, where no registry is reached."""
    mirrors = [f"deb {uri} {suite} main" for uri, suite in debian.archives(SUITE)]
    reference = f"localhost/debian:{SUITE}-{digest_of(*_BASE_COMMAND, *mirrors)}"
    if not _known(reference):
        archive = STORAGE / "base.tar"
        with step(f"making the base of the images (Debian {SUITE})"):
            run([*_BASE_COMMAND, archive, *mirrors], log=CACHE / "mmdebstrap.log")
            container = buildah("from", "scratch").strip()
            buildah("add", "--quiet", container, archive, "/")
            buildah("commit", "--quiet", "--rm", container, reference)
        archive.unlink()
    return reference


def _build(repository: str, dockerfile: Path, inputs: list[Path], context: Path = REPO) -> Image:
    """Build a Dockerfile, unless its inputs are the same as before: with Docker where kind is used, with buildah elsewhere."""
    docker = machine.with_kind()
    if not docker:
        debian.ensure(debian.IMAGES)
    for folder in (STORAGE, LAYOUT.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with locked("images"):
        below = "" if docker else base()
        # a tag per content: pods of an older one are replaced; the whole folder, for what the Dockerfile copies
        image = Image(f"{repository}:{digest_of(below, dockerfile, _UV_LOCK, *inputs)}", LAYOUT)
        name = repository.rpartition("/")[2]
        if docker or not _known(image.reference):
            options = ["--tag", image.reference, "--file", dockerfile, *_options(below)]
            command = ["docker", "build"] if docker else [*_BUILDAH, "bud", "--layers", "--isolation", "chroot", "--network", "host"]
            with step(f"building the image {name} from {dockerfile.relative_to(REPO)}"):
                run([*command, *options, context], env=_STORAGE_DRIVER, log=CACHE / f"{name}-image.log")
        if not docker and (not LAYOUT.exists() or image.reference not in (LAYOUT / "index.json").read_text()):
            _forget(repository, keep=3)
            source = f"containers-storage:[overlay@{STORAGE}+/run/finetune-images]{image.reference}"
            # not `buildah push`, which compresses: minutes for gigabytes that are unpacked again at once
            skopeo = ["skopeo", "copy", "--quiet", "--insecure-policy", "--format", "oci", "--dest-oci-accept-uncompressed-layers"]
            run([*skopeo, source, f"oci:{LAYOUT}:{image.reference}"])
            parts = ", ".join(f"{part} {size} MB" for part, size in _largest(image.reference))
            say(
                f"image {name}: {image.size / 1e6:.0f} MB uncompressed, the layer with our code {image.layers[-1][1] / 1e3:.0f} kB; {parts}"
            )
    return image


def _options(below: str) -> list[str | Path]:
    """Base, mirrors and certificate authority of this machine, for the Dockerfile."""
    arguments = {"BASE_IMAGE": below, **{name: os.environ.get(name, "") for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX")}}
    options: list[str | Path] = [word for name, value in arguments.items() if value for word in ("--build-arg", f"{name}={value}")]
    authority = os.environ.get("SSL_CERT_FILE", "")
    return [*options, "--secret", f"id=ca,src={authority}"] if authority else options


def _largest(reference: str) -> list[tuple[str, int]]:
    """The three largest packages of an image: (name, MB)."""
    container = buildah("from", reference).strip()
    try:
        packages = Path(buildah("mount", container).strip(), "opt", "finetune", "site-packages")
        rows = [line.split("\t") for line in run(["du", "-m", "--max-depth=1", packages]).splitlines()]
        return sorted(((Path(path).name, int(size)) for size, path in rows if Path(path) != packages), key=lambda row: -row[1])[:3]
    finally:
        buildah("rm", container)


def _forget(repository: str, *, keep: int) -> None:
    """Remove all but the newest images of a repository, and layers that no image has."""
    newest_first = buildah("images", "--noheading", "--format", "{{.Name}}:{{.Tag}}", "--filter", f"reference={repository}").split()
    for stale in newest_first[keep:]:
        buildah("rmi", stale)


def trainer() -> Image:
    """The image that all stages run in."""
    return _ours("trainer", TRAINER)


def operator() -> Image:
    """The operator's image."""
    return _ours("operator", OPERATOR)


def _ours(name: str, repository: str) -> Image:
    place = _PLACES[name]
    return _build(repository, place / "Dockerfile", [place / "requirements.lock", *CODE[name]])


def played(folder: Path) -> Image:
    """An image with Python and a folder that has a Dockerfile, for benchmarks of what is around the training."""
    return _build("localhost/finetune-played", folder / "Dockerfile", [folder], folder)


def of_program(reference: str, program: Path, path: str, config: dict[str, Any]) -> Image:
    """An image that holds one static program at `path`."""

    def build(folder: Path) -> None:
        blobs = folder / "blobs" / "sha256"
        blobs.mkdir(parents=True)

        def put(data: bytes) -> tuple[str, int]:
            digest = hashlib.sha256(data).hexdigest()
            (blobs / digest).write_bytes(data)
            return f"sha256:{digest}", len(data)

        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            info = tarfile.TarInfo(path.lstrip("/"))
            info.size, info.mode = program.stat().st_size, 0o755
            with program.open("rb") as content:
                tar.addfile(info, content)
        kind = "application/vnd.oci.image"
        layer, size = put(buffer.getvalue())
        settings = {"architecture": "amd64", "os": "linux", "config": config, "rootfs": {"type": "layers", "diff_ids": [layer]}}
        config_digest, config_size = put(json.dumps(settings, sort_keys=True).encode())
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{kind}.manifest.v1+json",
            "config": {"mediaType": f"{kind}.config.v1+json", "digest": config_digest, "size": config_size},
            "layers": [{"mediaType": f"{kind}.layer.v1.tar", "digest": layer, "size": size}],
        }
        digest, size = put(json.dumps(manifest, sort_keys=True).encode())
        entry = {"mediaType": manifest["mediaType"], "digest": digest, "size": size}
        entry["annotations"] = {"org.opencontainers.image.ref.name": reference}
        (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))

    key = digest_of(reference, program, path, json.dumps(config, sort_keys=True))
    return Image(reference, cached(f"image-{reference.rpartition('/')[2].partition(':')[0]}", key, build))


def pause() -> Image:
    """The image of pod sandboxes: a static program that waits."""

    def build(folder: Path) -> None:
        debian.ensure(debian.IMAGES)
        (folder / "pause.c").write_text(_PAUSE_SOURCE)
        run(["gcc", "-Os", "-static", "-o", folder / "pause", folder / "pause.c"])

    program = cached("pause", digest_of(_PAUSE_SOURCE), build) / "pause"
    return of_program(PAUSE, program, "/pause", {"Entrypoint": ["/pause"], "User": "65535:65535"})
