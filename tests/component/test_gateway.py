"""The gateway as a process, with the rights of the chart and no others, before a real API server and replicas on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from kubernetes import client

from finetune_api import API_VERSION, GROUP, VERSION
from finetune_api.endpoint import ENDPOINT_KIND, ENDPOINT_PLURAL
from tests.cluster.control_plane import free_port
from tests.cluster.helm import NAMESPACE
from tests.cluster.shell import REPO
from tests.component.cli import finetune
from tests.component.conftest import Api, until
from tests.component.test_rights import grant
from tests.gateway import Replica

ACCOUNT = "finetune-gateway"


def token_of(api: Api, name: str, namespace: str, *audiences: str) -> str:
    spec = {"expirationSeconds": 3600, **({"audiences": list(audiences)} if audiences else {})}
    return str(api.core.create_namespaced_service_account_token(name, namespace, {"spec": spec}).status.token)


class Process:
    """The gateway."""

    def __init__(self, api: Api, kubeconfig: Path, logs: Path, **more: Any) -> None:
        """`more`: settings of the gateway by their names, and other variables by theirs in capitals."""
        self.port, self.metrics = free_port(), free_port()
        settings = {"HOST": "127.0.0.1", "PORT": self.port, "METRICS_PORT": self.metrics, "LEAVE_SECONDS": 0.1}
        settings |= {"NAMESPACE": NAMESPACE, "WATCH_NAMESPACES": api.namespace}
        self.database = logs.with_name("gateway.db")
        settings |= {"DATABASE": f"sqlite:///{self.database}", "FLUSH_SECONDS": 0.2}
        settings |= {name.upper(): value for name, value in more.items() if name.islower()}
        env = {f"FINETUNE_GATEWAY_{name}": str(value) for name, value in settings.items()}
        env |= {name: str(value) for name, value in more.items() if name.isupper()}
        with logs.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "finetune_gateway"],
                env={**os.environ, "PYTHONPATH": f"{REPO}/operator", "KUBECONFIG": str(kubeconfig), **env},
                stdout=sink,
                stderr=sink,
            )

    def ready(self) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/readyz", timeout=2) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            return refused.code, refused.read().decode()
        except OSError:
            return 0, ""


@contextlib.contextmanager
def account(api: Api, tmp_path: Path) -> Iterator[Path]:
    """A kubeconfig of the chart's service account, without any right; what the chart granted it is gone afterwards."""
    if NAMESPACE not in [space.metadata.name for space in api.core.list_namespace().items]:
        api.core.create_namespace({"metadata": {"name": NAMESPACE}})
    api.cluster.kubectl(
        "apply",
        "-f",
        "-",
        input=yaml.safe_dump({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": ACCOUNT, "namespace": NAMESPACE}}),
    )
    config = yaml.safe_load(api.cluster.kubeconfig.read_text())
    token = token_of(api, ACCOUNT, NAMESPACE)
    config["users"] = [{"name": user["name"], "user": {"token": token}} for user in config["users"]]
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    yield path
    for kind in ("clusterrolebinding", "clusterrole"):
        names = [f"{ACCOUNT}-{part}" for part in ("reviews", "use")] + [f"{api.namespace}-cluster"]
        api.cluster.kubectl("delete", "--ignore-not-found", kind, *names)
    api.cluster.kubectl("delete", "--ignore-not-found", "-n", NAMESPACE, "secret", "finetune-gateway-keys")


@pytest.fixture
def gateway(api: Api, tmp_path: Path) -> Iterator[Process]:
    """Started before it has any right."""
    with account(api, tmp_path) as path:
        started = Process(api, path, tmp_path / "gateway.log")
        yield started
        if started.process.poll() is None:
            started.process.kill()
        print((tmp_path / "gateway.log").read_text()[-6000:])


def _may_use(api: Api, name: str) -> None:
    """A service account that may use the endpoint `chat`, and nothing else."""
    api.core.create_namespaced_service_account(api.namespace, {"metadata": {"name": name}})
    rule = {"apiGroups": [GROUP], "resources": [ENDPOINT_PLURAL], "resourceNames": ["chat"], "verbs": ["use"]}
    rbac = client.RbacAuthorizationV1Api(api.core.api_client)
    rbac.create_namespaced_role(api.namespace, {"metadata": {"name": name}, "rules": [rule]})
    subject = {"kind": "ServiceAccount", "name": name, "namespace": api.namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    rbac.create_namespaced_role_binding(api.namespace, {"metadata": {"name": name}, "roleRef": role, "subjects": [subject]})


def _told(api: Api, address: str, state: str) -> None:
    """What the operator would write of one replica."""
    pod = {"name": "chat-0", "address": address, "ready": True, "models": [{"name": "support-bot@3", "state": state}]}
    status = {"pods": [pod], "models": [{"name": "support-bot", "version": 3, "verified": 1, "replicas": 1}]}
    api.custom.patch_namespaced_custom_object_status(GROUP, VERSION, api.namespace, ENDPOINT_PLURAL, "chat", {"status": status})


async def test_from_the_status_of_an_endpoint_to_an_answer(api: Api, gateway: Process) -> None:
    def not_allowed() -> bool:
        code, why = gateway.ready()
        return code == 503 and "forbidden" in why

    await asyncio.to_thread(until, "it says what it may not", not_allowed)
    grant(api, gateway={"enabled": True})
    await asyncio.to_thread(until, "it is ready, in the same process", lambda: gateway.ready() == (200, "ok"))
    body = {"apiVersion": API_VERSION, "kind": ENDPOINT_KIND, "metadata": {"name": "chat"}, "spec": {"base": {"uri": "hf://org/base"}}}
    api.custom.create_namespaced_custom_object(GROUP, VERSION, api.namespace, ENDPOINT_PLURAL, body)
    _may_use(api, "friend")
    key = (await asyncio.to_thread(finetune, api, "keys", "create", "ci", "--expires", "1d")).strip().splitlines()[-1]
    assert key.startswith("ftk_")

    async with Replica().serving() as replica:
        _told(api, replica.address, "Verified")

        async def asked(token: str, *, stream: bool = False) -> Any:
            async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{gateway.port}/v1", api_key=token, max_retries=0) as user:
                try:
                    if stream:
                        chunks = await user.chat.completions.create(model="support-bot", messages=[], stream=True)
                        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
                    return (await user.chat.completions.create(model="support-bot", messages=[])).model
                except openai.APIStatusError as refused:
                    return refused.code

        async def comes(token: str, wanted: Any) -> None:
            async with asyncio.timeout(20):
                while await asked(token) != wanted:  # noqa: ASYNC110  # of another process
                    await asyncio.sleep(0.1)

        await comes(key, "support-bot@3")
        assert await asked(key, stream=True) == "replica-0 replica-1 replica-2 "
        assert await asked(token_of(api, "friend", api.namespace)) == "support-bot@3"
        assert await asked(token_of(api, "friend", api.namespace, "finetune-gateway")) == "support-bot@3"
        assert await asked(token_of(api, "default", api.namespace)) == "model_not_found"
        assert await asked(token_of(api, "friend", api.namespace, "somebody-else")) == "invalid_api_key"
        _told(api, replica.address, "Mismatch")
        await comes(key, "no_replica")
        _told(api, replica.address, "Verified")
        await comes(key, "support-bot@3")
        assert "ci" in await asyncio.to_thread(finetune, api, "keys", "list", "-o", "name", namespaced=False)
        await asyncio.to_thread(finetune, api, "keys", "revoke", "ci", namespaced=False)
        await comes(key, "invalid_api_key")

        def usage(token: str) -> list[dict[str, Any]]:
            where = ("--url", f"http://127.0.0.1:{gateway.port}", "--token", token)
            found: list[dict[str, Any]] = json.loads(finetune(api, "usage", *where, "-o", "json"))["rows"]
            return found

        friend = f"system:serviceaccount:{api.namespace}:friend"
        for _ in range(50):
            seen = await asyncio.to_thread(usage, token_of(api, "friend", api.namespace))
            if [row["requests"] for row in seen] == [2]:
                break
        assert [(row["user"], row["completionTokens"]) for row in seen] == [(friend, 10)], "one endpoint is not the namespace"
        assert await asyncio.to_thread(usage, token_of(api, "default", api.namespace)) == []
    events = [event.message for event in api.core.list_namespaced_event(NAMESPACE).items if event.reason == "APIKeyCreated"]
    assert any(f"API key ci for namespace {api.namespace} by " in message for message in events)
    gateway.process.terminate()
    assert await asyncio.to_thread(gateway.process.wait, 20) == 0
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        kept = dict(database.execute('SELECT "key" || "user", sum(requests) FROM finetune_usage GROUP BY 1').fetchall())
    assert kept.keys() == {"ci", friend} and kept[friend] == 2 and kept["ci"] >= 3
