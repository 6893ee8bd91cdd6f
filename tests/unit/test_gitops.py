"""What GitOps tools see: Argo CD's health check in real Lua, Flux's readiness by kstatus' own rules, kustomize's output."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import lupa
import pytest
import yaml

from finetune_api.validation import parse_job
from finetune_operator.model.job import Observed
from finetune_operator.reconcile.job import reconcile
from finetune_operator.settings import Settings
from tests.cluster.local import kubectl
from tests.cluster.shell import REPO
from tests.factory import MINIMAL, NOW, TRAINED, job, merged
from tests.unit.test_reconcile import TWO, World

GITOPS = REPO / "examples" / "gitops"


def kstatus(raw: dict[str, Any]) -> str:
    """Flux's verdict on a custom resource: sigs.k8s.io/cli-utils, pkg/kstatus/status, checkGenericProperties and then Ready."""
    meta, status = raw["metadata"], raw.get("status") or {}
    if meta.get("deletionTimestamp"):
        return "Terminating"
    if "observedGeneration" in status and status["observedGeneration"] != meta["generation"]:
        return "InProgress"
    conditions = {c["type"]: c["status"] for c in status.get("conditions", ())}
    if conditions.get("Reconciling") == "True":
        return "InProgress"
    if conditions.get("Stalled") == "True":
        return "Failed"
    if "Ready" in conditions:
        return "Current" if conditions["Ready"] == "True" else "InProgress"
    return "Current"


def argo(raw: dict[str, Any]) -> tuple[str, str]:
    """Argo CD's verdict."""
    runtime = lupa.LuaRuntime()
    runtime.globals()["obj"] = runtime.table_from(raw, recursive=True)
    found = runtime.execute((GITOPS / "argocd" / "health.lua").read_text())
    return found["status"], found["message"] or ""


def seen(world: World) -> dict[str, Any]:
    return {**world.job, "status": world.status.to_wire()}


def test_a_jobs_life_as_the_tools_see_it() -> None:
    world = World(TWO)
    assert argo(world.job) == ("Progressing", "waits for the operator")
    world.settle()
    assert kstatus(seen(world)) == "InProgress" and argo(seen(world)) == ("Progressing", "Preparing")
    world.to_training()
    assert kstatus(seen(world)) == "InProgress" and argo(seen(world))[0] == "Progressing"
    world.job["spec"]["runPolicy"] = {"suspend": True}
    world.job["metadata"]["generation"] += 1
    assert kstatus(seen(world)) == "InProgress" and argo(seen(world)) == ("Progressing", "waits for the operator"), "Git is ahead"
    world.settle()
    assert argo(seen(world))[0] == "Suspended" and kstatus(seen(world)) == "InProgress"


def test_a_good_and_a_bad_end() -> None:
    world = World(MINIMAL).to_training()
    world.succeed("worker-0", TRAINED)
    world.settle()
    assert world.status.phase == "Succeeded"
    assert kstatus(seen(world)) == "Current" and argo(seen(world))[0] == "Healthy"
    bad = job(merged(MINIMAL, tuning={"method": "lorra"}))
    plan = reconcile(Observed(job=bad, now=NOW), Settings())
    assert plan.status is not None
    failed = {**bad, "status": plan.status.to_wire()}
    health, message = argo(failed)
    assert kstatus(failed) == "Failed" and health == "Degraded" and "spec.tuning.method" in message


@pytest.mark.parametrize("folder", ["base", "overlays/research"])
def test_kustomize_makes_valid_jobs(folder: str) -> None:
    built = subprocess.run([kubectl(), "kustomize", str(GITOPS / folder)], capture_output=True, text=True, check=True).stdout
    metadata, spec = parse_job(yaml.safe_load(built))
    if folder != "base":
        assert metadata["name"] == "support-tickets-2026-11-21" and metadata["namespace"] == "research"
        assert (spec.scheduling.queue, spec.distribution.gpus_per_node) == ("research", 4)


def _documents(path: Path) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


def test_the_examples_of_other_tools_hold_valid_jobs() -> None:
    files = sorted(GITOPS.rglob("*.yaml"))
    assert len(files) >= 8
    assert all(_documents(path) for path in files)
    (workflow,) = _documents(GITOPS / "pipelines" / "argo-workflow.yaml")
    metadata, spec = parse_job(yaml.safe_load(workflow["spec"]["templates"][0]["resource"]["manifest"]))
    assert metadata["generateName"] == "nightly-" and spec.evaluation is not None and spec.evaluation.gate is not None
    (task,) = _documents(GITOPS / "pipelines" / "tekton-task.yaml")
    for step in task["spec"]["steps"]:
        subprocess.run(["sh", "-n"], input=step["script"], text=True, check=True)
