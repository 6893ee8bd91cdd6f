"""The Kubernetes binaries, built from Debian's source package and cached.

Debian 12 ships the upstream 1.20 tree as source but packages kubectl alone, and there is no other source of
binaries that needs nothing but the Debian archive.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from . import debian
from .shell import CACHE, cached, digest_of, run, step

COMPONENTS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
REFLECT2 = Path("/usr/share/gocode/src/github.com/modern-go/reflect2")


def ensure() -> Path:
    """The folder with the five binaries; builds them (10 to 20 minutes on 2 cores) when absent."""
    return cached("kubernetes", digest_of(Path(__file__)), _build, keep=0)


def _build(target: Path) -> None:
    debian.ensure(debian.BUILD)
    work = target / "work"
    work.mkdir()
    with step("building Kubernetes from Debian's source (10 to 20 minutes, once)"):
        tree = debian.fetch_source("kubernetes", work)
        _mend_reflect2(tree)
        gopath = work / "go"
        link = gopath / "src" / "k8s.io" / "kubernetes"
        link.parent.mkdir(parents=True)
        link.symlink_to(tree)
        env = {
            "PATH": "/usr/lib/go-1.19/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "GO111MODULE": "off",
            "GOFLAGS": "",
            "GOPATH": str(gopath),
            "GOCACHE": str(work / "gocache"),
            "CGO_ENABLED": "0",
            "KUBE_GIT_VERSION": "v1.20.2",
            "KUBE_GIT_MAJOR": "1",
            "KUBE_GIT_MINOR": "20",
            "KUBE_GIT_TREE_STATE": "clean",
            "KUBE_GIT_COMMIT": "debian",
        }
        what = " ".join(f"cmd/{component}" for component in COMPONENTS)
        run(["make", f"WHAT={what}"], cwd=link, env=env, log=CACHE / "kubernetes-build.log")
        for component in COMPONENTS:
            shutil.copy2(link / "_output" / "bin" / component, target / component)
    run(["chmod", "-R", "u+w", work])
    shutil.rmtree(work)


def _mend_reflect2(tree: Path) -> None:
    """Replace the vendored reflect2 1.0.1, which reads Go's map internals wrongly from Go 1.18 on."""
    vendored = tree / "vendor" / "github.com" / "modern-go" / "reflect2"
    for old in vendored.glob("*.go"):
        old.unlink()
    for old in vendored.glob("*.s"):
        old.unlink()
    for new in [*REFLECT2.glob("*.go"), *REFLECT2.glob("*.s")]:
        if not new.name.endswith("_test.go"):
            shutil.copy2(new, vendored / new.name)
