"""What the local cluster takes from Debian's packages."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

from .shell import CommandFailed, cached, digest_of, run, step

#: command or file (a pattern) that shows that the package is there -> package
RUNTIME = {"runc": "runc", "iptables": "iptables", "conntrack": "conntrack", "ip": "iproute2", "mount": "mount", "nsenter": "util-linux"}
IMAGES = {"buildah": "buildah", "mmdebstrap": "mmdebstrap", "gcc": "gcc", "/usr/include/stdlib.h": "libc6-dev"}
FAKETIME = Path("/usr/lib", sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu", "faketime/libfaketime.so.1")
NGINX = {"nginx": "nginx"}
NODE = {"node": "nodejs", "npm": "npm"}
POSTGRESQL = {"/usr/lib/postgresql/*/bin/postgres": "postgresql"}
TESTS = {**NGINX, **NODE, **POSTGRESQL, str(FAKETIME): "libfaketime"}
"""What tests run beside the cluster."""


def _present(probe: str) -> bool:
    return any(Path("/").glob(probe[1:])) if probe.startswith("/") else shutil.which(probe) is not None


def ensure(packages: dict[str, str]) -> None:
    """Install the packages whose probe is missing. Services they bring are not started."""
    missing = sorted({package for probe, package in packages.items() if not _present(probe)})
    if not missing:
        return
    with step(f"installing Debian packages: {' '.join(missing)}"):
        policy = Path("/usr/sbin/policy-rc.d")
        ours = not policy.exists()
        if ours:  # what a package brings is not started as a service
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
        try:
            env = {"DEBIAN_FRONTEND": "noninteractive"}
            run(["apt-get", "update", "-q"], env=env)
            run(["apt-get", "install", "-qy", "--no-install-recommends", *missing], env=env)
        finally:
            if ours:
                policy.unlink(missing_ok=True)


def unpacked(package: str) -> Path:
    """A package's files in a folder of their own, nothing of it installed: a program that needs the C library alone."""

    def build(folder: Path) -> None:
        with step(f"unpacking the Debian package {package} (once)"):
            try:
                run(["apt-get", "download", package], cwd=folder)
            except CommandFailed:  # a fresh machine has no lists
                run(["apt-get", "update", "-q"])
                run(["apt-get", "download", package], cwd=folder)
            run(["dpkg-deb", "--extract", next(folder.glob("*.deb")), folder])

    return cached(f"debian-{package}", digest_of(package), build)


def archives(release: str) -> list[tuple[str, str]]:
    """(URI, suite) of a release in the Debian archives that this machine uses."""
    out = run(["apt-get", "indextargets", "Created-By: Packages", "Origin: Debian", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)"])
    rows = {tuple(line.split()[:2]) for line in out.splitlines() if line.endswith(" main")}
    return sorted({(uri, release + suffix) for uri, suite in rows for suffix in [suite[len(suite.partition("-")[0]) :]]})
