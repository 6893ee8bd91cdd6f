"""The real nginx in front of a real replica: what users reach, what the operator does, and what nobody does."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_api.serving import AGENT_LOCAL_PORT, AGENT_PORT, ENGINE_LOCAL_PORT, USER_PORT, ReplicaPaths
from finetune_operator.resources.proxy import proxy_config
from tests.cluster import debian
from tests.cluster.certificates import Authority
from tests.cluster.control_plane import free_port

from .conftest import Replica
from .engine import BASE, running

JSON = {"content-type": "application/json"}


@dataclass
class Proxy:
    users: int
    operator: int
    authority: Authority

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """As a user; the path goes out as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.users, timeout=60)
        return _answer(connection, method, path, body)

    def manage(self, method: str, path: str, body: Any = None, certificate: tuple[Path, Path] | None = None) -> tuple[int, bytes]:
        """As the operator, or as somebody with another certificate, or none."""
        context = ssl.create_default_context(cafile=str(self.authority.path))
        if certificate is not None:
            context.load_cert_chain(*certificate)
        return _answer(http.client.HTTPSConnection("localhost", self.operator, timeout=60, context=context), method, path, body)


def _answer(connection: http.client.HTTPConnection, method: str, path: str, body: Any) -> tuple[int, bytes]:
    try:
        connection.request(method, path, None if body is None else json.dumps(body), JSON)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def proxy(replica: Replica, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    if shutil.which("nginx") is None and os.geteuid() != 0:
        pytest.skip("nginx is not installed, and only root may install it")
    debian.ensure(debian.NGINX)
    folder = tmp_path_factory.mktemp("proxy")
    found = Proxy(free_port(), free_port(), Authority(folder))
    certificate, key = found.authority.issue("tls", "replica", hosts=["localhost"])
    config = proxy_config(user_body_bytes=100_000)
    agent = int(replica.agent.rpartition(":")[2])
    # the pod's addresses and files are this machine's, where several replicas may run
    for old, new in {
        f"listen {USER_PORT};": f"listen 127.0.0.1:{found.users};",
        f"listen {AGENT_PORT} ssl;": f"listen 127.0.0.1:{found.operator} ssl;",
        f"127.0.0.1:{ENGINE_LOCAL_PORT}": f"127.0.0.1:{replica.engine.port}",
        f"127.0.0.1:{AGENT_LOCAL_PORT}": f"127.0.0.1:{agent}",
        " /tmp/": f" {folder}/",
        f" {ReplicaPaths.TLS}/": f" {folder}/",
    }.items():
        assert old in config
        config = config.replace(old, new)
    (folder / "nginx.conf").write_text(config)
    assert (certificate.name, key.name) == ("tls.crt", "tls.key")
    with running(["nginx", "-c", folder / "nginx.conf", "-e", "stderr"], folder):
        for _ in range(100):
            try:
                found.ask("GET", "/")
                break
            except OSError:
                time.sleep(0.1)
        yield found
    assert "secret words" not in (folder / "nginx.log").read_text()


def test_users_reach_the_listed_paths(proxy: Proxy, replica: Replica) -> None:
    replica.until(lambda report: report.ready)
    chat = {"model": BASE, "messages": [{"role": "user", "content": "secret words"}], "max_tokens": 4}
    assert proxy.ask("GET", "/health")[0] == 200
    assert proxy.ask("GET", "/v1/models")[0] == 200
    assert proxy.ask("POST", "/v1/chat/completions", chat)[0] == 200
    assert proxy.ask("POST", "/v1/completions", {"model": BASE, "prompt": "secret words", "max_tokens": 4})[0] == 200


def test_a_stream_comes_piece_by_piece(proxy: Proxy) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.users, timeout=60)
    chat = {"model": BASE, "messages": [{"role": "user", "content": "red"}], "max_tokens": 60, "stream": True, "ignore_eos": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(chat), JSON)
    response = connection.getresponse()
    times = [time.monotonic() for line in response if line.startswith(b"data:")]
    connection.close()
    assert len(times) > 30 and times[-1] - times[0] > 5 * (times[1] - times[0]), "not all at once"


@pytest.mark.parametrize(
    "request_line",
    [
        "POST /v1/load_lora_adapter",
        "POST /v1/unload_lora_adapter",
        "GET /metrics",
        "GET /openapi.json",
        "GET /adapters",
        "POST /invocations",
        "POST /tokenize",
        "GET /models",
        "PUT /models",
        "GET /v1/chat/completions",
        "DELETE /v1/models",
        "POST //v1/completions",
        "POST /v1//completions",
        "POST /v1/completions/",
        "POST /v1/completions?x=1",
        "GET /v1/../metrics",
        "GET /v1/models/../../metrics",
        "GET /v1/%2e%2e/metrics",
        "GET /v1/models/%2e%2e/%2e%2e/metrics",
        "GET /v1%2fmodels",
        "GET /v1/models%00",
        "GET /v1/models;/../../metrics",
        "GET /health/../metrics",
        "POST /metrics/../v1/load_lora_adapter",
        "POST /v1/completions/../load_lora_adapter",
    ],
)
def test_users_reach_nothing_else(proxy: Proxy, request_line: str) -> None:
    method, path = request_line.split(" ", 1)
    status, body = proxy.ask(method, path, {} if method == "POST" else None)
    assert status in (400, 404) and b"nginx" in body, "the proxy's own word, no upstream's"


def test_a_body_that_is_too_large_ends_at_the_proxy(proxy: Proxy) -> None:
    assert proxy.ask("POST", "/v1/completions", {"model": BASE, "prompt": "x" * 200_000})[0] == 413


def test_the_operator_comes_in_with_its_certificate(proxy: Proxy, replica: Replica, tmp_path: Path) -> None:
    own = proxy.authority.issue("operator", "finetune-operator")
    strange = Authority(tmp_path).issue("stranger", "finetune-operator")
    status, body = proxy.manage("GET", "/models", certificate=own)
    assert status == 200 and json.loads(body)["baseFingerprint"] == replica.shelf.fingerprint
    assert proxy.manage("PUT", "/models", {"models": []}, own)[0] == 200
    assert proxy.manage("GET", "/health", certificate=own)[0] == 404
    assert proxy.manage("POST", "/v1/completions", {}, own)[0] == 404
    for nobody in (None, strange):
        status, body = proxy.manage("PUT", "/models", {"models": []}, nobody)
        assert status == 400 and b"certificate" in body
