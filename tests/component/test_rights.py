"""An operator of one namespace with exactly the rights that the chart grants it, on a server that enforces them."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from finetune_api import GROUP, VERSION
from finetune_api.endpoint import ENDPOINT_KIND, ENDPOINT_PLURAL
from finetune_api.queue import QUEUE_KIND, QUEUE_PLURAL
from tests.cluster.helm import NAMESPACE, rendered
from tests.component.conftest import Api, Kubelet, Operator, until
from tests.component.machines import GPU, Machines, gpu_job
from tests.component.replicas import Replicas

RIGHTS = ("ServiceAccount", "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding", "Secret")


def grant(api: Api, **values: Any) -> None:
    """The chart's rights with these values, and no others that it has."""
    found = rendered({"watchNamespaces": [api.namespace], **values}, name=api.namespace, namespace=NAMESPACE)
    kinds = [document for document in found if document["kind"] in RIGHTS]
    api.cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input=yaml.safe_dump_all(kinds))


@pytest.fixture
def account(api: Api, tmp_path: Path) -> Iterator[Path]:
    """A kubeconfig of the chart's service account; it has no rights yet."""
    if NAMESPACE not in [space.metadata.name for space in api.core.list_namespace().items]:
        api.core.create_namespace({"metadata": {"name": NAMESPACE}})
    api.core.create_namespaced_service_account(NAMESPACE, {"metadata": {"name": api.namespace}})
    token = api.core.create_namespaced_service_account_token(api.namespace, NAMESPACE, {"spec": {"expirationSeconds": 3600}}).status.token
    config = yaml.safe_load(api.cluster.kubeconfig.read_text())
    config["users"] = [{"name": user["name"], "user": {"token": token}} for user in config["users"]]
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    yield path
    for kind in ("clusterrolebinding", "clusterrole"):
        api.cluster.kubectl("delete", "--ignore-not-found", kind, f"{api.namespace}-cluster")


@pytest.fixture
def restricted(api: Api, account: Path, tmp_path: Path) -> Iterator[Operator]:
    """The operator with that account."""
    target = Operator(api, tmp_path / "operator.log")
    target.usual |= {"KUBECONFIG": str(account), "FINETUNE_SNAPSHOT_SECONDS": "0.5"}
    yield target
    if target.process is not None and target.process.poll() is None:
        target.kill()
    print(target.logs.read_text()[-8000:])


@pytest.fixture
def queue(api: Api) -> Iterator[str]:
    body = {
        "kind": QUEUE_KIND,
        "metadata": {"name": api.namespace},
        "spec": {"flavors": [{"name": "any", "resourceName": GPU, "nominalQuota": 1}]},
    }
    api.custom.create_cluster_custom_object(GROUP, VERSION, QUEUE_PLURAL, {"apiVersion": f"{GROUP}/{VERSION}", **body})
    yield api.namespace
    api.custom.delete_cluster_custom_object(GROUP, VERSION, QUEUE_PLURAL, api.namespace)


def test_what_the_operator_may_not_see_it_does_not_give_away(
    api: Api, kubelet: Kubelet, restricted: Operator, queue: str, priority: str
) -> None:
    grant(api, rbac={"queueing": False})
    restricted.start()
    api.create_job(gpu_job(queue), name="first")
    until("it waits", lambda: api.condition("Admitted", "first").get("reason") == "RightsMissing", 60)
    told = api.condition("Admitted", "first")["message"]
    for right in ("finetunequeues.finetune.dev", "nodes", "priorityclasses.scheduling.k8s.io", "rbac.queueing"):
        assert right in told
    assert "the operator may not list finetunequeues.finetune.dev, nodes, " in restricted.logs.read_text()
    with urllib.request.urlopen(f"http://127.0.0.1:{restricted.probes}/readyz", timeout=2) as answer:
        assert answer.status == 200, "it serves: stages without GPUs run"

    machines = Machines(api.core, ["one"], {GPU: "4"})
    try:
        kubelet.hold = {"train"}
        grant(api)
        until("it trains", lambda: api.status("first").get("phase") == "Training", 60)
        assert restricted.process is not None and restricted.process.poll() is None, "in the same process"
        api.create_job(gpu_job(queue), name="low")
        api.create_job(gpu_job(queue, priorityClassName=priority), name="high")
        until("quota holds", lambda: api.condition("Admitted", "low").get("reason") == "WaitingForQuota")
        until("priorities count", lambda: [api.status(name).get("queue", {}).get("position") for name in ("high", "low")] == [1, 2])

        def used() -> Any:
            found: dict[str, Any] = api.custom.get_cluster_custom_object(GROUP, VERSION, QUEUE_PLURAL, queue)
            return (found.get("status") or {}).get("used")

        until("the queue's status is kept", lambda: used() == 1, 20)
    finally:
        machines.close()


def test_backend_none_starts_at_once_with_no_cluster_role_at_all(api: Api, kubelet: Kubelet, restricted: Operator) -> None:
    grant(api, rbac={"cluster": False}, queueing={"backend": "none"})
    bindings = client.RbacAuthorizationV1Api(api.core.api_client).list_cluster_role_binding().items
    assert not [b for b in bindings if b.metadata.name.startswith(api.namespace)]
    restricted.start(FINETUNE_QUEUEING_BACKEND="none")
    api.create_job(gpu_job(None, nodes=2, gpus=8))
    until("it trains", lambda: api.status().get("phase") in ("Training", "Succeeded"), 60)
    assert "queueing.backend is none: every job starts at once" in restricted.logs.read_text()


def test_an_endpoint_is_served_with_the_charts_rights(api: Api, restricted: Operator, tmp_path: Path) -> None:
    """Its certificate is written with a right that reads no Secret; the authorities are in the chart's own."""
    grant(api)
    settings = {"FINETUNE_NAMESPACE": NAMESPACE, "FINETUNE_SERVING_AUTHORITY_SECRET": f"{api.namespace}-serving"}
    restricted.start(FINETUNE_ALLOW_CPU="true", **restricted.usual, **settings)
    spec = {"base": {"uri": "pvc://models/tiny"}, "gpusPerReplica": 0}
    body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": ENDPOINT_KIND, "metadata": {"name": "chat"}, "spec": spec}
    api.custom.create_namespaced_custom_object(GROUP, VERSION, api.namespace, ENDPOINT_PLURAL, body)
    replicas = Replicas(api, tmp_path)
    try:

        def endpoints() -> list[Any]:
            return list(api.custom.list_namespaced_custom_object(GROUP, VERSION, api.namespace, ENDPOINT_PLURAL)["items"])

        until("it is served", lambda: endpoints()[0].get("status", {}).get("readyReplicas") == 1, 60)
        account = f"system:serviceaccount:{NAMESPACE}:{api.namespace}"
        for verb in ("get", "list", "watch", "update", "patch", "delete"):
            words = ["auth", "can-i", verb, "secrets", "-n", api.namespace, "--as", account]
            assert "no" in api.cluster.kubectl(*words, check=False), verb
        api.custom.delete_namespaced_custom_object(GROUP, VERSION, api.namespace, ENDPOINT_PLURAL, "chat")
        until("it is gone", lambda: not endpoints())
    finally:
        replicas.close()
