"""The admission webhooks behind a real API server: the chart's own configuration, with the test's address in place of the Service."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from kubernetes import client

from finetune_api import names
from finetune_operator.servers import certificate
from finetune_operator.servers.webhooks import MUTATE
from finetune_operator.settings import Settings
from tests.cluster.local import LocalCluster, kubectl
from tests.component.conftest import Api, Operator, until
from tests.factory import MINIMAL, merged
from tests.unit.test_chart import render

NAME = "component"
WITH_WEBHOOKS = pytest.mark.operator(FINETUNE_WEBHOOK_CONFIGURATION=NAME, FINETUNE_CERTIFICATE_SECONDS="0.5")
pytestmark = WITH_WEBHOOKS
CONFIGURATIONS = ("ValidatingWebhookConfiguration", "MutatingWebhookConfiguration")
Start = Callable[..., None]


@pytest.fixture(scope="module")
def configurations(cluster: LocalCluster, module_operator: Operator) -> Iterator[None]:
    """The chart's webhooks for namespaces with a label, at the address of the module's operator."""
    admission = client.AdmissionregistrationV1Api(module_operator.api.core.api_client)
    for kind, create in zip(
        CONFIGURATIONS,
        (admission.create_validating_webhook_configuration, admission.create_mutating_webhook_configuration),
        strict=True,
    ):
        body = next(d for d in render({}) if d["kind"] == kind)
        body["metadata"] = {"name": NAME}
        for webhook in body["webhooks"]:
            path = webhook["clientConfig"].pop("service")["path"]
            webhook["clientConfig"]["url"] = f"https://localhost:{module_operator.port}{path}"
            webhook["namespaceSelector"] = {"matchLabels": {"reviewed-by": NAME}}
            webhook["rules"][0]["scope"] = "Namespaced"
        create(body)
    yield
    for delete in (admission.delete_validating_webhook_configuration, admission.delete_mutating_webhook_configuration):
        delete(NAME)


@pytest.fixture
def webhooks(api: Api, operator: Operator, configurations: None) -> Start:
    """Have this namespace's jobs reviewed, by the operator as it is or with settings of the test's own."""
    api.core.patch_namespace(api.namespace, {"metadata": {"labels": {"reviewed-by": NAME}}})

    def start(**settings: str) -> None:
        if settings:
            operator.kill()
            operator.start(**settings)
        until("webhooks that are trusted", lambda: apply(api, "probe", MINIMAL, "--dry-run=server").returncode == 0)

    return start


def apply(api: Api, name: str, spec: dict[str, Any], *flags: str) -> subprocess.CompletedProcess[str]:
    """`kubectl apply` as a user does it."""
    document = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}
    command = [kubectl(), "--kubeconfig", api.cluster.kubeconfig, "-n", api.namespace, "apply", "-f", "-", *flags]
    return subprocess.run(command, input=json.dumps(document), capture_output=True, text=True, check=False)


def test_a_user_applies(api: Api, webhooks: Start) -> None:
    """Refusals name field, value and fix; warnings are shown; who applied is noted and cannot be changed."""
    webhooks()
    code = merged(MINIMAL, model={"uri": "hf://org/model@1a2b3c4", "trustRemoteCode": True})
    refused = apply(api, "bad", code)
    assert refused.returncode == 1 and "spec.model.trustRemoteCode: runs code of the model's repository" in refused.stderr
    rules = merged(MINIMAL, evaluation={"metrics": ["loss"]})
    assert "evaluation needs held-out rows: set dataset.eval.splitFraction" in apply(api, "bad", rules).stderr
    taken = apply(api, "good", MINIMAL)
    assert taken.returncode == 0 and "Warning: spec.dataset.eval is not set" in taken.stderr
    stamp = names.ANNOTATION_CREATED_BY
    creator = api.job("good")["metadata"]["annotations"][stamp]
    assert creator
    api.patch_job({"metadata": {"annotations": {stamp: "somebody else"}}}, "good")
    assert api.job("good")["metadata"]["annotations"][stamp] == creator
    until("it runs", lambda: api.status("good").get("phase") == "Preparing")
    changed = apply(api, "good", merged(MINIMAL, tuning={"method": "dora"}))
    assert changed.returncode == 1 and "spec.tuning cannot change: undo the change, or create another job" in changed.stderr


@pytest.mark.parametrize("propagation", ["Background", "Foreground"])
def test_a19_an_operator_that_is_down_holds_up_no_deletion(api: Api, webhooks: Start, operator: Operator, propagation: str) -> None:
    webhooks()
    assert apply(api, "support", MINIMAL).returncode == 0
    until("it runs", lambda: api.status().get("phase") == "Preparing")
    operator.kill()
    refused = apply(api, "another", MINIMAL)
    assert refused.returncode == 1 and "failed calling webhook" in refused.stderr, "what nobody looked at is not taken"
    api.custom.delete_namespaced_custom_object(
        "finetune.dev", "v1alpha1", api.namespace, "finetunejobs", "support", propagation_policy=propagation
    )

    def gone() -> bool:
        try:
            api.job()
        except client.ApiException as failure:
            return bool(failure.status == 404)
        return False

    until("it is gone", gone)


def test_a19_a_certificate_that_expires_is_renewed_while_the_operator_runs(api: Api, webhooks: Start) -> None:
    """And one that somebody replaced."""
    api.core.create_namespaced_secret(api.namespace, {"metadata": {"name": "tls"}})
    webhooks(FINETUNE_TLS_SECRET="tls", FINETUNE_NAMESPACE=api.namespace)
    hosts = certificate.hosts_of(Settings(namespace=api.namespace))
    old = certificate.generate(hosts, datetime.now(UTC) - timedelta(days=3640))

    def encoded(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    data = {"tls.crt": encoded(old.certificate), "tls.key": encoded(old.key), "ca.crt": None}
    api.core.patch_namespaced_secret("tls", api.namespace, {"data": data})
    admission = client.AdmissionregistrationV1Api(api.core.api_client)

    def trusted() -> str:
        found = admission.read_mutating_webhook_configuration(NAME).webhooks[0].client_config
        assert found.url.endswith(MUTATE)
        return base64.b64decode(found.ca_bundle).decode()

    until("both are trusted", lambda: old.certificate in trusted() and trusted().count("BEGIN CERTIFICATE") == 2)
    until("the new one is served", lambda: apply(api, "after", MINIMAL, "--dry-run=server").returncode == 0)
    # somebody takes the trust away
    for patch in (admission.patch_validating_webhook_configuration, admission.patch_mutating_webhook_configuration):
        broken = [{"op": "replace", "path": "/webhooks/0/clientConfig/caBundle", "value": encoded(old.certificate)}]
        patch(NAME, broken)
    until("it is trusted again", lambda: apply(api, "again", MINIMAL, "--dry-run=server").returncode == 0)
