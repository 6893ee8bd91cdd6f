"""Servers that users have, as processes of this machine: Debian's docker-registry and PostgreSQL, MLflow's own server."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.cluster import debian, environment

USER, PASSWORD = "team", "s3cr3t-pass"
_HTPASSWD = f"{USER}:$2b$04$Gw.3T6sM34.R7xtuFM2o4uvf1tqPors9unEJn45/FCwEkwReJH1fa\n"
"""bcrypt, which docker-registry alone takes."""


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def process(command: list[str], folder: Path, alive: str, **env: str) -> Iterator[None]:
    """Run a server until the block ends; `alive` answers as soon as it is there."""
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **env}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(alive, timeout=5).close()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError((folder / "server.log").read_text()[-2000:]) from None
                time.sleep(0.1)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextlib.contextmanager
def registry(folder: Path, auth: dict[str, Any] | None = None) -> Iterator[str]:
    """HOST:PORT of a docker-registry; with a user and a password unless `auth` says otherwise."""
    (folder / "htpasswd").write_text(_HTPASSWD)
    host = f"127.0.0.1:{free_port()}"
    config = {
        "version": 0.1,
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "store")}, "delete": {"enabled": True}},
        "http": {"addr": host},
        "auth": auth or {"htpasswd": {"realm": "registry", "path": str(folder / "htpasswd")}},
    }
    (folder / "config.yml").write_text(json.dumps(config))
    program = debian.unpacked("docker-registry") / "usr" / "bin" / "docker-registry"
    with process([str(program), "serve", str(folder / "config.yml")], folder, f"http://{host}/v2/"):
        yield host


@contextlib.contextmanager
def postgresql() -> Iterator[int]:
    """Port of a PostgreSQL server on loopback, with the user `team` and no password."""
    debian.ensure(debian.POSTGRESQL)
    programs = max(Path("/usr/lib/postgresql").glob("*/bin/postgres")).parent
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "server.log").open("w") as log:
        # it does not run as root; the user is the package's
        who: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        if who:
            shutil.chown(folder, "postgres", "postgres")
        data, out = f"{folder}/data", {"stdout": log, "stderr": subprocess.STDOUT, "cwd": folder}
        made = [programs / "initdb", "--no-sync", "--auth=trust", "--username=team", "--encoding=UTF8", "--locale=C.UTF-8", "-D", data]
        subprocess.run(made, check=True, **out, **who)
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off"}
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        server = subprocess.Popen([programs / "postgres", "-D", data, *words], **out, **who)
        try:
            deadline = time.monotonic() + 60
            while subprocess.run([programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]).returncode:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError((Path(folder) / "server.log").read_text()[-2000:])
                time.sleep(0.1)
            yield port
        finally:
            server.send_signal(signal.SIGQUIT)  # at once, and nothing of it stays
            server.wait(30)


@contextlib.contextmanager
def mlflow(folder: Path) -> Iterator[str]:
    """HOST:PORT of a tracking server with SQLite, which serves files itself."""
    port = free_port()
    command, env = environment.mlflow()
    env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # four more processes
    places = ["--backend-store-uri", f"sqlite:///{folder}/db.sqlite", "--artifacts-destination", str(folder / "files")]
    where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with process([*command, "server", *where, *places], folder, f"http://127.0.0.1:{port}/health", **env):
        yield f"127.0.0.1:{port}"
