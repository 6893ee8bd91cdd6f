"""The operator against a real API server. The test plays kubelet: pods run and end as it says."""

from __future__ import annotations

import json
import re
import signal
import time
import urllib.request
from typing import Any

import pytest
from kubernetes import client

from finetune_api import GROUP, PLURAL, VERSION, names
from finetune_api.contract import ExitCode, StageResult
from tests.cluster.control_plane import answers
from tests.component.conftest import Api, Kubelet, Operator, until
from tests.factory import MINIMAL, container_status, ended, merged

TWO = merged(MINIMAL, distribution={"nodes": 2, "gpusPerNode": 0})
WHOLE = merged(
    TWO,
    dataset={"train": {"uri": "configmap://rows/train.jsonl"}, "eval": {"splitFraction": 0.1}},
    evaluation={"gate": {"minImprovement": 0.1}},
    publish=[{"uri": "pvc://published/support"}],
)


def phase(api: Api, wanted: str, seconds: float = 60) -> dict[str, Any]:
    until(f"phase {wanted}", lambda: api.status().get("phase") == wanted, seconds)
    return api.status()


def metrics(operator: Operator) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{operator.probes}/metrics") as response:
        return str(response.read().decode())


def pods_made(operator: Operator) -> float:
    found = re.search(r'finetune_api_requests{kind="Pod",verb="create"} (\S+)', metrics(operator))
    return float(found.group(1)) if found else 0.0


def test_a_whole_job(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    until("it is up", lambda: answers(f"http://127.0.0.1:{operator.probes}/readyz"))
    before = pods_made(operator)
    api.create_job(WHOLE)
    status = phase(api, "Succeeded")
    assert [c["type"] for c in status["conditions"] if c["status"] == "True"] == [
        "Ready", "Accepted", "TargetsReady", "DataReady", "Admitted", "QuotaReserved", "Trained", "Evaluated", "Published", "Succeeded",
        "Finished",
    ]  # fmt: skip
    assert status["attempt"] == 0 and "restarts" not in status
    until("its end is told", lambda: api.events()[-1] == "Succeeded")
    assert len(api.events()) == len(set(api.events()))
    job = api.job()
    assert "finalizers" not in job["metadata"] and "annotations" not in job["metadata"], "kopf keeps its hands off the object"
    assert status["observedGeneration"] == job["metadata"]["generation"]
    table = api.cluster.kubectl("-n", api.namespace, "get", "ftj")
    assert table.split()[:7] == ["NAME", "PHASE", "PROGRESS", "LOSS", "QUEUE", "GPUS", "RESTARTS"]
    assert "Succeeded" in table and "100" in table
    described = api.cluster.kubectl("-n", api.namespace, "describe", "finetunejob", "support")
    assert "published to" in described or "Published" in described
    assert "finetune_reconcile_duration_seconds_count" in metrics(operator)
    assert pods_made(operator) == before + 2
    assert operator.terminate() == 0, "a clean shutdown"


def test_f2_the_operator_is_away_while_pods_train(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    kubelet.hold = {"train"}
    api.create_job(WHOLE)
    phase(api, "Training")
    operator.kill()
    kubelet.hold = set()
    until("workers have ended", lambda: all(p.status.phase == "Succeeded" for p in api.pods()))
    assert api.status()["phase"] == "Training"
    operator.start()
    status = phase(api, "Succeeded")
    assert status["attempt"] == 0


def test_f8_one_failing_worker(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    kubelet.hold = {"train"}
    api.create_job(TWO)
    phase(api, "Training")
    api.set_pod("support-worker-1", ended(1, "NCCL error: connection reset by peer"))
    until("attempt 1", lambda: api.workers() == [("support-worker-0", "1"), ("support-worker-1", "1")])
    restart = api.status()["restarts"][0]
    assert restart["pod"] == "support-worker-1" and "NCCL error" in restart["message"]
    kubelet.hold = set()
    assert phase(api, "Succeeded")["attempt"] == 1
    until("it is told", lambda: "GangRestarted" in api.events())


def test_f14_an_image_that_cannot_be_pulled(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    message = 'Back-off pulling image "nope:1"'

    def cannot_pull(pod: Any) -> dict[str, Any] | None:
        if pod.metadata.labels.get(names.LABEL_ATTEMPT) != "0":
            return None
        if pod.status.container_statuses:
            return {}
        return {"phase": "Pending", "containerStatuses": container_status({"waiting": {"reason": "ImagePullBackOff", "message": message}})}

    kubelet.override = cannot_pull
    api.create_job(merged(TWO, runPolicy={"gangTimeout": "4s"}))
    until("the kubelet's message", lambda: message in api.condition("Running").get("message", ""), 60)
    assert api.condition("Running")["reason"] == "ImagePullFailed"
    status = phase(api, "Succeeded")
    assert status["restarts"][0]["reason"] == "GangTimeout" and status["restartsCounted"] == 0


def test_f21_children_deleted_by_hand(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    kubelet.hold = {"train"}
    api.create_job(TWO)
    phase(api, "Training")
    api.cluster.kubectl("-n", api.namespace, "delete", "service", "support-workers")
    api.core.delete_namespaced_config_map("support-job", api.namespace)
    until("service is back", lambda: api.core.read_namespaced_service("support-workers", api.namespace))
    until("config map is back", lambda: api.core.read_namespaced_config_map("support-job", api.namespace))
    assert api.status()["attempt"] == 0
    api.core.delete_namespaced_pod("support-worker-1", api.namespace, grace_period_seconds=0)
    until("the gang restarts", lambda: api.workers() == [("support-worker-0", "1"), ("support-worker-1", "1")])
    assert api.status()["restarts"][0]["reason"] == "PodDeleted"
    kubelet.hold = set()
    phase(api, "Succeeded")


def test_f21_a_stage_job_deleted_by_hand(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    kubelet.hold = {"prepare"}
    api.create_job(MINIMAL)
    until("prepare runs", lambda: api.condition("DataReady").get("reason") == "Running")
    api.batch.delete_namespaced_job("support-prepare-0", api.namespace, propagation_policy="Background")
    kubelet.hold = set()
    phase(api, "Succeeded")


def test_f21_a_stage_is_not_started_again_while_a_pod_of_it_runs(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    """Two of them would write to one workspace. `--cascade=orphan` leaves the pod for as long as it likes."""
    kubelet.hold = {"prepare"}
    api.create_job(MINIMAL)
    until("prepare runs", lambda: api.condition("DataReady").get("reason") == "Running")
    api.batch.delete_namespaced_job("support-prepare-0", api.namespace, propagation_policy="Orphan")
    until("it is waited for", lambda: api.condition("DataReady").get("reason") == "Stopping")
    assert "has not ended yet" in api.condition("DataReady")["message"]
    operator.kill()
    operator.start()
    time.sleep(2)
    assert len(api.pods()) == 1 and not api.batch.list_namespaced_job(api.namespace).items
    kubelet.hold = set()
    phase(api, "Succeeded")


@pytest.mark.parametrize("stage", ["prepare", "train", "evaluate", "publish"])
def test_f22_deletion_in_any_phase(api: Api, kubelet: Kubelet, operator: Operator, stage: str) -> None:
    kubelet.hold = {stage}
    api.create_job(WHOLE)
    wanted = {"prepare": "Preparing", "train": "Training", "evaluate": "Evaluating", "publish": "Publishing"}[stage]
    phase(api, wanted)
    until("its pod runs", lambda: any(p.metadata.labels[names.LABEL_STAGE] == stage for p in api.pods()))
    api.delete_job()
    # no kubelet unmounts the claim here, so its protection finalizer holds it; everything else must go
    until("everything owned is gone", lambda: [o for o in api.owned() if not o.startswith("PersistentVolumeClaim")] == [])
    time.sleep(2)
    assert [o for o in api.owned() if not o.startswith("PersistentVolumeClaim")] == [], "nothing is made again"


def test_a18_a_user_edits_status_labels_and_owners(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    kubelet.hold = {"train"}
    api.create_job(TWO)
    phase(api, "Training")
    done = {"type": "Succeeded", "status": "Unknown", "reason": "Me", "message": "x", "lastTransitionTime": "2026-11-21T12:00:00Z"}
    forged = {"status": {"phase": "Succeeded", "conditions": [done], "gang": None, "dataset": None, "plan": None, "attempt": 0}}
    api.custom.patch_namespaced_custom_object_status(GROUP, VERSION, api.namespace, PLURAL, "support", forged)
    status = until("derived again", lambda: (s := api.status()).get("dataset") and s["phase"] == "Training" and s)
    assert status["attempt"] == 0 and status["plan"]["worldSize"] == 2
    uid = api.job()["metadata"]["uid"]
    labels = {
        names.LABEL_MANAGED_BY: names.MANAGER, names.LABEL_JOB_UID: uid, names.LABEL_STAGE: "train",
        names.LABEL_RANK: "0", names.LABEL_ATTEMPT: "99",
    }  # fmt: skip
    kubelet.broken.clear()
    pod = {"metadata": {"name": "impostor", "labels": labels}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    kubelet.override = lambda p: {} if p.metadata.name == "impostor" else None
    api.core.create_namespaced_pod(api.namespace, pod)
    time.sleep(2)
    assert api.status()["attempt"] == 0 and api.core.read_namespaced_pod("impostor", api.namespace)
    api.core.delete_namespaced_pod("impostor", api.namespace, grace_period_seconds=0)
    kubelet.broken.clear()
    kubelet.hold = set()
    phase(api, "Succeeded")


def test_a_name_that_is_taken_by_somebody_else(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    api.core.create_namespaced_pod(
        api.namespace, {"metadata": {"name": "support-worker-0"}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    )
    api.create_job(MINIMAL)
    until("it is said", lambda: "does not belong to this job" in api.condition("Accepted").get("message", ""))
    api.core.delete_namespaced_pod("support-worker-0", api.namespace, grace_period_seconds=0)
    phase(api, "Succeeded")


def test_f35_a_refusal_of_quota_is_said_and_tried_again(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"count/jobs.batch": "0"}}}
    api.core.create_namespaced_resource_quota(api.namespace, quota)
    until("the quota is in force", lambda: api.core.read_namespaced_resource_quota("none", api.namespace).status.hard)
    api.create_job(MINIMAL)
    until("the refusal is said", lambda: "exceeded quota" in api.condition("Accepted").get("message", ""))
    until("it is told", lambda: "APIRefused" in api.events())
    api.core.delete_namespaced_resource_quota("none", api.namespace)
    phase(api, "Succeeded", 90)


def test_a_bad_dataset_is_refused_in_prepare(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    words = StageResult(reason="InvalidRows", message="1 row(s): train row 7: not JSON").dumps()
    kubelet.override = lambda pod: ended(ExitCode.USER_ERROR, words) if pod.status.phase == "Running" else None
    api.create_job(WHOLE)
    phase(api, "Failed")
    assert api.condition("Failed")["reason"] == "InvalidRows"
    assert "train row 7" in api.condition("Failed")["message"]
    assert api.workers() == []


def test_a3_a_name_of_253_characters(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    name = "a" + ".b-9" * 63
    api.create_job(TWO, name=name)
    until("it succeeds", lambda: api.status(name).get("phase") == "Succeeded", 60)


def test_clean_start_with_existing_objects_and_clean_stop(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    operator.kill()
    for index in range(5):
        api.create_job(MINIMAL, name=f"early-{index}")
    operator.start()
    for index in range(5):
        until(f"early-{index}", lambda i=index: api.status(f"early-{i}").get("phase") == "Succeeded", 60)
    assert operator.process is not None
    operator.process.send_signal(signal.SIGINT)
    assert operator.process.wait(timeout=30) == 0


def test_manifests_are_valid_for_this_server(api: Api) -> None:
    """The oldest supported server takes every manifest as it is: nothing is dropped or changed by its schema."""
    from tests.factory import FULL
    from tests.unit.test_resources import manifests

    for spec in (MINIMAL, FULL):
        for manifest in manifests(spec):
            manifest["metadata"]["namespace"] = api.namespace
            manifest["metadata"].pop("ownerReferences")
            pod = manifest["spec"] if manifest["kind"] == "Pod" else manifest.get("spec", {}).get("template", {}).get("spec", {})
            pod.pop("priorityClassName", None)
            said = api.cluster.kubectl("create", "--dry-run=server", "--validate=true", "-f", "-", input=json.dumps(manifest))
            assert "created" in said


@pytest.mark.operator(FINETUNE_SEAL_KEY="of both of its operators")
def test_f24_what_may_change_while_a_job_runs(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    """The API server refuses the rest. What gets past it, because the status that it goes by was wiped, is ignored and said so."""
    kubelet.hold = {"train"}
    api.create_job(TWO)
    phase(api, "Training")

    def shape() -> dict[str, Any]:
        told = api.core.read_namespaced_config_map("support-job", api.namespace).data["job.json"]
        return dict(json.loads(told)["spec"]["distribution"])

    before = shape()
    api.patch_job({"spec": {"runPolicy": {"maxRestarts": 7}}})
    for change in ({"distribution": {"nodes": 4}}, {"model": {"uri": "pvc://models/other"}}):
        with pytest.raises(client.ApiException) as refused:
            api.patch_job({"spec": change})
        assert refused.value.status == 422 and f"spec.{next(iter(change))} can" in refused.value.body
    operator.kill()
    api.custom.replace_namespaced_custom_object_status(GROUP, VERSION, api.namespace, PLURAL, "support", {**api.job(), "status": {}})
    api.patch_job({"spec": {"distribution": {"nodes": 4}}})
    operator.start()
    until("it is said", lambda: api.condition("Accepted").get("reason") == "ChangeIgnored")
    message = api.condition("Accepted")["message"]
    assert message.startswith("spec.distribution cannot change any more: ignored"), message
    until("it is told", lambda: "ChangeIgnored" in api.events())
    assert shape() == before
    api.set_pod("support-worker-1", ended(1))
    until("the gang restarts as it was", lambda: api.workers() == [("support-worker-0", "1"), ("support-worker-1", "1")])
    kubelet.hold = set()
    status = phase(api, "Succeeded")
    assert status["attempt"] == 1


def test_f10_a_pod_on_a_dead_node_is_replaced(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    """Its deletion is confirmed by nobody; the gang does not wait for it for ever."""
    node = f"dead-{api.namespace}"
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": "2026-11-21T12:00:00Z"}
    api.core.create_node({"metadata": {"name": node}})
    api.core.patch_node_status(node, {"status": {"conditions": [ready]}})
    kubelet.hold = {"train"}
    api.create_job(TWO)
    until("the gang", lambda: len(api.workers()) == 2)
    target = {"apiVersion": "v1", "kind": "Node", "name": node}
    api.core.create_namespaced_pod_binding(
        "support-worker-1", api.namespace, {"metadata": {"name": "support-worker-1"}, "target": target}, _preload_content=False
    )
    phase(api, "Training")
    api.core.delete_namespaced_pod("support-worker-1", api.namespace)
    until("the gang is waited for", lambda: api.condition("Running").get("reason") == "Stopping")
    time.sleep(3)
    assert api.status()["attempt"] == 0 and ("support-worker-1", "0") in api.workers(), "while the node answers, its pod is waited for"
    api.core.patch_node_status(node, {"status": {"conditions": [{**ready, "status": "Unknown", "reason": "NodeStatusUnknown"}]}})
    until("the new gang", lambda: api.workers() == [("support-worker-0", "1"), ("support-worker-1", "1")], 40)
    until("it is told", lambda: "PodForceDeleted" in api.events())
    restart = api.status()["restarts"][0]
    assert restart["cause"] == "Disruption" and restart["node"] == node and restart["counted"] is False
    api.core.delete_node(node)


def test_several_namespaces_and_no_others(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    operator.kill()
    second, third = f"{api.namespace}-b", f"{api.namespace}-c"
    for name in (second, third):
        api.core.create_namespace({"metadata": {"name": name}})
    try:
        operator.start(FINETUNE_WATCH_NAMESPACES=f"{api.namespace},{second}")
        body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "FineTuneJob", "metadata": {"name": "support"}, "spec": MINIMAL}
        for name in (second, third):
            api.custom.create_namespaced_custom_object(GROUP, VERSION, name, PLURAL, body)
        api.create_job(MINIMAL)
        until("one of its namespaces is served", lambda: phase(api, "Succeeded"))

        def told(namespace: str) -> str:
            found = api.custom.get_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, "support")
            return str((found.get("status") or {}).get("phase"))

        until("the other one, too", lambda: told(second) == "Preparing")
        assert told(third) == "None", "and no others"
    finally:
        for name in (second, third):
            api.core.delete_namespace(name)


def test_another_controllers_job_is_left_alone(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    api.create_job(merged(MINIMAL, managedBy="example.com/another"), name="theirs")
    api.create_job(merged(MINIMAL, managedBy=names.MANAGED_BY), name="ours")
    until("ours ends", lambda: api.status("ours").get("phase") == "Succeeded")
    assert "status" not in api.job("theirs") and not [name for name in api.owned() if "theirs" in name]
    with pytest.raises(client.ApiException) as refused:
        api.patch_job({"spec": {"managedBy": names.MANAGED_BY}}, name="theirs")
    assert "spec.managedBy cannot change" in refused.value.body


def test_a_job_that_is_made_again_from_a_backup_is_not_trained_again(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    """Its status was not in the backup; its target tells."""
    spec = merged(MINIMAL, publish=[{"uri": "pvc://published/support"}])
    api.create_job(spec)
    first = phase(api, "Succeeded")
    api.delete_job()
    until("its pods are gone", lambda: not [o for o in api.owned() if not o.startswith("PersistentVolumeClaim")], 120)
    kubelet.results["check"] = StageResult(reason="Restored", message="there already", result={"artifacts": first["artifacts"]})
    kubelet.hold = {"prepare"}
    api.create_job(spec)
    status = phase(api, "Succeeded")
    assert status["artifacts"] == first["artifacts"] and api.condition("Succeeded")["reason"] == "Restored"
    assert not api.workers() and "attempt" in status
    until("prepare is stopped", lambda: not [name for name in api.owned() if "prepare" in name])
