"""Gangs that Kueue or Volcano decide about: their terms in the manifests, and their words in the status."""

from __future__ import annotations

import dataclasses
from typing import Any

import kubernetes_validate
import pytest

from finetune_api import names
from finetune_api.status import Plan
from finetune_operator.reconcile.job.external_queue import _of_pod_group
from finetune_operator.resources.backends import pod_group
from finetune_operator.resources.gang import worker
from finetune_operator.resources.stage import stage_job
from finetune_operator.settings import Settings, from_environment
from tests.factory import FULL, MINIMAL, PLAN, merged, ref

KUEUE, VOLCANO = Settings(queueing_backend="kueue"), Settings(queueing_backend="volcano")
GANG = merged(FULL, scheduling={"queue": "research", "topologyKey": "rack", "priorityClassName": "batch"})
PARSED = Plan.model_validate({**PLAN, "worldSize": 8})


def condition(type_: str, status: str, message: str = "") -> dict[str, Any]:
    return {"type": type_, "status": status, "message": message, "reason": "R"}


def test_the_backend_is_one_that_is_known() -> None:
    assert from_environment({"FINETUNE_QUEUEING_BACKEND": "volcano"}).queueing_backend == "volcano"
    with pytest.raises(ValueError, match=r"FINETUNE_QUEUEING_BACKEND='kueu': write one of builtin, kueue, volcano"):
        from_environment({"FINETUNE_QUEUEING_BACKEND": "kueu"})


@pytest.mark.parametrize("settings", [KUEUE, VOLCANO], ids=["kueue", "volcano"])
@pytest.mark.parametrize("spec", [MINIMAL, GANG], ids=["minimal", "gang"])
def test_the_manifests_are_valid(settings: Settings, spec: dict[str, Any]) -> None:
    plan = PARSED if spec is GANG else Plan.model_validate({**PLAN, "worldSize": 1})
    for manifest in (worker(ref(spec), settings, plan, 0, 1), stage_job(ref(spec), settings, "evaluate", 0)):
        kubernetes_validate.validate(manifest, "1.37", strict=True)


def test_kueue_gets_a_group_of_its_own_for_every_attempt() -> None:
    pods = [worker(ref(GANG), KUEUE, PARSED, rank, 3) for rank in (0, 1)]
    for pod in pods:
        labels, told = pod["metadata"]["labels"], pod["metadata"]["annotations"]
        assert labels["kueue.x-k8s.io/queue-name"] == "research"
        assert labels["kueue.x-k8s.io/pod-group-name"] == names.group_name("support", 3) == "support-attempt-3"
        assert told["kueue.x-k8s.io/pod-group-total-count"] == "2" and told["kueue.x-k8s.io/retriable-in-group"] == "false"
        assert told["kueue.x-k8s.io/podset-required-topology"] == "rack"
        assert labels[told["kueue.x-k8s.io/pod-group-pod-index-label"]] in ("0", "1")
        assert pod["spec"]["schedulingGates"] == [{"name": "kueue.x-k8s.io/admission"}]


def test_only_stages_with_gpus_wait_in_the_backends_queue() -> None:
    job = ref(GANG)
    evaluate, prepare = stage_job(job, KUEUE, "evaluate", 0), stage_job(job, KUEUE, "prepare", 0)
    assert evaluate["spec"]["suspend"] is True and evaluate["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert "suspend" not in prepare["spec"] and "kueue.x-k8s.io/queue-name" not in prepare["metadata"]["labels"]
    assert stage_job(job, VOLCANO, "evaluate", 0)["spec"]["template"]["spec"]["schedulerName"] == "volcano"
    assert "schedulerName" not in stage_job(job, VOLCANO, "prepare", 0)["spec"]["template"]["spec"]


def test_volcano_gets_a_pod_group_that_goes_with_its_pods() -> None:
    pod = worker(ref(GANG), VOLCANO, PARSED, 0, 2)
    assert pod["spec"]["schedulerName"] == "volcano"
    assert pod["metadata"]["annotations"]["scheduling.k8s.io/group-name"] == "support-attempt-2"
    group = pod_group(ref(GANG), 2, 2, ("support-worker-0", "uid-0"), pod)
    assert group["metadata"]["name"] == "support-attempt-2"
    assert [o["uid"] for o in group["metadata"]["ownerReferences"]] == ["uid-0"]
    assert group["spec"] == {
        "minMember": 2,
        "queue": "research",
        "priorityClassName": "batch",
        "minResources": {"cpu": "32", "memory": str(2 * 200 * 2**30), "nvidia.com/gpu": "8"},
    }


def test_nothing_of_it_without_a_backend() -> None:
    pod = worker(ref(GANG), Settings(), PARSED, 0, 0)
    assert "schedulingGates" not in pod["spec"] and "schedulerName" not in pod["spec"]
    assert pod == worker(ref(GANG), dataclasses.replace(KUEUE, queueing_backend="builtin"), PARSED, 0, 0)


def test_volcanos_words() -> None:
    waits = _of_pod_group({"status": {"conditions": [condition("Unschedulable", "True", "2/2 tasks in gang unschedulable")]}}, "q")
    assert not waits.admitted and waits.message == "2/2 tasks in gang unschedulable"
    assert _of_pod_group(None, "q").message == "waits in Volcano's queue q"
