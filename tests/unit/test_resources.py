"""The manifests: golden files that a person can review, the restricted standard, old and new schemas."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from finetune_api import names
from finetune_api.contract import JobFile, Mounts
from finetune_api.status import AdmissionStatus, Plan
from finetune_api.validation import parse_model
from finetune_operator.resources.common import job_file
from finetune_operator.resources.gang import service, worker
from finetune_operator.resources.shared import config_map, network_policy, workspace
from finetune_operator.resources.stage import stage_job
from finetune_operator.resources.tuned_model import catalog_config, catalog_file, catalog_job, catalog_policy
from finetune_operator.servers.certificate import generate, read_authorities
from finetune_operator.settings import Settings, from_environment
from tests.factory import FULL, MINIMAL, NOW, PLAN, UID, merged, ref

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = Settings(network_policies=True, trainer_image="registry.example/finetune-trainer:1", image_pull_secrets=("pull",))
PARSED = Plan.model_validate(PLAN)


def manifests(spec: dict[str, Any]) -> list[dict[str, Any]]:
    job = ref(spec)
    found = [
        network_policy(job, SETTINGS),
        config_map(job, SETTINGS),
        workspace(job),
        service(job),
        worker(job, SETTINGS, PARSED, 1, 2),
        *(stage_job(job, SETTINGS, stage, 0) for stage in ("prepare", "check", "evaluate", "publish")),
    ]
    return [m for m in found if m is not None]


@pytest.mark.parametrize(("name", "spec"), [("minimal", MINIMAL), ("full", FULL)])
def test_golden(name: str, spec: dict[str, Any]) -> None:
    text = yaml.safe_dump_all(manifests(spec), sort_keys=False, width=120)
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text, "run with UPDATE_GOLDEN=1 and review the difference"


def test_golden_of_a_model() -> None:
    """What a FineTunedModel owns."""
    spec = parse_model({"spec": {"storage": "s3://models/bot", "secretRef": {"name": "keys"}}})
    file = catalog_file("bot", "team-a", UID, spec, {2: "Champion", 1: "Retired"}, [3])
    found = [catalog_policy(file, SETTINGS), catalog_config(file, SETTINGS), catalog_job(file, spec, SETTINGS, 0)]
    text = yaml.safe_dump_all(found, sort_keys=False, width=120)
    path = GOLDEN / "model.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text, "run with UPDATE_GOLDEN=1 and review the difference"


@pytest.mark.parametrize("version", ["1.35", "1.37"])
@pytest.mark.parametrize("spec", [MINIMAL, FULL])
def test_manifests_are_valid(version: str, spec: dict[str, Any]) -> None:
    for manifest in manifests(spec):
        kubernetes_validate.validate(manifest, version, strict=True)


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for manifest in manifests(spec):
        if manifest["kind"] == "Pod":
            found.append(manifest["spec"])
        elif manifest["kind"] == "Job":
            found.append(manifest["spec"]["template"]["spec"])
    return found


@pytest.mark.parametrize("spec", [MINIMAL, FULL])
def test_pods_satisfy_the_restricted_standard(spec: dict[str, Any]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
    for pod in pods(spec):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName", "nodeName"} & set(pod)
        for volume in pod["volumes"]:
            assert set(volume) - {"name"} <= allowed
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "privileged" not in context


def test_gpus_are_asked_for_only_where_they_are_used() -> None:
    by_stage = {}
    for manifest in manifests(FULL):
        stage = manifest["metadata"]["labels"].get(names.LABEL_STAGE)
        if manifest["kind"] in ("Pod", "Job") and stage:
            pod = manifest["spec"] if manifest["kind"] == "Pod" else manifest["spec"]["template"]["spec"]
            by_stage[stage] = pod["containers"][0]["resources"].get("limits", {}).get("nvidia.com/gpu")
    assert by_stage == {"prepare": None, "check": None, "train": "4", "evaluate": "1", "publish": None}


def test_secrets_reach_only_the_stage_that_needs_them() -> None:
    found = {}
    for manifest in manifests(FULL):
        if manifest["kind"] in ("Pod", "Job"):
            pod = manifest["spec"] if manifest["kind"] == "Pod" else manifest["spec"]["template"]["spec"]
            found[manifest["metadata"]["labels"][names.LABEL_STAGE]] = {
                (v["secret"]["secretName"], v["secret"]["items"][0]["key"]) for v in pod["volumes"] if "secret" in v
            }
    write = {("hf-write", "token")}
    assert found == {"prepare": {("hf-token", "token")}, "check": write, "train": set(), "evaluate": set(), "publish": write}


def test_a10_every_kind_of_secret_reaches_its_stage_alone() -> None:
    """Only the keys asked for are mounted, of Secrets of the job's own namespace."""
    spec = merged(
        FULL,
        dataset={
            "train": {"uri": "s3://data/rows.jsonl", "secretRef": {"name": "s3"}},
            "mix": [{"uri": "https://host/rows.jsonl", "secretRef": {"name": "web", "key": "bearer"}}],
            "eval": {"splitFraction": 0.1},
        },
        tuning={
            "objective": "distill",
            "lora": None,
            "continueFrom": "oci://registry.example/team/bot:v1",
            "continueFromSecretRef": {"name": "pull"},
            "distillation": {"teacher": {"uri": "hf://org/big", "secretRef": {"name": "teacher"}}},
            "hyperparameters": {"globalBatchSize": 32},
            "tracking": {
                "mlflow": {"trackingUri": "http://m", "secretRef": {"name": "mlflow"}},
                "wandb": {"project": "p", "secretRef": {"name": "wandb"}},
            },
        },
        evaluation={"metrics": ["judge-win-rate"], "judge": {"url": "http://j/v1", "model": "m", "secretRef": {"name": "judge"}}},
        publish=[{"uri": "hf://org/m", "secretRef": {"name": "hf-write"}}, {"uri": "s3://models/m", "secretRef": {"name": "s3-write"}}],
    )
    found: dict[str, set[tuple[str, str]]] = {}
    for manifest in manifests(spec):
        if manifest["kind"] in ("Pod", "Job"):
            pod = manifest["spec"] if manifest["kind"] == "Pod" else manifest["spec"]["template"]["spec"]
            stage = manifest["metadata"]["labels"][names.LABEL_STAGE]
            found[stage] = {(v["secret"]["secretName"], i["key"]) for v in pod["volumes"] if "secret" in v for i in v["secret"]["items"]}
    write = {("hf-write", "token"), ("s3-write", "AWS_ACCESS_KEY_ID"), ("s3-write", "AWS_SECRET_ACCESS_KEY")}
    assert found == {
        "prepare": {
            ("hf-token", "token"), ("pull", ".dockerconfigjson"), ("teacher", "token"), ("web", "bearer"), ("s3", "AWS_ACCESS_KEY_ID"), ("s3", "AWS_SECRET_ACCESS_KEY"),
        },
        "check": write,
        "train": {("mlflow", "token"), ("wandb", "token")},
        "evaluate": {("judge", "token")},
        "publish": write,
    }  # fmt: skip


def test_a6_the_administrators_hosts_reach_the_stages_that_read_and_write_there() -> None:
    settings = dataclasses.replace(SETTINGS, allowed_hosts=("minio.tools.svc",))
    for stage in ("prepare", "check", "evaluate", "publish"):
        pod = stage_job(ref(MINIMAL), settings, stage, 0)["spec"]["template"]["spec"]  # type: ignore[arg-type]
        env = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
        assert env.get("FINETUNE_ALLOWED_HOSTS") == (None if stage == "evaluate" else "minio.tools.svc")


def test_sources_are_read_only_and_targets_only_where_they_are_asked_and_written() -> None:
    """Check sees targets and nothing else, neither the workspace nor the sources."""
    spec = merged(MINIMAL, publish=[{"uri": "pvc://models/out"}])
    check = stage_job(ref(spec), SETTINGS, "check", 0)["spec"]["template"]["spec"]
    assert {v["name"] for v in check["volumes"]} == {"job", "tmp", "target-0"}
    for manifest in manifests(spec):
        if manifest["kind"] not in ("Pod", "Job"):
            continue
        pod = manifest["spec"] if manifest["kind"] == "Pod" else manifest["spec"]["template"]["spec"]
        for mount in pod["containers"][0]["volumeMounts"]:
            if mount["name"].startswith("source-"):
                assert mount["readOnly"] is True
            if mount["name"].startswith("target-"):
                assert manifest["metadata"]["labels"][names.LABEL_STAGE] in ("check", "publish")


def test_job_json_is_stable_and_free_of_what_may_change() -> None:
    job = ref(FULL)
    changed = ref(merged(FULL, runPolicy={"suspend": True, "maxRestarts": 9}))
    assert job_file(job).dumps() == job_file(changed).dumps()
    assert JobFile.model_validate(json.loads(job_file(job).dumps())).spec.model.uri == "hf://org/model@main"


def test_no_worker_bears_what_grows_with_the_gang() -> None:
    """Of 512 pods each would bear 512 names: which nodes are planned is on record once, in the status."""

    def bytes_of(pods: int) -> int:
        planned = [f"node-{rank:04}" for rank in range(pods)]
        admission = AdmissionStatus(queue="q", nodes=512, planned_nodes=planned, attempt=0, admitted_at="2026-01-01T00:00:00Z")
        return len(json.dumps(worker(ref(FULL), SETTINGS, PARSED, 0, 0, (), admission)))

    assert bytes_of(512) == bytes_of(1)


def test_threads_follow_the_pods_cpus() -> None:
    def threads(spec: dict[str, Any]) -> str | None:
        env = worker(ref(spec), SETTINGS, PARSED, 0, 0)["spec"]["containers"][0]["env"]
        return next((e["value"] for e in env if e["name"] == "OMP_NUM_THREADS"), None)

    assert threads(MINIMAL) is None
    assert threads(FULL) == "4"
    assert threads(merged(MINIMAL, resources={"requests": {"cpu": "500m"}})) == "1"


LONG = "a" * 250


@pytest.mark.parametrize("name", ["a", "a.b.c", "9lives", "x" * 63, LONG, f"{LONG}b", "trailing-dot.x", "a" * 42 + "-b"])
def test_a3_derived_names_are_valid(name: str) -> None:
    import re

    derived = [
        names.config_map_name(name),
        names.service_name(name),
        names.workspace_name(name),
        names.worker_name(name, 511),
        *(names.stage_name(name, stage, 9999) for stage in ("prepare", "check", "evaluate", "publish")),
    ]
    for text in derived:
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", text) and len(text) <= 63, text
    assert len(names.job_label(name)) <= 63
    assert len(derived) == len(set(derived))


def test_a3_long_names_that_begin_alike_stay_apart() -> None:
    assert names.base_name(LONG) != names.base_name(f"{LONG}b")
    assert names.base_name("a.b") != names.base_name("a-b")


def test_settings_come_from_the_environment() -> None:
    settings = from_environment(
        {
            "FINETUNE_ALLOW_CPU": "true",
            "FINETUNE_WORKERS": "3",
            "FINETUNE_IMAGE_PULL_SECRETS": "a,b",
            "FINETUNE_STATUS_INTERVAL_SECONDS": "0.5",
        }
    )
    assert (settings.allow_cpu, settings.workers, settings.image_pull_secrets, settings.status_interval_seconds) == (
        True,
        3,
        ("a", "b"),
        0.5,
    )
    assert settings.endpoint == "https://finetune-operator.finetune-system.svc:8443"
    assert from_environment({"FINETUNE_PROGRESS_URL": "none"}).endpoint == ""
    for variable, value in (("FINETUNE_WORKERS", "many"), ("FINETUNE_ALLOW_CPU", "maybe")):
        with pytest.raises(ValueError, match=variable):
            from_environment({variable: value})


def test_mirrors_proxies_and_authorities_reach_every_stage() -> None:
    settings = dataclasses.replace(
        SETTINGS,
        hub_endpoint="https://hub.example.com",
        s3_endpoint="http://minio.storage:9000",
        https_proxy="http://proxy:3128",
        no_proxy=".example.com",
        authorities="PEM",
    )
    stages = [stage_job(ref(FULL), settings, stage, 0)["spec"]["template"]["spec"] for stage in ("prepare", "evaluate", "publish")]  # type: ignore[arg-type]
    for pod in [*stages, worker(ref(FULL), settings, PARSED, 0, 0)["spec"]]:
        env = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
        assert env["HF_ENDPOINT"] == "https://hub.example.com" and env["AWS_ENDPOINT_URL_S3"] == "http://minio.storage:9000"
        assert env["HTTPS_PROXY"] == "http://proxy:3128" and "HTTP_PROXY" not in env
        assert env["NO_PROXY"] == ".example.com,localhost,127.0.0.1,.svc,.cluster.local", "progress does not go through a proxy"
        mounts = {m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
        assert str(Path(Mounts.AUTHORITIES).parent) in mounts
    assert config_map(ref(FULL), settings)["data"][Path(Mounts.AUTHORITIES).name] == "PEM"
    plain = stage_job(ref(FULL), SETTINGS, "prepare", 0)["spec"]["template"]["spec"]["containers"][0]["env"]
    assert not {e["name"] for e in plain} & {"HF_ENDPOINT", "AWS_ENDPOINT_URL_S3", "HTTPS_PROXY", "NO_PROXY"}


def test_authorities_are_certificates_and_few(tmp_path: Path) -> None:
    own = generate(["hub.example.com"], NOW)
    path = tmp_path / "ca.crt"
    path.write_text(f"a comment\n{own.key}{own.certificate}")
    assert read_authorities(str(path)) == own.certificate, "a key that stands there goes nowhere"
    for text, problem in (
        ("", "no PEM certificates"),
        ("x", "no PEM certificates"),
        (own.certificate * 120, "name your own authorities only"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"{problem}.*|.*trainer\.caBundle.*{problem}"):
            read_authorities(str(path))
    with pytest.raises(ValueError, match=r"none\.crt.*trainer\.caBundle"):
        read_authorities(str(tmp_path / "none.crt"))


@pytest.mark.parametrize("name", ["HUB_ENDPOINT", "S3_ENDPOINT", "HTTPS_PROXY"])
def test_an_endpoint_is_an_address(name: str) -> None:
    with pytest.raises(ValueError, match=rf"FINETUNE_{name}='hub\.example\.com': write an address, such as https://"):
        from_environment({f"FINETUNE_{name}": "hub.example.com"})
