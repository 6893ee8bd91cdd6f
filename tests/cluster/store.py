"""What the nodes start with: one containerd root with all images, of which each node gets a copy made of hard links.

An image is imported once. A layer then lies on the disk once: containerd drops what it has unpacked, and the layout keeps sparse
files in its place, so that buildah pushes, and an archive carries, only what is new. Files that image, store and Python environment
have in common become hard links of each other.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from . import binaries, environment, images, processes
from .control_plane import wait_for
from .shell import CACHE, CommandFailed, locked, run, say, step

ROOT = CACHE / "node-images"
_NAME = "finetune-store"
_RUN = Path("/run/finetune-local/store")
_OWN = ("io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db")
"""What containerd writes in place: each node has its own."""


def ctr(socket: Path) -> list[str | Path]:
    """The command that speaks to a containerd."""
    return [binaries.ensure("containerd") / "ctr", "--address", socket, "--namespace", "k8s.io"]


def configuration(root: Path, state: Path, socket: Path) -> str:
    """The part of containerd's configuration that every one of ours has."""
    return f'version = 3\nroot = "{root}"\nstate = "{state}"\noom_score = 0\n[grpc]\n  address = "{socket}"\n'


def wait(socket: Path, logs: Path) -> None:
    """Until the containerd answers."""
    wait_for("containerd", lambda: "Server" in run([*ctr(socket), "version"], check=False), 60, logs)


def ensure(wanted: list[images.Image]) -> None:
    """Import the images that the store lacks, through a containerd that runs for that alone."""
    with locked("node-images"):
        missing = [image for image in wanted if not _marker(image).exists()]
        if not missing:
            return
        processes.end(lambda: processes.of(_NAME))  # of a run that was killed
        _RUN.mkdir(parents=True, exist_ok=True)
        config, socket = _RUN / "containerd.toml", _RUN / "containerd.sock"
        no_pods = 'disabled_plugins = ["io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"]\n'
        config.write_text(no_pods + configuration(ROOT / "containerd", _RUN / "state", socket))
        processes.start(_NAME, "containerd", [binaries.ensure("containerd") / "containerd", "--config", config], _RUN / "logs")
        wait(socket, _RUN / "logs")
        try:
            for image in missing:
                with step(f"unpacking {image.reference.rpartition('/')[2]} for the nodes"):
                    put(image, socket)
                _marker(image).parent.mkdir(parents=True, exist_ok=True)
                _marker(image).touch()
        finally:
            processes.end(lambda: processes.of(_NAME))
        for image in missing:
            _hollow(image)
        _share()


def _marker(image: images.Image) -> Path:
    return ROOT / "has" / image.manifest[0].removeprefix("sha256:")


def put(image: images.Image, socket: Path) -> None:
    """Import an image into a containerd that has all its layers but those of which the layout holds the content."""
    digest, manifest = image.manifest
    blobs = [digest, manifest["config"]["digest"], *(layer for layer, _ in image.layers if not _is_hollow(image.blob(layer)))]
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        index = Path(folder, "index.json")
        entry = {"mediaType": manifest["mediaType"], "digest": digest, "size": image.blob(digest).stat().st_size}
        entry["annotations"] = {"io.containerd.image.name": image.reference}
        index.write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
        layout = Path(folder, "oci-layout")
        layout.write_text('{"imageLayoutVersion":"1.0.0"}')
        options = ("--local", "--discard-unpacked-layers", "--snapshotter", "overlayfs")
        command = [str(word) for word in (*ctr(socket), "images", "import", *options, "-")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as importer:
            assert importer.stdin is not None and importer.stdout is not None
            try:
                with tarfile.open(fileobj=importer.stdin, mode="w|") as archive:
                    for path in (layout, index):
                        archive.add(path, path.name)
                    for blob in dict.fromkeys(blobs):
                        archive.add(image.blob(blob), f"blobs/sha256/{blob.removeprefix('sha256:')}")
                importer.stdin.close()
            except BrokenPipeError:
                pass
            said = importer.stdout.read().decode()
        if importer.returncode:
            raise CommandFailed(f"containerd refused {image.reference}: {said}")


def _is_hollow(blob: Path) -> bool:
    found = blob.stat()
    return found.st_size > 1_000_000 and found.st_blocks == 0


def _hollow(image: images.Image) -> None:
    """Leave a sparse file of the same size for each layer that is unpacked: it is there for buildah, and takes no room."""
    if image.layout != images.LAYOUT:
        return
    for layer, size in image.layers:
        if size > 1_000_000:
            image.blob(layer).write_bytes(b"")
            os.truncate(image.blob(layer), size)


def _share() -> None:
    """Make equal files of the images, the store and the Python environments one."""
    places = [images.STORAGE / "overlay", ROOT, environment.site_packages("trainer")]
    with step("linking what images and environments have in common"):
        run(["hardlink", "--quiet", "--ignore-time", "--minimum-size", "200K", *places])
    used = run(["du", "-sm", "--total", *places]).split()[-2]
    say(f"images, the nodes' copy of them and the Python environment take {int(used) / 1000:.1f} GB together")


def copy(root: Path) -> None:
    """Make a node's containerd root from the store: hard links, and metadata of its own."""
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    with locked("node-images"):
        run(["cp", "--archive", "--link", ROOT / "containerd", root])
        for name in _OWN:
            (root / name).unlink()
            shutil.copy2(ROOT / "containerd" / name, root / name)
