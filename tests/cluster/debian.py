"""What the local cluster takes from Debian: packages and the Kubernetes source."""

from __future__ import annotations

import shutil
from pathlib import Path

from .shell import run, say, step

#: command or file that shows that the package is there -> package
RUNTIME = {
    "etcd": "etcd-server",
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "mount": "mount",
}
BUILD = {
    "/usr/lib/go-1.19/bin/go": "golang-1.19-go",
    "/usr/share/gocode/src/github.com/modern-go/reflect2/reflect2.go": "golang-github-modern-go-reflect2-dev",
    "rsync": "rsync",
    "make": "make",
    "gcc": "gcc",
    "/usr/include/stdlib.h": "libc6-dev",
    "patch": "patch",
    "dpkg-source": "dpkg-dev",
    "xz": "xz-utils",
}
IMAGES = {"mmdebstrap": "mmdebstrap", "gcc": "gcc", "/usr/include/stdlib.h": "libc6-dev"}


def _present(probe: str) -> bool:
    return Path(probe).exists() if probe.startswith("/") else shutil.which(probe) is not None


def ensure(packages: dict[str, str]) -> None:
    """Install the packages whose probe is missing. Services they bring are not started."""
    missing = sorted({package for probe, package in packages.items() if not _present(probe)})
    if not missing:
        return
    with step(f"installing Debian packages: {' '.join(missing)}"):
        policy = Path("/usr/sbin/policy-rc.d")
        ours = not policy.exists()
        if ours:  # containerd and etcd would otherwise be started by their packages
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
        try:
            env = {"DEBIAN_FRONTEND": "noninteractive"}
            run(["apt-get", "update", "-q"], env=env)
            run(["apt-get", "install", "-qy", "--no-install-recommends", *missing], env=env)
        finally:
            if ours:
                policy.unlink(missing_ok=True)


def source_lists() -> list[tuple[str, str]]:
    """(URI, suite) of the machine's own Debian archives."""
    out = run(["apt-get", "indextargets", "Created-By: Packages", "Origin: Debian", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)"])
    rows = [line.split() for line in out.splitlines() if line.strip()]
    return sorted({(uri, suite) for uri, suite, component in rows if component == "main"})


def fetch_source(package: str, into: Path) -> Path:
    """Unpack a Debian source package into a folder, without touching the machine's apt configuration."""
    state = into / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True)
    lines = [f"deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {uri} {suite} main" for uri, suite in source_lists()]
    (state / "sources.list").write_text("\n".join(lines) + "\n")
    own = [
        f"-oDir::Etc::SourceList={state}/sources.list",
        "-oDir::Etc::SourceParts=/dev/null",
        f"-oDir::State::Lists={state}/lists",
        f"-oDir::Cache={state}/cache",
        "-oAPT::Sandbox::User=root",
    ]
    say(f"fetching Debian source package {package}")
    run(["apt-get", *own, "update", "-q"])
    run(["apt-get", *own, "source", "-q", package], cwd=into)
    trees = [p for p in into.iterdir() if p.is_dir() and p.name.startswith(f"{package}-")]
    return trees[0]
