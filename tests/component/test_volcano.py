"""Gangs handed to Volcano, on a real API server. The test plays Volcano, by its conventions, and kubelet; Kueue is there itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_api import names
from tests.cluster.local import LocalCluster
from tests.component.conftest import Api, Kubelet, Operator, until
from tests.component.machines import GPU, Leaving, gpu_job

POD_GROUP = ("scheduling.volcano.sh", "v1beta1", "podgroups")


@pytest.fixture(scope="module", autouse=True)
def definitions(cluster: LocalCluster) -> None:
    cluster.define(Path(__file__).with_name("volcano.yaml"))


class Gate:
    """Pods of gangs that are not let through stay Pending: what the scheduling gate, or Volcano's scheduler, does."""

    def __init__(self, kubelet: Kubelet) -> None:
        self.through: set[str] = set()
        kubelet.override = self._hold

    def _hold(self, pod: Any) -> dict[str, Any] | None:
        labels = pod.metadata.labels
        if labels.get(names.LABEL_STAGE) == "train" and labels[names.LABEL_ATTEMPT] not in self.through:
            return {"phase": "Pending"}
        return None


def conditions(*told: tuple[str, str, str]) -> list[dict[str, str]]:
    when = "2026-11-21T12:00:00Z"
    return [{"type": t, "status": s, "reason": "Told", "message": m, "lastTransitionTime": when} for t, s, m in told]


def say(api: Api, resource: tuple[str, str, str], name: str, status: dict[str, Any]) -> None:
    group, version, plural = resource
    api.custom.patch_namespaced_custom_object_status(group, version, api.namespace, plural, name, {"status": status})


def groups(api: Api) -> list[dict[str, Any]]:
    group, version, plural = POD_GROUP
    found: list[dict[str, Any]] = api.custom.list_namespaced_custom_object(group, version, api.namespace, plural)["items"]
    return found


def test_volcano_decides_when_a_gang_starts(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    """Its PodGroup is made for the whole gang, and goes with its pods; the operator may be killed while it waits."""
    operator.kill()
    operator.start(FINETUNE_QUEUEING_BACKEND="volcano")
    gate = Gate(kubelet)
    api.create_job(gpu_job("research", nodes=2, gpus=2))
    made = until("the PodGroup", lambda: groups(api))[0]
    assert made["spec"] == {"minMember": 2, "queue": "research", "minResources": {GPU: "4"}}
    first = next(p for p in api.pods() if p.metadata.name == "support-worker-0")
    assert made["metadata"]["ownerReferences"][0]["uid"] == first.metadata.uid
    told = conditions(("Unschedulable", "True", "2/2 tasks in gang unschedulable"))
    say(api, POD_GROUP, made["metadata"]["name"], {"phase": "Pending", "conditions": told})
    until("Volcano's words", lambda: api.status().get("queue", {}).get("message") == "2/2 tasks in gang unschedulable", 60)
    operator.kill()
    operator.start(FINETUNE_QUEUEING_BACKEND="volcano")
    assert api.status()["phase"] == "Queued"
    gate.through.add("0")
    for name, _ in api.workers():
        Leaving.bind_to(api, name)
    until("success", lambda: api.status().get("phase") == "Succeeded", 60)
    assert api.condition("Admitted")["message"] == "its pods were let through"
    assert len(groups(api)) == 1, "one group an attempt"
    # suspended while it waits, nothing reserves a place
    gate.through.clear()
    api.create_job(gpu_job("research", nodes=1), "later")
    until("its group", lambda: len(groups(api)) == 2)
    api.patch_job({"spec": {"runPolicy": {"suspend": True}}}, "later")
    until("its group is gone", lambda: len(groups(api)) == 1, 60)
