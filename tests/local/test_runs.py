"""A run is bound to what it was made from: the field's case of rows that changed between two runs, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.trainer.conftest import chat

JOB = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "rerun"},
    "spec": {
        "model": {"uri": "pvc://models/tiny"},
        "dataset": {"train": {"uri": "pvc://data/train.jsonl"}, "checks": {"minExamples": 1}},
        "tuning": {
            "lora": {"rank": 8, "alpha": 16, "dropout": 0},
            "hyperparameters": {"maxSteps": 20, "learningRate": 2e-2, "globalBatchSize": 6, "maxLength": 64},
        },
        "distribution": {"gpusPerNode": 0},
        "checkpoint": {"everySteps": 10},
        "publish": [{"uri": "pvc://out/m"}],
    },
}
WORDS = ("red", "green", "blue", "cat", "dog", "bird")
ROWS = {"a": [chat(word, "yes") for word in WORDS], "b": [chat(word, f"no {word}") for word in WORDS]}


class Desk:
    """A folder with a manifest, rows and a model, as a user has it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.volumes = ["--volume=data=data", f"--volume=models={model.parent}", "--volume=out=out"]
        (folder / "data").mkdir()
        (folder / "job.yaml").write_text(yaml.safe_dump(JOB))

    def finetune(self, *words: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        command = [sys.executable, "-m", "finetune_cli", *words, "--workspace", "ws"]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False, env=env)

    def run(self, rows: str, *words: str) -> tuple[str, bytes, str]:
        """What was said, the published adapter, and the digest of the rows that it says it was made from."""
        (self.folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[rows]))
        done = self.finetune("run", "--local", "job.yaml", *self.volumes, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        out = self.folder / "out" / "m"
        return (
            done.stdout,
            (out / "adapter_model.safetensors").read_bytes(),
            json.loads((out / "finetune.json").read_text())["dataset"]["digest"],
        )


@pytest.fixture
def desk(tmp_path: Path, tiny_model: Path) -> Desk:
    return Desk(tmp_path, tiny_model)


def test_rows_that_changed_between_two_runs(desk: Desk) -> None:
    told, of_a, digest_a = desk.run("a")
    assert "run 1, a new one" in told
    told, of_b, digest_b = desk.run("b")
    assert "run 2, a new one: the rows changed since run 1; run 1 is kept" in told and "from the checkpoint" not in told
    assert of_b != of_a and digest_b != digest_a, "it learned of the new rows"
    told, named, digest = desk.run("b", "--resume", "1")
    assert "goes on with run 1 from step 20, as --resume asks for" in told and "from the checkpoint at step 20" in told
    assert (named, digest) == (of_a, digest_a), "with its own rows, which it says"
    told, again, digest = desk.run("b")
    assert "goes on with run 2 from step 20: it was made from the same" in told and (again, digest) == (of_b, digest_b)
    listed = json.loads(desk.finetune("list", "--local", "-o", "json").stdout)
    assert {(run["run"], run["phase"], run["step"], run["rows"]) for run in listed} == {
        ("1", "Succeeded", 20, digest_a),
        ("2", "Succeeded", 20, digest_b),
    }
    assert "1 (Succeeded, step 20)" in desk.finetune("run", "--local", "job.yaml", "--resume", "9", *desk.volumes).stderr


def test_what_cannot_be_asked_for(desk: Desk) -> None:
    both = desk.finetune("run", "--local", "job.yaml", "--resume", "1", "--fresh")
    assert both.returncode == 2 and "leave one of the two out" in both.stderr
    none = desk.finetune("run", "--local", "job.yaml", "--resume", "1", *desk.volumes)
    assert none.returncode == 2 and "there are: none" in none.stderr
    (desk.folder / "job.yaml").write_text(yaml.safe_dump_all([JOB, {**JOB, "metadata": {"name": "second"}}]))
    two = desk.finetune("run", "--local", "job.yaml", "--resume", "1", *desk.volumes)
    assert two.returncode == 2 and "holds 2 jobs" in two.stderr
    assert "no runs in" in desk.finetune("list", "--local").stdout
    (desk.folder / "file").write_text("")
    (desk.folder / "job.yaml").write_text(yaml.safe_dump(JOB))
    command = [sys.executable, "-m", "finetune_cli", "run", "--local", "job.yaml", "--workspace", "file", *desk.volumes]
    refused = subprocess.run(command, cwd=desk.folder, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "--workspace" in refused.stderr and "Traceback" not in refused.stderr
