"""The command line without a cluster: flags to a manifest, explanations, curves, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from rich.console import Console

from finetune_api.validation import InvalidDocument, parse_job, parse_spec
from finetune_cli import show
from finetune_cli.create import again, from_flags
from finetune_cli.documents import read_documents, read_jobs
from finetune_cli.explain import NoSuchField, explain
from tests.factory import FULL, MINIMAL, job, merged

FLAGS: dict[str, Any] = {
    "name": None, "model": "hf://Org/My.Model_8B@main", "data": "hf://org/rows", "eval_fraction": 0.1, "method": "lora", "objective": "sft",
    "epochs": None, "learning_rate": None, "gpus": 1, "nodes": 1, "gpu_memory": "24Gi", "queue": None, "publish": None, "ask": False,
}  # fmt: skip


def finetune(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "finetune_cli", *words], capture_output=True, text=True, check=False)


def test_flags_make_a_valid_job() -> None:
    metadata, spec = from_flags(**{**FLAGS, "publish": "pvc://out/x", "queue": "research", "epochs": 2.0})
    assert metadata == {"generateName": "my-model-8b-"}
    parse_job({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": metadata, "spec": spec})
    assert spec["evaluation"] == {"gate": {}}, "what is published is better than its base"
    _, version = from_flags(**{**FLAGS, "publish": "model://support-bot"})
    assert version["publish"] == [{"model": "support-bot"}]
    _, alone = from_flags(**{**FLAGS, "eval_fraction": 0.0, "name": "mine"})
    assert "evaluation" not in alone and "eval" not in alone["dataset"]


def test_flags_that_are_missing_or_wrong() -> None:
    with pytest.raises(typer.BadParameter, match="is needed"):
        from_flags(**{**FLAGS, "model": None})
    with pytest.raises(InvalidDocument, match=r"spec.tuning.method: 'lorra' is not one of"):
        from_flags(**{**FLAGS, "method": "lorra"})


def test_retry_is_the_same_job_again() -> None:
    ended = job(merged(FULL, runPolicy={"cancel": True, "suspend": True, "maxRestarts": 2}), {"phase": "Failed"}, labels={"team": "a"})
    metadata, spec = again(ended, None)
    assert metadata == {"generateName": "support-", "labels": {"team": "a"}}
    assert spec["runPolicy"] == {"maxRestarts": 2} and parse_spec(spec).tuning == parse_spec(FULL).tuning
    assert "runPolicy" not in again(job(merged(MINIMAL, runPolicy={"cancel": True})), "b")[1]


def text_of(*renderables: Any) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for renderable in renderables:
        console.print(renderable)
    return console.export_text()


def test_explain() -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    explain("spec.tuning.lora", console)
    explain("spec.publish.uri", console)
    explain("queue.spec.flavors", console)
    explain("model.spec.promotion", console)
    explain("endpoint.status.models.canary", console)
    text = console.export_text()
    assert "OnImprovement | Manual | Always" in text and "default: OnImprovement" in text and "percent  <integer>" in text
    assert "rank  <integer>" in text and "spec.publish.uri  <string>" in text and "nominalQuota  <integer> (required)" in text
    with pytest.raises(NoSuchField, match=r"spec.tuning has no field metod; did you mean method\?"):
        explain("spec.tuning.metod", console)
    with pytest.raises(NoSuchField, match="begin with spec"):
        explain("metadata", console)


def test_the_losses_are_read_from_what_transformers_prints() -> None:
    lines = [
        "noise",
        "{'loss': 2.5, 'epoch': 0.1}",
        "2026 INFO {'loss': '1.25', 'grad_norm': 'nan'}",
        "{'loss': oops}",
        "{'eval_loss': 1.0}",
    ]
    assert show.losses(lines) == [2.5, 1.25]


def test_side_by_side() -> None:
    other = job(merged(FULL, tuning={"method": "dora", "hyperparameters": {"globalBatchSize": 32}}), name="other")
    table = text_of(show.compare([job(FULL), other]))
    assert "support" in table and "other" in table and "dora" in table


def test_the_version_that_a_job_made_is_named() -> None:
    artifact = {"uri": "pvc://models/bot/versions/3", "digest": "sha256:" + "a" * 64, "bytes": 1, "model": "bot", "version": 3}
    assert "version: bot@3" in text_of(show.describe(job(FULL, {"phase": "Succeeded", "artifacts": [artifact]}), [], []))


def test_a16_what_pods_say_does_not_reach_the_terminal() -> None:
    message = "\x1b[2Jgone\u202e"
    condition = {"type": "DataReady", "status": "False", "reason": "Bad", "message": message, "lastTransitionTime": "2026-11-21T12:00:00Z"}
    shown = text_of(show.describe(job(FULL, {"phase": "Failed", "conditions": [condition]}), [], [3.0, 2.0, 1.0]))
    assert "\x1b" not in shown and "\u202e" not in shown and "gone" in shown and "Loss" in shown


def test_exit_codes_and_messages(tmp_path: Path) -> None:
    assert finetune("explain", "spec.tuning.method").returncode == 0
    wrong = finetune("explain", "spec.tunning")
    assert wrong.returncode == 2 and "did you mean tuning" in wrong.stderr
    assert finetune("frobnicate").returncode == 2
    assert finetune("run", "x.yaml").returncode == 2, "in a cluster it is create"
    made = finetune("create", "--model", "hf://a/b@1", "--data", "hf://x/y", "--gpu-memory", "24Gi", "--dry-run", "client")
    path = tmp_path / "job.yaml"
    path.write_text(made.stdout)
    assert yaml.safe_load(made.stdout)["kind"] == "FineTuneJob" and finetune("validate", str(path)).returncode == 0
    nowhere = finetune("list", "--kubeconfig", str(tmp_path / "none"))
    assert nowhere.returncode == 2 and "no cluster" in nowhere.stderr and "Traceback" not in nowhere.stderr


MANIFESTS = """
apiVersion: finetune.dev/v1alpha1
kind: FineTunedModel
metadata: {name: support-bot}
spec: {storage: pvc://models/support-bot, promotion: Manual}
---
apiVersion: finetune.dev/v1alpha1
kind: FineTuneEndpoint
metadata: {name: chat}
spec: {base: {uri: "hf://Qwen/Qwen3-0.6B@main"}, models: [{name: support-bot}]}
---
apiVersion: finetune.dev/v1alpha1
kind: FineTuneQueue
metadata: {name: default}
spec: {flavors: [{name: gpu, nominalQuota: 8}]}
"""


def test_manifests_of_models_and_endpoints(tmp_path: Path) -> None:
    path = tmp_path / "serving.yaml"
    path.write_text(MANIFESTS)
    assert read_jobs(path) == []
    checked = finetune("validate", str(path))
    assert [line.split(": ")[1] for line in checked.stdout.splitlines()] == [
        "FineTunedModel support-bot is valid",
        "FineTuneEndpoint chat is valid",
        "FineTuneQueue default is valid",
    ]
    printed = list(yaml.safe_load_all(finetune("create", "-f", str(path), "--dry-run", "client").stdout))
    assert printed == list(yaml.safe_load_all(MANIFESTS)), "as it was written, each a document of its own"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("promotion: Manual", "promotion: manual", "spec.promotion: 'manual' is not one of OnImprovement, Manual, Always"),
        ("promotion", "promotoin", "spec.promotoin: unknown field; did you mean 'promotion'?"),
        ("storage: pvc://models/support-bot, ", "", "spec.storage: is required"),
        ("pvc://models/support-bot", "s3://models/support-bot", "needs secretRef"),
        ("kind: FineTunedModel", "kind: FinetunedModel", "kind: 'FinetunedModel' is not supported; write FineTunedModel"),
        ("kind: FineTuneEndpoint", "kind: FineTuneEndpont", "write FineTuneEndpoint"),
        ("{name: chat}", "{name: Chat}", "metadata.name: 'Chat' is not a valid name"),
        ("models: [{name", "models: [{nme", "spec.models[0].nme: unknown field"),
        ("pvc://models/support-bot", "hf://a/b", "spec.storage"),
    ],
)
def test_wrong_models_and_endpoints_are_explained(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "serving.yaml"
    path.write_text(MANIFESTS.replace(old, new, 1))
    with pytest.raises(InvalidDocument) as refused:
        read_documents(path)
    assert told in str(refused.value)


def test_a_preview_shows_what_is_learned_in_color(tmp_path: Path) -> None:
    import json

    from finetune_cli.preview import LEARNED, NoSamples, drawn, read_samples

    report = tmp_path / "data.json"
    report.write_text(json.dumps({"samples": [[["<|user|>red\x1b[2J", False], ["a colour<|end|>", True]], [["more", False]]]}))
    head, text, _ = list(drawn(read_samples(report)[:1]))
    assert "learned" in head.plain and text.plain == "<|user|>red\ufffd[2Ja colour<|end|>"
    spans = [text.plain[span.start : span.end] for span in text.spans if span.style == LEARNED]
    assert spans == ["a colour<|end|>"]
    shown = finetune("preview", str(report))
    assert shown.returncode == 0 and "a colour<|end|>" in shown.stdout and "row 2" not in shown.stdout
    for broken in ("{", '{"samples": []}', "[]"):
        report.write_text(broken)
        with pytest.raises(NoSamples):
            read_samples(report)
    wrong = finetune("preview", str(report))
    assert wrong.returncode == 2 and "reports/data.json" in wrong.stderr and "Traceback" not in wrong.stderr
    assert finetune("preview", str(tmp_path / "none.json")).returncode == 2
