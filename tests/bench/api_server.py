"""An API server for a benchmark: Kubernetes in support as it comes, with a token, as pods have, and what its processes use."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import ssl
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from tests.cluster import binaries, control_plane, debian, processes
from tests.cluster.local import kubectl
from tests.cluster.shell import CACHE, run

INFLIGHT = ["--max-requests-inflight=800", "--max-mutating-requests-inflight=400"]
"""As Kueue's own runner sets them (kubernetes-sigs/kueue, test/performance/scheduler/runner)"""


@dataclass(frozen=True)
class APIServer:
    """One that answers, and etcd with it."""

    name: str
    state: Path
    admin: Path
    """Its kubeconfig, with a token: a client certificate is verified at each request"""
    url: str
    token: str
    trust: ssl.SSLContext

    def apply(self, definitions: Path) -> None:
        """Apply a folder of definitions, and give the server the time to serve them."""
        run([kubectl(), "--kubeconfig", self.admin, "apply", "--server-side", "-f", definitions])
        time.sleep(4)

    def used(self) -> dict[str, dict[str, float]]:
        """Core-seconds and peak MiB of each process, those that were started for the benchmark too, by the name of its command."""
        found = {}
        for process in map(psutil.Process, processes.of(self.name)):
            words, times = process.cmdline(), process.cpu_times()
            name = next((after for word, after in itertools.pairwise(words) if word.startswith("tests.bench.")), Path(words[0]).name)
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            found[name] = {"core_seconds": round(times.user + times.system, 1), "peak_mib": int(peak[1]) // 1024 if peak else 0}
        return found

    def core_seconds(self) -> float:
        """What all of them have used."""
        return sum(sum(process.cpu_times()[:2]) for process in map(psutil.Process, processes.of(self.name)))


@contextlib.contextmanager
def api_server(name: str) -> Iterator[APIServer]:
    """Start one, and end it with everything that carries its mark."""
    state = CACHE / "clusters" / name
    processes.end(lambda: processes.of(name))
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    debian.ensure(debian.RUNTIME)
    token = uuid.uuid4().hex
    (state / "tokens.csv").write_text(f'{token},bench,bench,"system:masters"\n')
    flags = [*INFLIGHT, f"--token-auth-file={state / 'tokens.csv'}"]
    try:
        authority, admin = control_plane.start(
            name, state, binaries.ensure(binaries.NEWEST), "127.0.0.1", extra_apiserver=flags, controllers=""
        )
        known = yaml.safe_load(admin.read_text())
        known["users"][0]["user"] = {"token": token}
        admin.write_text(yaml.safe_dump(known))
        url = known["clusters"][0]["cluster"]["server"]
        yield APIServer(name, state, admin, url, token, ssl.create_default_context(cafile=str(authority.path)))
    finally:
        processes.end(lambda: processes.of(name))
