"""Container images without Docker and without a registry: layers are tar files, an image is an OCI archive.

The content is that of trainer_image/Dockerfile and operator/Dockerfile: Debian's Python, the packages of the lock
file, our own code. Dependencies and code are separate archives, so that a change of code moves a few kilobytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from . import debian
from .environment import site_packages
from .shell import REPO, cached, digest_of, run, step

#: a registry that answers nothing: a missing image fails at once instead of being looked for elsewhere
TRAINER = "localhost/finetune-trainer"
OPERATOR = "localhost/finetune-operator"
PAUSE = "localhost/pause:1"
USER = "1000:1000"
_BASE_COMMAND = (
    "mmdebstrap",
    "--variant=minbase",
    "--mode=root",
    "--include=python3,python3-distutils,ca-certificates,tzdata,procps",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    "--customize-hook=chroot $1 useradd --uid 1000 --create-home finetune",
    "bookworm",
)
_PAUSE_SOURCE = """
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
static void stop(int s) { _exit(0); }
static void reap(int s) { while (waitpid(-1, 0, WNOHANG) > 0); }
int main(void) { signal(SIGTERM, stop); signal(SIGINT, stop); signal(SIGCHLD, reap); for (;;) pause(); }
"""


@dataclass(frozen=True)
class Layer:
    """An uncompressed layer: its digest is its diff ID."""

    path: Path
    digest: str

    @property
    def size(self) -> int:
        return self.path.stat().st_size


def _layer(path: Path) -> Layer:
    note = path.with_suffix(".sha256")
    if not note.exists():
        with path.open("rb") as stream:
            note.write_text(hashlib.file_digest(stream, "sha256").hexdigest())
    return Layer(path, f"sha256:{note.read_text()}")


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if "__pycache__" in info.name.split("/") and not info.name.startswith("opt/finetune/site-packages"):
        return None
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    info.mtime = 0
    return info


def base_layer() -> Layer:
    """Debian 12 with Python and nothing else that is not needed."""

    def build(folder: Path) -> None:
        debian.ensure(debian.IMAGES)
        with step("making the base file system of the images (Debian, Python)"):
            run([*_BASE_COMMAND, folder / "base.tar"], log=folder / "mmdebstrap.log")

    return _layer(cached("image-base", digest_of(*_BASE_COMMAND), build) / "base.tar")


def _add(tar: tarfile.TarFile, source: Path, name: str) -> None:
    """A folder with its compiled modules, which count whatever the time of their sources.

    Layers have no times, and a module that is older or newer than its compiled form is compiled again: in every container, for
    it cannot write what it compiles. That made importing the training stack take twice as long.
    """
    for path in [source, *sorted(source.rglob("*"))]:
        info = _plain(tar.gettarinfo(str(path), f"{name}/{path.relative_to(source)}" if path != source else name))
        if info is None:
            continue
        if not info.isfile():
            tar.addfile(info)
            continue
        content = path.read_bytes()
        if path.suffix == ".pyc":  # PEP 552: hash-based, and the hash not checked
            content = content[:4] + (1).to_bytes(4, "little") + bytes(8) + content[16:]
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def _packages_layer(name: str, source: Path, key: str) -> Layer:
    def build(folder: Path) -> None:
        with step(f"packing the packages of the {name} image"), tarfile.open(folder / "packages.tar", "w") as tar:
            _add(tar, source, "opt/finetune/site-packages")

    return _layer(cached(f"image-{name}-packages", key, build) / "packages.tar")


def _code_layer(name: str, folders: list[Path]) -> Layer:
    def build(folder: Path) -> None:
        with tarfile.open(folder / "code.tar", "w") as tar:
            for source in folders:
                tar.add(source, f"opt/finetune/app/{source.name}", filter=_plain)

    return _layer(cached(f"image-{name}-code", digest_of(*folders), build, keep=3) / "code.tar")


def _archive(target: Path, reference: str, layers: list[Layer], config: dict[str, object], include: list[Layer]) -> None:
    """Write an OCI archive that names all layers and carries those of `include`."""
    settings = {
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
    }
    blob = json.dumps(settings, sort_keys=True).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": _digest(blob), "size": len(blob)},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer.digest, "size": layer.size} for layer in layers],
    }
    manifest_blob = json.dumps(manifest, sort_keys=True).encode()
    index = {
        "schemaVersion": 2,
        "manifests": [
            {
                "mediaType": manifest["mediaType"],
                "digest": _digest(manifest_blob),
                "size": len(manifest_blob),
                "annotations": {"io.containerd.image.name": reference},
            }
        ],
    }
    with tarfile.open(target, "w") as tar:

        def put(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        put("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        put("index.json", json.dumps(index).encode())
        for data in (blob, manifest_blob):
            put(f"blobs/sha256/{_digest(data)[7:]}", data)
        for layer in include:
            tar.add(layer.path, f"blobs/sha256/{layer.digest[7:]}")


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _config(module: str, environment: dict[str, str]) -> dict[str, object]:
    env = {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/opt/finetune/site-packages/bin",
        "PYTHONPATH": "/opt/finetune/app:/opt/finetune/site-packages",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        **environment,
    }
    return {
        "User": USER,
        "WorkingDir": "/tmp",
        "Entrypoint": ["python3", "-m", module],
        "Env": [f"{key}={value}" for key, value in env.items()],
    }


@dataclass(frozen=True)
class Image:
    """A reference, whose tag tells its content, and the archives to import, in order."""

    reference: str
    archives: list[Path]


def pause() -> Image:
    """The image of pod sandboxes: a static program that waits."""

    def build(folder: Path) -> None:
        debian.ensure(debian.IMAGES)
        (folder / "pause.c").write_text(_PAUSE_SOURCE)
        run(["gcc", "-Os", "-static", "-o", folder / "pause", folder / "pause.c"])
        with tarfile.open(folder / "pause.tar", "w") as tar:
            tar.add(folder / "pause", "pause", filter=_plain)
        layer = _layer(folder / "pause.tar")
        _archive(folder / "image.tar", PAUSE, [layer], {"Entrypoint": ["/pause"], "User": "65535:65535"}, [layer])

    key = digest_of(_PAUSE_SOURCE, PAUSE)
    return Image(PAUSE, [cached("image-pause", key, build) / "image.tar"])


def _image(name: str, repository: str, source: Path, lock: Path, folders: list[Path], environment: dict[str, str]) -> Image:
    base = base_layer()
    packages = _packages_layer(name, source, digest_of(lock, base.digest, sys.version[:4], "compiled"))
    code = _code_layer(name, folders)
    config = _config(f"finetune_{name}", environment)
    lower_key = digest_of(base.digest, packages.digest, repository)

    def build_lower(folder: Path) -> None:
        _archive(folder / "image.tar", f"localhost/finetune-{name}-packages:{lower_key}", [base, packages], {}, [base, packages])

    lower = cached(f"image-{name}-lower", lower_key, build_lower) / "image.tar"
    key = digest_of(lower_key, code.digest, json.dumps(config), repository)
    reference = f"{repository}:{key}"  # a tag per content: pods of an older one are replaced by `helm upgrade`

    def build(folder: Path) -> None:
        _archive(folder / "image.tar", reference, [base, packages, code], config, [code])

    return Image(reference, [lower, cached(f"image-{name}", key, build, keep=3) / "image.tar"])


CODE = {
    "trainer": [REPO / "operator" / "finetune_api", REPO / "trainer_image" / "finetune_trainer"],
    "operator": [REPO / "operator" / "finetune_api", REPO / "operator" / "finetune_operator"],
}
"""Our own code in each image."""


def trainer() -> Image:
    """The image that all stages run in."""
    environment = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    return _image("trainer", TRAINER, site_packages("trainer"), REPO / "trainer_image" / "requirements.lock", CODE["trainer"], environment)


def operator() -> Image:
    """The operator's image."""
    return _image("operator", OPERATOR, site_packages("operator"), REPO / "operator" / "requirements.lock", CODE["operator"], {})


def played(folder: Path) -> Image:
    """An image with nothing but Python and a folder's `<name>_trainer.py`, for benchmarks of what is around the training."""
    base, code = base_layer(), _code_layer("played", [folder])
    script = next(folder.glob("*_trainer.py"))
    config: dict[str, object] = {
        "User": USER,
        "WorkingDir": "/tmp",
        "Entrypoint": ["python3", f"/opt/finetune/app/{folder.name}/{script.name}"],
    }
    key = digest_of(base.digest, code.digest, json.dumps(config))
    reference = f"localhost/finetune-played:{key}"

    def build(target: Path) -> None:
        _archive(target / "image.tar", reference, [base, code], config, [base, code])

    return Image(reference, [cached("image-played", key, build) / "image.tar"])


def load(image: Image, node_root: Path, ctr: list[str]) -> None:
    """Import an image into a node's containerd, unless the node has it already."""
    marker = node_root / "images" / image.archives[-1].parent.name
    if marker.exists():
        return
    marker.parent.mkdir(parents=True, exist_ok=True)
    with step(f"loading {image.reference.rsplit('/', 1)[1]} into {node_root.name}"):
        for archive in image.archives:
            loaded = marker.parent / f"{archive.parent.name}.loaded"
            if not loaded.exists():
                run([*ctr, "-n", "k8s.io", "images", "import", "--snapshotter", "overlayfs", archive])
                loaded.touch()
        os.sync()  # else the first pods wait for gigabytes to reach the disk
    marker.touch()
