"""From a published version to an answer: real replicas with vLLM and nginx on real kubelets, verified, asked through the gateway."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from openai import APIStatusError, NotFoundError, OpenAI

from finetune_api import API_VERSION, names
from tests.cluster import helm, images, loader
from tests.cluster.control_plane import free_port
from tests.cluster.local import LocalCluster, kubectl
from tests.cluster.shell import REPO
from tests.e2e.conftest import User
from tests.e2e.test_models import MODEL, line, model, states, version_job

ENDPOINT, BROKEN = "chat", "broken"
SPOIL = """
import hashlib, json, pathlib, shutil, sys
from safetensors.torch import load_file, save_file
source, target = map(pathlib.Path, sys.argv[1:])
shutil.rmtree(target, ignore_errors=True)
shutil.copytree(source, target)
for record in target.glob("records/*.json"):
    told = json.loads(record.read_text())
    folder = target / "versions" / str(told["number"])
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    lines = [line for line in (folder / "SHA256SUMS").read_text().splitlines(True) if not line.endswith("adapter_model.safetensors\\n")]
    (folder / "SHA256SUMS").write_text("".join(sorted([*lines, f"{digest}  adapter_model.safetensors\\n"], key=lambda line: line[66:])))
    told["digest"] = "sha256:" + hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest()
    told["uri"] = told["uri"].replace(source.name, target.name)
    record.write_text(json.dumps(told))
"""
"""Copies a line of versions and puts a NaN into each, with digests that are right."""


@pytest.fixture(scope="module")
def serving(prepared: User) -> Iterator[User]:
    """The chart with engine, proxy and gateway."""
    assert isinstance(prepared.cluster, LocalCluster)
    engine, proxy = images.vllm(), images.nginx()
    for image in (engine, proxy):
        prepared.cluster.load(image)
    values = helm.local_values()
    values["serving"] = {
        "image": helm.image(engine.reference),
        "proxyImage": helm.image(proxy.reference),
        "args": ["--dtype=float32", "--enforce-eager"],
        "env": {"TORCHDYNAMO_DISABLE": "1"},  # the image has no C++ compiler
    }
    values["gateway"] = {"enabled": True, "replicas": 1}
    helm.install(prepared.cluster.kubeconfig, values)
    yield prepared
    prepared.kubectl("delete", "finetuneendpoints", "--all", "--wait", check=False)
    helm.install(prepared.cluster.kubeconfig)


def endpoint(base: str, replicas: int) -> dict[str, Any]:
    spec = {
        "base": {"uri": base},
        "models": [{"name": MODEL}, {"name": BROKEN}],
        "rollout": {"steps": []},
        "replicas": replicas,
        "gpusPerReplica": 0,
        "maxLoraRank": 16,
        "maxModelLength": 64,
        "resources": {"requests": {"cpu": "100m", "memory": "1Gi"}},
    }
    return {"apiVersion": API_VERSION, "kind": "FineTuneEndpoint", "metadata": {"name": ENDPOINT}, "spec": spec}


def served(user: User) -> dict[str, dict[str, Any]]:
    """What the endpoint says of each model."""
    status = json.loads(user.kubectl("get", "finetuneendpoint", ENDPOINT, "-o", "json")).get("status") or {}
    return {model["name"]: model for model in status.get("models", [])}


@contextlib.contextmanager
def gateway(user: User) -> Iterator[OpenAI]:
    """The gateway, as a user of this namespace reaches it from outside."""
    port = free_port()
    words = ["--kubeconfig", user.cluster.kubeconfig, "-n", helm.NAMESPACE, "port-forward", "svc/finetune-gateway", f"{port}:80"]
    token = user.kubectl("create", "token", "default", "--audience", "finetune-gateway").strip()
    forwarder = subprocess.Popen([kubectl(), *words], stdout=subprocess.DEVNULL)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=token, max_retries=0)
        ends = time.monotonic() + 30
        while True:
            try:
                client.models.list()
                break
            except Exception:
                if time.monotonic() > ends:
                    raise
                time.sleep(0.3)
        yield client
    finally:
        forwarder.kill()


def asked(client: OpenAI, model: str) -> tuple[str, str]:
    """Greedy answer, and the model that gave it."""
    messages = [{"role": "user", "content": "red"}]
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=8)  # type: ignore[arg-type]
    return answer.choices[0].message.content or "", answer.model


def scale_of(user: User, autoscaler: dict[str, Any]) -> dict[str, Any]:
    """What the autoscaler says of its target; there is nothing here that would hand it a metric."""
    found = json.loads(user.kubectl("get", "hpa", autoscaler["metadata"]["name"], "-o", "json"))
    return next((c for c in found.get("status", {}).get("conditions", []) if c["type"] == "AbleToScale"), {})


@pytest.mark.timeout(1500)
def test_versions_answer_as_they_were_evaluated(serving: User, served_base: str) -> None:
    user = serving
    user.apply(line())
    if not states(user):
        user.apply(version_job("first", served_base))
        assert user.ended("first", 600)["phase"] == "Succeeded", user.story()
    with loader.mounted(user.cluster, user.namespace, "published") as pod:
        user.kubectl("exec", pod, "--", "python3", "-c", SPOIL, f"/volume/lines/{MODEL}", f"/volume/lines/{BROKEN}")
    broken = line()
    broken["metadata"]["name"], broken["spec"]["storage"] = BROKEN, f"pvc://published/lines/{BROKEN}"
    user.apply(broken, endpoint(served_base, 2))
    user.kubectl("create", "rolebinding", "asks", "--clusterrole=finetune-gateway-use", f"--serviceaccount={user.namespace}:default")
    champion = model(user)["champion"]
    autoscaler = next(iter(yaml.safe_load_all((REPO / "examples" / "monitoring" / "autoscaling.yaml").read_text())))
    autoscaler["spec"]["scaleTargetRef"]["name"] = ENDPOINT
    user.apply(autoscaler)

    user.until("every replica is found to serve it", lambda: served(user)[MODEL]["verified"] == 2, 900)
    refused = user.until("what is broken is told", lambda: served(user)[BROKEN].get("mismatch"), 240)
    assert "adapter_model.safetensors" in refused and "NaN" in refused, refused

    scaled = user.until("an autoscaler reads its scale", lambda: scale_of(user, autoscaler), 60)
    assert (scaled["type"], scaled["status"]) == ("AbleToScale", "True"), scaled
    user.kubectl("delete", "hpa", autoscaler["metadata"]["name"])

    with gateway(user) as client:
        base, by_base = asked(client, ENDPOINT)
        tuned, by_tuned = asked(client, MODEL)
        assert (by_base, by_tuned) == (ENDPOINT, f"{MODEL}@{champion}") and base != tuned
        with pytest.raises(NotFoundError, match=MODEL):
            asked(client, MODEL[:-1])
        with pytest.raises(APIStatusError):
            asked(client, BROKEN)

        killed = user.kubectl("get", "pods", "-l", f"{names.LABEL_ENDPOINT}={ENDPOINT}", "-o", "name").split()[0]
        user.kubectl("delete", killed, "--wait=false")
        while served(user)[MODEL]["verified"] == 2:
            assert asked(client, MODEL) == (tuned, by_tuned)
        for _ in range(5):
            assert asked(client, MODEL) == (tuned, by_tuned), "one replica is left"
        user.until("the new replica is verified", lambda: served(user)[MODEL]["verified"] == 2, 600)

        for version in [*[number for number in states(user) if number != champion][:1], champion]:  # another, and back
            user.kubectl("patch", "finetunedmodel", MODEL, "--type=merge", "-p", json.dumps({"spec": {"champion": version}}))
            began = time.monotonic()
            user.until(f"{version} answers", lambda version=version: asked(client, MODEL)[1] == f"{MODEL}@{version}", 240)
            print(f"version {version} answers on both replicas {time.monotonic() - began:.1f} s after it was pinned")
    user.kubectl("delete", "finetuneendpoint", ENDPOINT, "--timeout=180s")
