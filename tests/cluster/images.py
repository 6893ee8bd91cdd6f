"""Container images without Docker and without a registry.

buildah builds our own from their Dockerfiles, on a Debian base made by mmdebstrap. A layer lies on the disk once: the nodes'
containerd gets hard links of what buildah has unpacked (store.py).
"""

from __future__ import annotations

import functools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import binaries, debian, machine
from .shell import CACHE, REPO, cached, digest_of, locked, run, say, step

#: a registry that answers nothing: a missing image fails at once instead of being looked for elsewhere
TRAINER = "localhost/finetune-trainer"
OPERATOR = "localhost/finetune-operator"
VLLM = "localhost/vllm-cpu"
NGINX = "localhost/nginx"
PAUSE = "localhost/pause:1"
SUITE = "trixie"
"""Debian's current release, as in the Dockerfiles."""
STORAGE = CACHE / "images"
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
    "operator": [REPO / "operator" / "finetune_api", REPO / "operator" / "finetune_operator", REPO / "operator" / "finetune_gateway"],
}
"""Our own code in each image."""
_PLACES = {"trainer": REPO / "trainer_image", "operator": REPO / "operator"}


@dataclass(frozen=True)
class Image:
    """A reference, whose tag tells its content."""

    reference: str

    @functools.cached_property
    def _inspected(self) -> dict[str, Any]:
        return dict(json.loads(buildah("inspect", "--type", "image", self.reference)))

    @property
    def manifest(self) -> str:
        """The OCI manifest, byte for byte."""
        return str(self._inspected["Manifest"])

    @property
    def config(self) -> str:
        """The OCI configuration, byte for byte."""
        return str(self._inspected["Config"])

    @property
    def layers(self) -> list[tuple[str, int]]:
        """(diff ID, bytes) of its layers, the lowest first."""
        return [(layer["digest"], layer["size"]) for layer in json.loads(self.manifest)["layers"]]

    @property
    def size(self) -> int:
        """Bytes of all layers."""
        return sum(size for _, size in self.layers)


def unpacked(layer: str) -> Path:
    """Folder of a layer, as overlayfs takes it, in buildah's storage."""
    known: list[dict[str, str]] = json.loads((STORAGE / "overlay-layers" / "layers.json").read_text())
    return next(STORAGE / "overlay" / entry["id"] / "diff" for entry in known if entry.get("diff-digest") == layer)


# not mounted on itself: there would be no hard links from it
_BUILDAH: list[str | Path] = [
    "buildah",
    "--root",
    STORAGE,
    "--runroot",
    "/run/finetune-images",
    "--storage-opt",
    "overlay.skip_mount_home=true",
]
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
    STORAGE.mkdir(parents=True, exist_ok=True)
    with locked("images"):
        below = "" if docker else base()
        # a tag per content: pods of an older one are replaced; the whole folder, for what the Dockerfile copies
        image = Image(f"{repository}:{digest_of(below, dockerfile, _UV_LOCK, *inputs)}")
        name = repository.rpartition("/")[2]
        if docker or not _known(image.reference):
            options = ["--tag", image.reference, "--file", dockerfile, *_options(below)]
            command = ["docker", "build"] if docker else [*_BUILDAH, "bud", "--layers", "--isolation", "chroot", "--network", "host"]
            with step(f"building the image {name} from {dockerfile.relative_to(REPO)}"):
                run([*command, *options, context], env=_STORAGE_DRIVER, log=CACHE / f"{name}-image.log")
            if not docker:
                _forget(repository, digest_of(below, dockerfile, inputs[0]))
                parts = ", ".join(f"{part} {size} MB" for part, size in _largest(image.reference))
                say(f"image {name}: {image.size / 1e6:.0f} MB, the last layer {image.layers[-1][1] / 1e3:.0f} kB; {parts or 'no packages'}")
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
        rows = [line.split("\t") for line in run(["du", "-m", "--max-depth=1", packages]).splitlines()] if packages.exists() else []
        return sorted(((Path(path).name, int(size)) for size, path in rows if Path(path) != packages), key=lambda row: -row[1])[:3]
    finally:
        buildah("rm", container)


def _forget(repository: str, packages: str) -> None:
    """Remove all but three images of a repository; all but the newest, and what nothing needs any more, when its packages are others."""
    note = STORAGE / f"{repository.rpartition('/')[2]}.packages"
    changed = note.exists() and note.read_text() != packages
    newest_first = buildah("images", "--noheading", "--format", "{{.Name}}:{{.Tag}}", "--filter", f"reference={repository}").split()
    for stale in newest_first[1 if changed else 3 :]:
        buildah("rmi", stale)
    if changed:
        buildah("rm", "--all")  # what builds that were killed have left uses images, too; others wait for the lock
        buildah("rmi", "--prune")
    note.write_text(packages)


def trainer() -> Image:
    """The image that all stages run in."""
    return _ours("trainer", TRAINER)


def operator() -> Image:
    """The operator's image."""
    return _ours("operator", OPERATOR)


def vllm() -> Image:
    """The engine of replicas without GPUs."""
    place = REPO / "tests" / "cluster" / "vllm"
    return _build(VLLM, place / "Dockerfile", [place / "requirements.lock"], place.parent)


def nginx() -> Image:
    """The proxy in front of replicas."""
    place = REPO / "tests" / "cluster" / "nginx"
    return _build(NGINX, place / "Dockerfile", [place / "Dockerfile"], place)


def both() -> list[Image]:
    """The images of the operator and the trainer, while Kubernetes is built beside them: packages come from the network meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        built = None if machine.with_kind() else pool.submit(binaries.ensure_all)
        found = [operator(), trainer()]
        if built is not None:
            built.result()
    return found


def _ours(name: str, repository: str) -> Image:
    place = _PLACES[name]
    return _build(repository, place / "Dockerfile", [place / "requirements.lock", *CODE[name]])


def played(folder: Path) -> Image:
    """An image with Python and a folder that has a Dockerfile, for benchmarks of what is around the training."""
    return _build("localhost/finetune-played", folder / "Dockerfile", [folder], folder)


def of_program(reference: str, program: Path, path: str, *, user: str = "65532:65532") -> Image:
    """An image that holds one static program at `path`, and starts it."""
    debian.ensure(debian.IMAGES)
    STORAGE.mkdir(parents=True, exist_ok=True)
    with locked("images"):
        if not _known(reference):
            container = buildah("from", "scratch").strip()
            buildah("copy", "--quiet", "--chmod", "0755", container, program, path)
            buildah("config", "--entrypoint", json.dumps([path]), "--user", user, container)
            buildah("commit", "--quiet", "--rm", container, reference)
    return Image(reference)


def pause() -> Image:
    """The image of pod sandboxes: a static program that waits."""

    def build(folder: Path) -> None:
        debian.ensure(debian.IMAGES)
        (folder / "pause.c").write_text(_PAUSE_SOURCE)
        run(["gcc", "-Os", "-static", "-o", folder / "pause", folder / "pause.c"])

    return of_program(PAUSE, cached("pause", digest_of(_PAUSE_SOURCE), build) / "pause", "/pause")
