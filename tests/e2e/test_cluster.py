"""Real pods on real kubelets really train."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api import API_VERSION, names
from finetune_api.queue import QUEUE_KIND
from tests.cluster import helm, loader
from tests.cluster.local import LocalCluster
from tests.cluster.shell import REPO, CommandFailed
from tests.e2e.conftest import User


def manifest(name: str, **spec: Any) -> dict[str, Any]:
    """examples/tiny.yaml under another name, with top-level blocks replaced."""
    document: dict[str, Any] = yaml.safe_load((REPO / "examples" / "tiny.yaml").read_text())
    document["metadata"]["name"] = name
    document["spec"].update({"resources": {"requests": {"cpu": "1"}}, **spec})  # one thread: two would only be in each other's way
    document["spec"]["publish"] = [{"uri": f"pvc://published/{name}"}]
    return document


def trained_only(document: dict[str, Any]) -> dict[str, Any]:
    """Neither evaluated nor published: that is looked at once for a single pod and once for a gang."""
    del document["spec"]["evaluation"], document["spec"]["publish"]
    return document


def gang(name: str, steps: int, **more: Any) -> dict[str, Any]:
    """Two pods that pretend to have a GPU each and train together with DeepSpeed ZeRO-2."""
    document = manifest(
        name,
        distribution={"nodes": 2, "gpusPerNode": 1, "strategy": "deepspeed-zero2"},
        resources={"requests": {"cpu": "1"}},
        checkpoint={"everySteps": 20},
        **more,
    )
    hyper = document["spec"]["tuning"]["hyperparameters"]
    hyper.update(maxSteps=steps, learningRate=2e-3)
    return document


def test_a_single_pod(user: User, tmp_path: Path) -> None:
    user.apply(manifest("single"))
    status = user.ended("single")
    assert status["phase"] == "Succeeded", user.story()
    evaluation = status["evaluation"]
    losses = {arm["name"]: float(arm["metrics"]["loss"]) for arm in evaluation["arms"]}
    assert losses["Tuned"] < min(loss for name, loss in losses.items() if name != "Tuned")
    assert evaluation["gate"] == "Passed"
    assert status["artifacts"][0]["uri"] == "pvc://published/single"
    files = loader.listing(user.cluster, user.namespace, "published", "single")
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "finetune.json", "SHA256SUMS"} <= set(files)
    described = user.kubectl("describe", "finetunejob", "single")
    for reason in ("PrepareStarted", "DataReady", "GangCreated", "GangRunning", "Trained", "Evaluated", "Published", "Succeeded"):
        assert reason in described, described
    for pod in user.pods("single"):
        assert pod["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
    policy = json.loads(user.kubectl("get", "networkpolicy", "single-workers", "-o", "json"))
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    _with_the_command_line(user, tmp_path)


def _with_the_command_line(user: User, folder: Path) -> None:
    """What a user does next, with the same job."""

    def finetune(*words: str) -> str:
        command = [sys.executable, "-m", "finetune_cli", *words, "--kubeconfig", str(user.cluster.kubeconfig), "-n", user.namespace]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    logs = finetune("logs", "single")
    assert "[prepare]" in logs and "[train/0]" in logs and "[publish]" in logs
    assert "Loss" in finetune("describe", "single"), "the curve is drawn from the log of rank 0"
    assert "PFLOP" in finetune("estimate", "single", "--gpu", "h100")
    assert "files of pvc://published/single" in finetune("download", "single", str(folder / "adapter"))
    fetched = {path.name for path in (folder / "adapter").iterdir()}
    assert {"README.md", "adapter_model.safetensors", "SHA256SUMS"} <= fetched
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder / "adapter", check=True)
    told = finetune("erase", "--job", "single", "--containing", "animal", "--dry-run")
    assert "rows would be removed: jobs/" in told and "published at pvc://published/single" in told, told


def test_the_webhooks_of_the_installed_chart(user: User) -> None:
    code = manifest("code")
    code["spec"]["model"] = {"uri": "hf://org/model@1a2b3c4", "trustRemoteCode": True}
    with pytest.raises(CommandFailed, match=r"spec\.model\.trustRemoteCode: runs code of the model's repository"):
        user.apply(code)
    user.kubectl("apply", "--dry-run=server", "-f", "-", input=yaml.safe_dump(manifest("fine")))


def test_f8_a_gang_loses_a_worker_and_goes_on_from_its_checkpoint(user: User) -> None:
    user.apply(gang("gang", steps=240))
    status = user.until(
        "a checkpoint is reported", lambda: (s := user.status("gang")).get("checkpoint", {}).get("step", 0) >= 20 and s, 240
    )
    assert status["phase"] == "Training" and status["totalGpus"] == 2
    assert status["plan"] == {**status["plan"], "worldSize": 2, "strategy": "deepspeed-zero2"}
    progress = status["progress"]
    assert progress["totalSteps"] == 240 and 0 < progress["step"] <= 240
    assert float(progress["loss"]) > 0 and float(progress["tokensPerSecond"]) > 0
    user.kubectl("exec", "gang-worker-1", "--", "pkill", "-9", "-f", "finetune_trainer worker")
    status = user.until("the gang restarts", lambda: (s := user.status("gang")).get("attempt") == 1 and s, 60)
    restart = status["restarts"][0]
    assert restart["cause"] == "Infrastructure" and restart["counted"] is True
    assert restart["pod"] == "gang-worker-1", status["restarts"]
    status = user.ended("gang")
    assert status["phase"] == "Succeeded", user.story()
    assert status["attempt"] == 1
    trained = next(c["message"] for c in status["conditions"] if c["type"] == "Trained")
    assert "from the checkpoint at step" in trained, trained
    assert 20 <= int(trained.split("checkpoint at step ")[1].split(")")[0]) < 240
    assert status["usage"]["gpuSeconds"] > 0


def test_f11_f25_a_stop_saves_and_the_next_attempt_goes_on(user: User) -> None:
    """A pod is drained, then the job is suspended: both end with a checkpoint, and no restart is counted."""
    document = trained_only(gang("pause", steps=300))
    document["spec"]["checkpoint"] = {"every": "1h"}
    user.apply(document)

    def step() -> int:
        return int(user.status("pause").get("progress", {}).get("step", 0))

    user.until("it trains", lambda: step() > 3, 240)
    user.kubectl("delete", "pod", "pause-worker-1", "--wait=false")
    status = user.until(
        "the next attempt trains", lambda: (s := user.status("pause"))["attempt"] == 1 and s["progress"]["step"] > 3 and s, 240
    )
    restart, drained = status["restarts"][0], status["checkpoint"]["step"]
    assert restart["cause"] == "Disruption" and restart["counted"] is False and drained > 3
    assert status["checkpoint"]["resumedFrom"] == drained and status["usage"]["lostSeconds"] <= 5, status
    user.kubectl("patch", "finetunejob", "pause", "--type=merge", "-p", '{"spec": {"runPolicy": {"suspend": true}}}')
    user.until("its pods are gone", lambda: not [p for p in user.pods("pause") if p["status"]["phase"] in ("Pending", "Running")], 60)
    status = user.until("the checkpoint is known", lambda: (s := user.status("pause"))["checkpoint"]["step"] > drained and s, 20)
    suspended = status["checkpoint"]["step"]
    assert status["phase"] == "Suspended" and status["restartsCounted"] == 0
    user.kubectl("patch", "finetunejob", "pause", "--type=merge", "-p", '{"spec": {"runPolicy": {"suspend": false}}}')
    status = user.ended("pause")
    assert status["phase"] == "Succeeded", user.story()
    trained = next(c["message"] for c in status["conditions"] if c["type"] == "Trained")
    assert f"from the checkpoint at step {suspended}" in trained and "300 steps" in trained


def test_f12_urgent_work_gets_the_gpus_and_the_other_goes_on_where_it_was(user: User) -> None:
    """Both are prepared before the queue they name is there: what trains does not end while the other is still being prepared."""
    queue = user.namespace
    document = trained_only(gang("modest", steps=400, scheduling={"queue": queue}))
    document["spec"]["checkpoint"] = {"every": "1h"}
    user.apply(document)
    user.until("it is seen", lambda: user.status("modest")["phase"], 60)
    user.apply(manifest("urgent", distribution={"gpusPerNode": 1}, scheduling={"queue": queue}))
    for name in ("modest", "urgent"):
        user.until(f"{name} waits", lambda name=name: user.status(name)["phase"] == "Queued", 240)
    spec = {"flavors": [{"name": "any", "nominalQuota": 2}], "preemption": {"minimumRunTime": "1s"}}
    user.apply(
        {"apiVersion": API_VERSION, "kind": QUEUE_KIND, "metadata": {"name": queue}, "spec": spec},
        {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": queue}, "value": 1000},
    )
    try:
        _preempts(user, queue)
    finally:
        user.kubectl("delete", f"finetunequeue/{queue}", f"priorityclass/{queue}")


def _preempts(user: User, queue: str) -> None:
    user.until("modest trains", lambda: user.status("modest")["progress"]["step"] > 3, 240)
    assert user.status("urgent")["phase"] == "Queued"
    patch = {"spec": {"scheduling": {"priorityClassName": queue}}}
    user.kubectl("patch", "finetunejob", "urgent", "--type=merge", "-p", json.dumps(patch))
    user.until("modest gives way", lambda: user.status("modest")["phase"] == "Queued", 60)
    user.until("urgent trains", lambda: user.status("urgent")["phase"] in ("Training", "Evaluating"), 120)
    status = user.status("modest")
    saved, restart = status["checkpoint"]["step"], status["restarts"][0]
    assert restart["reason"] == "Preempted" and restart["counted"] is False and saved > 3
    assert user.ended("urgent")["phase"] == "Succeeded", user.story()
    status = user.ended("modest")
    assert status["phase"] == "Succeeded", user.story()
    trained = next(c["message"] for c in status["conditions"] if c["type"] == "Trained")
    assert f"from the checkpoint at step {saved}" in trained and status["usage"]["lostSeconds"] <= 5
    assert status["usage"]["queuedSeconds"] > 0 and status["restartsCounted"] == 0


def test_f33_an_upgrade_of_the_chart_touches_no_running_gang(user: User) -> None:
    """The operator's pod is replaced under a running job: the next one takes over by the Lease. (There is no earlier release to
    upgrade from yet; the code is the same.)
    """
    user.apply(trained_only(gang("upgraded", steps=300)))
    user.until("it trains", lambda: user.status("upgraded").get("progress", {}).get("step", 0) > 3, 240)
    operator = ("-n", "finetune-system", "get", "pods", "-o", "jsonpath={.items[*].metadata.uid}")
    workers, before = {p["metadata"]["uid"] for p in user.pods("upgraded")}, user.cluster.kubectl(*operator)
    helm.install(user.cluster.kubeconfig, {**helm.local_values(), "podAnnotations": {"upgraded": "yes"}, "replicas": 2})
    user.until("all of its pods are new", lambda: not set(user.cluster.kubectl(*operator).split()) & set(before.split()), 60)
    step = user.status("upgraded")["progress"]["step"]
    user.until(
        "progress goes on", lambda: user.status("upgraded")["progress"]["step"] > step or user.status("upgraded")["phase"] != "Training", 60
    )
    assert workers <= {p["metadata"]["uid"] for p in user.pods("upgraded")}
    status = user.ended("upgraded")
    assert status["phase"] == "Succeeded" and status["attempt"] == 0, user.story()


def test_f10_a_node_that_does_not_answer(user: User) -> None:
    """Its kubelet is frozen while its containers run on: the gang starts elsewhere, and the old one writes nothing more."""
    if not isinstance(user.cluster, LocalCluster):
        pytest.skip("freezes a kubelet of the local cluster")
    document = gang("lost", steps=100_000)
    document["spec"]["resources"] = {"requests": {"cpu": "300m"}}  # both must fit on the node that is left
    user.apply(document)
    user.until("a checkpoint", lambda: user.status("lost").get("checkpoint", {}).get("step", 0) >= 20, 240)
    node = user.kubectl("get", "pod", "lost-worker-1", "-o", "jsonpath={.spec.nodeName}")
    user.cluster.signal("kubelet", signal.SIGSTOP, node)
    try:
        status = user.until(
            "a new attempt trains", lambda: (s := user.status("lost")).get("attempt", 0) >= 1 and s["phase"] == "Training" and s, 240
        )
        assert status["restarts"][0]["cause"] == "Disruption" and status["restarts"][0]["counted"] is False
        pods = {
            p["metadata"]["name"]: p["spec"]["nodeName"] for p in user.pods("lost") if p["metadata"]["labels"][names.LABEL_STAGE] == "train"
        }
        assert len(pods) == 2 and node not in pods.values()
        assert status["checkpoint"]["step"] >= 20
    finally:
        user.cluster.signal("kubelet", signal.SIGCONT, node)
    user.kubectl("delete", "finetunejob", "lost", "--wait=true", "--timeout=60s")
    user.until("the node is back", user.cluster.is_up, 120)


def test_a_bad_dataset_is_refused_in_prepare(user: User) -> None:
    rows = [json.dumps({"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "a"}]}) for i in range(30)]
    rows[6] = '{"messages": [{"role": "user", "content": "no answer"}]}'
    rows[20] = "{not json"
    user.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "bad"}, "data": {"rows.jsonl": "\n".join(rows)}})
    user.apply(gang("bad-data", 10, dataset={"train": {"uri": "configmap://bad/rows.jsonl"}, "eval": {"splitFraction": 0.2}}))
    status = user.ended("bad-data")
    failed = next(c for c in status["conditions"] if c["type"] == "Failed")
    assert (status["phase"], failed["reason"]) == ("Failed", "InvalidRows")
    assert "train row 21 (rows.jsonl:21): not JSON" in failed["message"] and "{not json" in failed["message"]
    assert not [p for p in user.pods("bad-data") if p["metadata"]["labels"][names.LABEL_STAGE] == "train"], "no GPU was ever asked for"
    assert status.get("attempt") == 0


def test_a11_a_planted_secret_is_nowhere(user: User) -> None:
    """Prepare and check use it with a hub that is not there, and wait for it; then everything that anybody could read is searched."""
    planted = "planted-9f3b7c-token"
    user.kubectl("create", "secret", "generic", "hf-token", f"--from-literal=token={planted}")
    document = manifest("planted", model={"uri": "hf://org/model@1a2b3c4", "secretRef": {"name": "hf-token"}})
    document["spec"]["publish"] = [{"uri": "hf://org/result", "secretRef": {"name": "hf-token"}}]
    user.apply(document)

    def waits() -> bool:
        return all(user.status("planted")["stages"][stage]["waits"] >= 1 for stage in ("prepare", "check"))

    user.until("both wait for the hub", waits, 240)
    told = {c["type"]: c for c in user.status("planted")["conditions"]}
    assert "huggingface.co" in told["DataReady"]["message"] and "Failed" not in told, told
    kinds = "finetunejobs,pods,jobs,configmaps,events,services,networkpolicies,persistentvolumeclaims"
    said = user.kubectl("get", kinds, "-o", "yaml")
    said += "".join(user.kubectl("logs", p["metadata"]["name"], check=False) for p in user.pods("planted"))
    said += user.cluster.kubectl("-n", "finetune-system", "logs", "deploy/finetune-operator", "--tail=-1")
    assert "planted" in said and "prepare" in said, "the job's name is all over it"
    assert planted not in said and base64.b64encode(planted.encode()).decode() not in said


def test_f22_deletion_in_mid_training(user: User) -> None:
    user.apply(gang("doomed", steps=100_000))
    user.until("it trains", lambda: user.status("doomed").get("progress", {}).get("step", 0) > 0, 240)
    user.kubectl("delete", "finetunejob", "doomed", "--wait=true", "--timeout=60s")
    user.until("its pods are gone", lambda: not user.pods("doomed"), 60)
    owned = "pods,jobs,services,configmaps,persistentvolumeclaims"
    user.until("everything owned is gone", lambda: "doomed" not in user.kubectl("get", owned, "-o", "name"), 60)
    time.sleep(3)
    assert "doomed" not in user.kubectl("get", owned, "-o", "name"), "nothing is made again"


def test_f36_training_does_not_need_the_operator(user: User) -> None:
    """F2 with real pods: the operator is away while the pods train, and picks the result up on return."""
    operator = ("-n", "finetune-system", "scale", "deployment", "finetune-operator")
    hyper = {"maxSteps": 300, "learningRate": 1e-3, "globalBatchSize": 8, "maxLength": 64}
    user.apply(trained_only(manifest("alone", tuning={"hyperparameters": hyper})))
    user.until("it trains", lambda: user.status("alone").get("phase") == "Training", 240)
    user.cluster.kubectl(*operator, "--replicas=0")
    try:
        user.until(
            "the worker has ended",
            lambda: user.kubectl("get", "pod", "alone-worker-0", "-o", "jsonpath={.status.phase}") == "Succeeded",
            240,
        )
        assert user.status("alone")["phase"] == "Training"
    finally:
        user.cluster.kubectl(*operator, "--replicas=1")
    assert user.ended("alone")["phase"] == "Succeeded", user.story()


def test_a11_a20_the_operator_holds_no_more_than_it_says(user: User) -> None:
    """RBAC as installed: no secrets but its own, no writes to nodes, no pods/exec."""
    account = "system:serviceaccount:finetune-system:finetune-operator"

    def allowed(verb: str, resource: str, subresource: str = "") -> str:
        said = user.kubectl("auth", "can-i", verb, resource, f"--subresource={subresource}", f"--as={account}", check=False)
        return said.strip().splitlines()[-1]

    for verb, resource, subresource in (
        ("get", "secrets", ""), ("list", "secrets", ""), ("create", "pods", "exec"), ("patch", "nodes", ""),
        ("update", "finetunejobs", ""), ("patch", "pods", ""), ("get", "pods", "log"), ("create", "serviceaccounts", "token"),
    ):  # fmt: skip
        assert allowed(verb, resource, subresource) == "no", (verb, resource, subresource)
    for verb, resource, subresource in (("create", "pods", ""), ("list", "finetunejobs", ""), ("update", "finetunejobs", "status")):
        assert allowed(verb, resource, subresource) == "yes", (verb, resource, subresource)


def test_an_uninstalled_operator_strands_nothing(user: User) -> None:
    """Training goes on, jobs can be deleted with all that is theirs, and what is installed again takes over."""
    user.apply(gang("stays", steps=100_000))  # it does not end before it is deleted, however fast the machine is
    user.until("training", lambda: user.status("stays").get("phase") == "Training", 180)
    helm.uninstall(user.cluster.kubeconfig)
    try:
        pods = [p for p in user.pods("stays") if p["status"]["phase"] == "Running"]
        assert pods, "its pods still train"
        left = user.kubectl("get", "validatingwebhookconfigurations,mutatingwebhookconfigurations,clusterroles", "-o", "name")
        assert "finetune" not in left, "nothing of the chart is left that could hold anybody up"
        user.kubectl("delete", "finetunejob", "stays", "--timeout=30s")
        user.until("all of it is gone", lambda: not user.pods("stays"), 120)
        user.apply(trained_only(manifest("waits")))
    finally:
        helm.install(user.cluster.kubeconfig)
    assert user.ended("waits")["phase"] == "Succeeded", user.story()
