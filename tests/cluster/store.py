"""What the nodes start with: one containerd root with all images, of which each node gets a copy made of hard links.

A layer that buildah has unpacked is not packed, sent and unpacked again: containerd's snapshot of it is made of hard links, too.
So an image lies on the disk once, whatever the number of nodes.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from . import binaries, environment, images, processes
from .control_plane import wait_for
from .shell import CACHE, locked, run, say, step

ROOT = CACHE / "node-images"
_NAME = "finetune-store"
_RUN = Path("/run/finetune-local/store")
_MOST_IMAGES = 12
_OWN = ("io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db")
"""What containerd writes in place: each node has its own."""


def ctr(socket: Path) -> list[str | Path]:
    """The command that speaks to a containerd."""
    quiet = "CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1"  # it warns of cgroup v1 before each answer
    return ["env", quiet, binaries.ensure("containerd") / "ctr", "--address", socket, "--namespace", "k8s.io"]


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
        if len(list(ROOT.glob("has/*"))) > _MOST_IMAGES:  # made anew in seconds, without what nothing needs any more
            shutil.rmtree(ROOT)
            missing = wanted
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
        places = [images.STORAGE / "overlay", ROOT, environment.site_packages("trainer")]
        used = run(["du", "-sm", "--total", *places]).split()[-2]
        say(f"images, the nodes' copy of them and the Python environment take {int(used) / 1000:.1f} GB together")


def _marker(image: images.Image) -> Path:
    return ROOT / "has" / _digest(image.manifest)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def put(image: images.Image, socket: Path) -> None:
    """Put an image into a containerd: snapshots of its layers from hard links, then its manifest and configuration."""
    snapshots = [*ctr(socket), "snapshots", "--snapshotter", "overlayfs"]
    there = {line.split()[0] for line in run([*snapshots, "ls"]).splitlines()[1:]}
    chain = ""
    for layer, _ in image.layers:
        parent, chain = chain, f"sha256:{_digest(f'{chain} {layer}')}" if chain else layer  # OCI image spec, "Layer ChainID"
        if chain not in there:
            made = f"linked-{chain}"
            mount = json.loads(run([*snapshots, "prepare", "--mounts", made, *([parent] if parent else [])]))[0]
            run(["cp", "--archive", "--link", f"{images.unpacked(layer)}/.", _upper(mount)])
            run([*snapshots, "commit", chain, made])
    blobs = {f"blobs/sha256/{_digest(text)}": text for text in (image.manifest, image.config)}
    entry = {
        "mediaType": json.loads(image.manifest)["mediaType"],
        "digest": f"sha256:{_digest(image.manifest)}",
        "size": len(image.manifest),
    }
    entry["annotations"] = {"io.containerd.image.name": image.reference}
    index = json.dumps({"schemaVersion": 2, "manifests": [entry]})
    with tempfile.NamedTemporaryFile(dir=CACHE, suffix=".tar") as file, tarfile.open(file.name, mode="w") as archive:
        for name, text in {"oci-layout": '{"imageLayoutVersion":"1.0.0"}', "index.json": index, **blobs}.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
        archive.close()
        run([*ctr(socket), "images", "import", "--local", "--snapshotter", "overlayfs", file.name])


def _upper(mount: dict[str, Any]) -> Path:
    """The folder that a snapshot in the making is written to, from the mount that containerd asks for."""
    upper = [option.removeprefix("upperdir=") for option in mount["Options"] if option.startswith("upperdir=")]
    return Path(upper[0] if upper else mount["Source"])  # the lowest one is a bind mount


def copy(root: Path) -> None:
    """Make a node's containerd root from the store: hard links, and metadata of its own."""
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    with locked("node-images"):
        run(["cp", "--archive", "--link", ROOT / "containerd", root])
        for name in _OWN:
            (root / name).unlink()
            shutil.copy2(ROOT / "containerd" / name, root / name)
