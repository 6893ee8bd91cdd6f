"""The manifests of an endpoint, and the certificates between operator and replicas."""

from __future__ import annotations

import json
import os
import ssl
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from aiohttp import ClientConnectorError, ClientSession, ServerDisconnectedError

from finetune_api import names
from finetune_api.serving import ReplicaFile
from finetune_api.tuned_model import FineTunedModelSpec, FineTunedModelStatus
from finetune_api.validation import parse_endpoint
from finetune_operator.cluster.authority import Authority, ensure_authority, host_of, new_authority
from finetune_operator.cluster.errors import APIError
from finetune_operator.model.endpoint import ModelLine
from finetune_operator.resources.endpoint import EndpointRef, manifests
from finetune_operator.settings import Settings
from tests.factory import UID

GOLDEN = Path(__file__).parent / "golden" / "endpoint.yaml"
SETTINGS = Settings(
    network_policies=True,
    trainer_image="registry.example/finetune-trainer:1",
    serving_image="registry.example/vllm:1",
    serving_proxy_image="registry.example/nginx:1",
    serving_args=("--enforce-eager",),
    image_pull_secrets=("pull",),
    operator_labels=("app.kubernetes.io/name=finetune-operator",),
    gateway_labels=("app.kubernetes.io/name=finetune-gateway",),
)
SPEC: dict[str, Any] = {
    "base": {"uri": "hf://org/base@main", "secretRef": {"name": "hub"}},
    "models": [{"name": "support"}],
    "replicas": 2,
    "gpusPerReplica": 2,
    "maxLoraRank": 40,
    "maxModelLength": 4096,
    "resources": {"requests": {"cpu": "8"}, "limits": {"memory": "64Gi"}, "sharedMemory": "8Gi"},
    "scheduling": {"nodeSelector": {"gpu": "h100"}, "tolerations": [{"key": "gpu", "operator": "Exists"}], "priorityClassName": "serving"},
}
LINES = [
    ModelLine(name="code", spec=FineTunedModelSpec.model_validate({"storage": "pvc://published/code"}), status=FineTunedModelStatus()),
    ModelLine(
        name="support",
        spec=FineTunedModelSpec.model_validate({"storage": "s3://models/support", "secretRef": {"name": "s3"}}),
        status=FineTunedModelStatus(),
    ),
]


def made(settings: Settings = SETTINGS, **spec: Any) -> dict[str, dict[str, Any]]:
    parsed = parse_endpoint({"spec": {**SPEC, **spec}})
    found = manifests(EndpointRef("chat", "team-a", UID, parsed), LINES, settings, "chat-endpoint-tls-1")
    return {manifest["kind"]: manifest for manifest in found}


def test_golden() -> None:
    text = yaml.safe_dump_all(made().values(), sort_keys=False, width=120)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert GOLDEN.read_text() == text, "run with UPDATE_GOLDEN=1 and review the difference"


@pytest.mark.parametrize("version", ["1.35", "1.37"])
def test_manifests_are_valid(version: str) -> None:
    for backend in ("builtin", "kueue", "volcano"):
        settings = Settings(queueing_backend=backend, network_policies=True, authorities="PEM")
        for manifest in made(settings, scheduling={"queue": "serving"}).values():
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_pods_satisfy_the_restricted_standard() -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    pod = made()["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert {kind for volume in pod["volumes"] for kind in set(volume) - {"name"}} <= {
        "configMap",
        "emptyDir",
        "persistentVolumeClaim",
        "secret",
    }
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted <= {volume["name"] for volume in pod["volumes"]}
        assert ("tls" in mounted) == (container["name"] == "proxy"), "the key is the proxy's alone"
        secret = any(name.startswith("secret-") for name in mounted)
        assert secret == (container["name"] in ("base", "agent")), "and the users' Secrets those that fetch"
        writable = {mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert writable <= ({"tmp", "models"} if container["name"] in ("base", "agent") else {"tmp", "shared-memory"})


def test_the_engine_is_on_the_loopback_and_reserves_what_it_has_a_size_for() -> None:
    pod = made()["Deployment"]["spec"]["template"]["spec"]
    engine = pod["containers"][0]
    words = engine["args"]
    told = {flag: words[index + 1] for index, flag in enumerate(words[:-1]) if flag.startswith("--")}
    assert (told["--host"], told["--max-lora-rank"], told["--tensor-parallel-size"]) == ("127.0.0.1", "64", "2")
    assert (told["--served-model-name"], told["--max-model-len"]) == ("chat", "4096") and words[-1] == "--enforce-eager"
    assert {"name": "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "value": "True"} in engine["env"]
    assert engine["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": "2"}
    assert "ports" not in engine
    cpu = made(Settings(allow_cpu=True), gpusPerReplica=0)["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert "nvidia.com/gpu" not in cpu["resources"].get("limits", {}) and "--tensor-parallel-size" not in cpu["args"]
    assert {"name": "VLLM_CPU_KVCACHE_SPACE", "value": "1"} in cpu["env"] and "VLLM_CPU_KVCACHE_SPACE" not in str(engine["env"])


def test_the_replica_file_says_where_everything_is_mounted() -> None:
    found = made()
    file = ReplicaFile.model_validate_json(found["ConfigMap"]["data"]["replica.json"])
    pod = found["Deployment"]["spec"]["template"]["spec"]
    mounts = {mount["mountPath"] for mount in pod["containers"][1]["volumeMounts"]}
    assert set(file.sources) == {"pvc://published"} and set(file.secrets) == {"model", "model-support"}
    assert {*file.sources.values(), *file.secrets.values()} <= mounts
    assert (file.name, file.max_lora_rank) == ("chat", 40)
    items = {v["secret"]["secretName"]: [i["key"] for i in v["secret"].get("items", [])] for v in pod["volumes"] if "secret" in v}
    assert items == {"chat-endpoint-tls-1": [], "hub": ["token"], "s3": ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]}


def test_who_may_reach_a_replica() -> None:
    rules = made()["NetworkPolicy"]["spec"]["ingress"]
    assert [[port["port"] for port in rule["ports"]] for rule in rules] == [[8080], [8443]]
    home = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "finetune-system"}}}
    assert rules[1]["from"] == [{**home, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "finetune-operator"}}}]
    assert rules[0]["from"][0] == {"podSelector": {}}
    assert "NetworkPolicy" not in made(Settings())


def test_replicas_of_others_have_one_agent_and_nothing_that_users_reach() -> None:
    found = made(engine="external", external={"service": "vllm"})
    assert list(found) == ["ConfigMap", "NetworkPolicy", "Deployment"]
    spec = found["Deployment"]["spec"]
    pod = spec["template"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    agent, proxy = pod["containers"]
    assert agent["args"] == ["agent", "--external"] and [port["containerPort"] for port in proxy["ports"]] == [8443]
    assert "gpu" not in json.dumps([container["resources"] for container in pod["containers"]])
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}
    [rule] = found["NetworkPolicy"]["spec"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == [8443]
    config = found["ConfigMap"]["data"]["nginx.conf"]
    assert "listen 8443 ssl;" in config and "listen 8080" not in config and "127.0.0.1:8000" not in config
    for manifest in found.values():
        kubernetes_validate.validate(manifest, "1.37", strict=True)


def test_another_model_of_another_claim_is_another_template_and_a_label_is_not() -> None:
    parsed = parse_endpoint({"spec": SPEC})
    ref = EndpointRef("chat", "team-a", UID, parsed)

    def digest(lines: list[ModelLine]) -> str:
        found = manifests(ref, lines, SETTINGS, "tls")[-1]["metadata"]["annotations"][names.ANNOTATION_HASH]
        return str(found)

    assert digest(LINES) != digest(LINES[:1])
    before, after = (made(**spec)["Deployment"]["spec"]["template"] for spec in ({}, {"base": {**SPEC["base"], "uri": "hf://org/other"}}))
    assert before["spec"] == after["spec"] and before != after, "replica.json is read when a container starts"
    same = ModelLine(
        name="more", spec=FineTunedModelSpec.model_validate({"storage": "pvc://published/more"}), status=FineTunedModelStatus()
    )
    assert digest(LINES) == digest([*LINES, same]), "what lies in a claim that is mounted already takes no restart"


# certificates

NOW = datetime.now(UTC)


class Shown(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


def replica(files: dict[str, str], folder: Path) -> HTTPServer:
    """A server that shows an endpoint's certificate and wants the operator's, as nginx is told to."""
    for name, text in files.items():
        (folder / name).write_text(text)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "ca.crt"))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    server = HTTPServer(("127.0.0.1", 0), Shown)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


async def asked(server: HTTPServer, context: ssl.SSLContext, uid: str) -> bool:
    async with ClientSession() as session:
        try:
            url = f"https://127.0.0.1:{server.server_port}/"
            async with session.get(url, ssl=context, server_hostname=host_of(uid)) as answer:
                return answer.status == 200
        except (ClientConnectorError, ServerDisconnectedError, ssl.SSLError, OSError):
            return False


async def test_operator_and_replica_believe_each_other_and_nobody_else(tmp_path: Path) -> None:
    authority = new_authority(NOW)
    server = replica(files := authority.replica("uid-a", NOW), tmp_path)
    try:
        assert await asked(server, authority.client_context(NOW), "uid-a")
        assert not await asked(server, authority.client_context(NOW), "uid-b"), "another endpoint's replica"
        assert not await asked(server, new_authority(NOW).client_context(NOW), "uid-a"), "another cluster's operator"
        trusting = ssl.create_default_context(cadata=authority.replicas.certificate)
        assert not await asked(server, trusting, "uid-a"), "nobody"
        pem = tmp_path / "stolen.pem"
        pem.write_text(files["tls.key"] + files["tls.crt"])
        trusting.load_cert_chain(pem)
        assert not await asked(server, trusting, "uid-a"), "a tenant with the key of its own endpoint"
    finally:
        server.shutdown()


class Secrets:
    """A Secret, as the API server keeps it."""

    def __init__(self, lost: int = 0) -> None:
        self.secret: dict[str, Any] = {"metadata": {"name": "authority"}}
        self.lost = lost

    async def get(self, *_: str) -> dict[str, Any]:
        return dict(self.secret)

    async def replace(self, manifest: dict[str, Any]) -> dict[str, Any]:
        if self.lost:
            self.lost -= 1
            self.secret["data"] = (await Secrets.winner()).secret["data"]
            raise APIError(409, "Conflict", "somebody else was faster")
        self.secret = manifest
        return manifest

    @staticmethod
    async def winner() -> Secrets:
        other = Secrets()
        await ensure_authority(other, Settings(serving_authority_secret="authority"))  # type: ignore[arg-type]
        return other


async def test_the_authorities_are_kept_and_who_loses_takes_the_winners() -> None:
    settings = Settings(serving_authority_secret="authority")
    server = Secrets(lost=1)
    first: Authority = await ensure_authority(server, settings)  # type: ignore[arg-type]
    assert first == await ensure_authority(server, settings) and first.clients != first.replicas  # type: ignore[arg-type]
    assert first.digest() != new_authority(NOW).digest()
