"""An operator whose CustomResourceDefinitions come after it, go, and come again. They are taken away here: a server of its own."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api import GROUP, PLURAL, VERSION
from finetune_operator.servers import certificate
from finetune_operator.settings import Settings
from tests.cluster.local import LocalCluster
from tests.cluster.shell import REPO, digest_of
from tests.component.conftest import Api, Kubelet, Operator, control_plane, until
from tests.factory import MINIMAL

JOBS, QUEUES = (REPO / "crds" / f"finetune{name}.yaml" for name in ("jobs", "queues"))


@pytest.fixture(scope="module")
def bare() -> Iterator[LocalCluster]:
    """An API server without any of our kinds."""
    with control_plane("crds", definitions=()) as target:
        yield target


@pytest.fixture
def api(bare: LocalCluster, request: pytest.FixtureRequest) -> Iterator[Api]:
    """A namespace, and none of our kinds yet."""
    for crd in (JOBS, QUEUES):
        undefine(bare, crd)
    name = f"t-{digest_of(request.node.name)[:8]}"
    target = Api(bare, name)
    target.core.create_namespace({"metadata": {"name": name}})
    yield target


@pytest.fixture
def operator(api: Api, tmp_path: Path) -> Iterator[Operator]:
    """The operator of the whole cluster, started before its kinds are there."""
    target = Operator(api, tmp_path / "operator.log", watch="")
    yield target
    if target.process is not None and target.process.poll() is None:
        target.kill()
    print(target.logs.read_text()[-8000:])


def undefine(cluster: LocalCluster, crd: Path) -> None:
    """Delete a CustomResourceDefinition, and with it all that is of its kind."""
    cluster.kubectl("delete", "--ignore-not-found", "--timeout=60s", "-f", str(crd))


def ready(operator: Operator) -> tuple[int, str]:
    """What the readiness probe says."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{operator.probes}/readyz", timeout=2) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as failure:
        return failure.code, failure.read().decode()
    except OSError:
        return 0, ""


def until_ready(operator: Operator) -> None:
    until("ready", lambda: ready(operator)[0] == 200)


def until_it_misses(operator: Operator, *plurals: str) -> None:
    missing = ", ".join(f"{plural}.finetune.dev/v1alpha1" for plural in plurals)
    why = f"the API server does not serve {missing}: install the CustomResourceDefinitions"
    until(f"not ready for want of {missing}", lambda: ready(operator) == (503, why))


def served(api: Api, name: str) -> None:
    """A job that is made now is seen, and goes on."""
    until(f"{name} is made", lambda: api.create_job(MINIMAL, name))  # a kind that was replaced is served again in a moment
    until(f"{name} succeeds", lambda: api.status(name).get("phase") == "Succeeded")


def alive(operator: Operator) -> bool:
    assert operator.process is not None
    return operator.process.poll() is None


def test_kinds_that_come_late_go_and_come_again(bare: LocalCluster, api: Api, operator: Operator) -> None:
    kubelet = Kubelet(api)
    try:
        operator.start()
        until_it_misses(operator, "finetunejobs", "finetunequeues")
        with urllib.request.urlopen(f"http://127.0.0.1:{operator.probes}/healthz", timeout=2) as answer:
            assert answer.status == 200, "to be killed would help nobody"
        bare.define(JOBS)
        until_it_misses(operator, "finetunequeues")
        served(api, "before-queues")
        bare.define(QUEUES)
        until_ready(operator)
        served(api, "first")

        undefine(bare, JOBS)
        until_it_misses(operator, "finetunejobs")
        bare.define(JOBS)
        until_ready(operator)
        served(api, "second")

        undefine(bare, QUEUES)
        until_it_misses(operator, "finetunequeues")
        served(api, "without-queues")
        bare.define(QUEUES)
        until_ready(operator)
        queue: dict[str, Any] = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneQueue",
            "metadata": {"name": "default"},
            "spec": {"flavors": [{"name": "any", "resourceName": "nvidia.com/gpu", "nominalQuota": 1}]},
        }
        bare.kubectl("apply", "-f", "-", input=json.dumps(queue))
        until("the queue has a status", lambda: json.loads(bare.kubectl("get", "ftq", "default", "-o", "json")).get("status"))

        for number in range(3):  # so fast that no look sees it gone
            bare.kubectl("replace", "--force", "-f", str(JOBS))
            until_ready(operator)
            served(api, f"replaced-{number}")
        assert alive(operator), "in the same process all the time"
    finally:
        kubelet.stop()


def test_it_can_be_stopped_while_it_waits(operator: Operator) -> None:
    operator.start()
    until_it_misses(operator, "finetunejobs", "finetunequeues")
    assert operator.terminate() == 0


def test_an_operator_that_counts_nothing_needs_jobs_alone(bare: LocalCluster, api: Api, operator: Operator) -> None:
    kubelet = Kubelet(api)
    try:
        operator.start(FINETUNE_WATCH_NAMESPACES=api.namespace, FINETUNE_QUEUEING_BACKEND="none")
        until_it_misses(operator, "finetunejobs")
        bare.define(JOBS)
        until_ready(operator)
        served(api, "job")
    finally:
        kubelet.stop()


def test_a_certificate_that_comes_late_is_waited_for(bare: LocalCluster, api: Api, operator: Operator) -> None:
    """cert-manager may be slower than the operator: it lives, is not ready, says what it waits for, and can be stopped."""
    for crd in (JOBS, QUEUES):
        bare.define(crd)
    settings = {"FINETUNE_TLS_SECRET": "tls", "FINETUNE_TLS_MANAGED": "true", "FINETUNE_NAMESPACE": api.namespace}
    why = f"waiting for Secret {api.namespace}/tls: it is not there (cert-manager makes it for the Certificate of that name)"
    operator.start(**settings)
    until("it says what it waits for", lambda: ready(operator) == (503, why))
    assert operator.terminate() == 0
    operator.start(**settings)
    until("it says so again", lambda: ready(operator) == (503, why))
    api.core.create_namespaced_secret(api.namespace, {"metadata": {"name": "tls"}})
    until("it is not enough", lambda: "it has no tls.crt and tls.key yet" in ready(operator)[1])
    made = certificate.generate(certificate.hosts_of(Settings(namespace=api.namespace)), datetime.now(UTC))
    data = {"tls.crt": made.certificate, "tls.key": made.key}
    api.core.patch_namespaced_secret("tls", api.namespace, {"stringData": data})
    until_ready(operator)
    assert alive(operator), "in the same process all the time"


@pytest.mark.parametrize(
    ("backend", "group", "version", "plural"),
    [("kueue", "kueue.x-k8s.io", "v1beta1", "workloads"), ("volcano", "scheduling.volcano.sh", "v1beta1", "podgroups")],
)
def test_a_back_end_that_is_not_there_is_named(
    bare: LocalCluster, api: Api, operator: Operator, tmp_path: Path, backend: str, group: str, version: str, plural: str
) -> None:
    for crd in (JOBS, QUEUES):
        bare.define(crd)
    theirs = tmp_path / "theirs.yaml"
    open_schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.{group}",
            "annotations": {"api-approved.kubernetes.io": "unapproved, for a test"},
        },
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"plural": plural, "singular": plural[:-1], "kind": plural[:-1].capitalize()},
            "versions": [{"name": version, "served": True, "storage": True, "schema": open_schema}],
        },
    }
    theirs.write_text(json.dumps(definition))
    operator.start(FINETUNE_QUEUEING_BACKEND=backend)

    def named() -> bool:
        code, text = ready(operator)
        return code == 503 and f"does not serve {plural}.{group}/" in text

    until(f"{plural} is named", named)
    bare.define(theirs)
    try:
        until_ready(operator)
    finally:
        undefine(bare, theirs)
    until(f"{plural} is named again", named)


def test_definitions_of_an_older_and_of_a_newer_release_are_named(api: Api, kubelet: Kubelet, operator: Operator, tmp_path: Path) -> None:
    """It goes on with both, says what is dropped, and leaves what it does not know as it is."""
    definition = next(yaml.safe_load_all(JOBS.read_text()))
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
    del schema["usage"]
    schema["future"] = {"type": "object", "properties": {"word": {"type": "string"}}}
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(definition))
    for crd in (other, QUEUES):
        api.cluster.define(crd)
    operator.start()
    until_ready(operator)
    told = operator.logs.read_text()
    assert "finetunejobs.finetune.dev: its definition is older than this operator: it lacks status.usage, which" in told
    assert "finetunejobs.finetune.dev: its definition is newer than this operator: it has status.future, which" in told
    assert "finetunequeues.finetune.dev: its definition" not in told
    kubelet.hold = {"prepare"}
    until("it is made", lambda: api.create_job(MINIMAL, "kept"))
    until("it prepares", lambda: api.status("kept").get("phase") == "Preparing")
    body = {"status": {"future": {"word": "of another operator"}}}
    api.custom.patch_namespaced_custom_object_status(GROUP, VERSION, api.namespace, PLURAL, "kept", body)
    kubelet.hold = set()
    until("it succeeds", lambda: api.status("kept").get("phase") == "Succeeded")
    assert api.status("kept")["future"] == {"word": "of another operator"} and "usage" not in api.status("kept")
