"""What the machine must have, looked at before anything is downloaded: each failure is one line that says what to do."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from .shell import CACHE

LOCAL_ADDRESSES = ("localhost", "127.0.0.1", "172.30.0.1")
"""Where the local cluster answers; a proxy cannot reach them."""
GIGABYTES = {"python-trainer": 7, "python-vllm": 2, "kubernetes-1.37": 4, "node-images": 18}
"""Room that is needed while a part of the cache is made, by its name."""


def with_kind() -> bool:
    """Whether a Docker engine runs (the client alone is not enough) and kind is at hand: then neither root nor namespaces are needed."""
    if not (shutil.which("kind") and shutil.which("docker")):
        return False
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=20, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def needed(cache: Path) -> int:
    """Gigabytes of disk that what is not cached yet takes."""
    made = {path.name for path in cache.glob("*") if path.is_dir() and path.suffix != ".partial"}
    return sum(size for name, size in GIGABYTES.items() if not any(found.startswith(name) for found in made))


def problem(
    *, root: bool, machine: str, namespaces: bool, free: float, need: float, cache: Path, environment: Mapping[str, str], kind: bool
) -> str | None:
    """The first thing that is missing, and what to do about it; None when all is there. Sizes are in gigabytes."""
    if free < need:
        return (
            f"{need:.0f} GB of disk are needed for {cache}, {free:.0f} GB are free: make room, or set FINETUNE_CACHE to a folder with more"
        )
    proxy = next((name for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY") if environment.get(name)), None)
    direct = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if proxy and direct != "*" and (missing := [address for address in LOCAL_ADDRESSES if address not in direct.split(",")]):
        return f"{proxy} is set, and would be asked for the cluster on this machine: export NO_PROXY={','.join([*filter(None, [direct]), *missing])}"
    if kind:
        return None
    if machine != "x86_64":
        return f"the local cluster is made for x86_64, this is {machine}: install Docker and kind"
    if not root:
        return "the local cluster needs root (network namespaces, containerd): run as root, or install Docker and kind"
    if not namespaces:
        return "network namespaces cannot be made here (`unshare --net true` fails): run on a machine or in a container with CAP_SYS_ADMIN, or install Docker and kind"
    return None


def check() -> None:
    """Exit with one line when something is missing."""
    place = next(parent for parent in [CACHE, *CACHE.parents] if parent.exists())
    found = problem(
        root=os.geteuid() == 0,
        machine=platform.machine(),
        namespaces=subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode == 0,
        free=shutil.disk_usage(place).free / 1e9,
        need=needed(CACHE),
        cache=CACHE,
        environment=os.environ,
        kind=with_kind(),
    )
    if found:
        raise SystemExit(f"this machine cannot run it: {found}")
