"""One person's rows out of what the real stages left: workspace and storage hold nothing of them, and the rest is whole."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from finetune_api.contract import ModelStorage, StageResult
from finetune_api.erasure import ErasureReport
from finetune_api.probing import Probes
from finetune_trainer.evaluation.arms import read_baseline
from finetune_trainer.export.bundle import digests
from finetune_trainer.job.context import Context
from finetune_trainer.models.versions import learned_prompts
from finetune_trainer.process.ipc import IPC_DIR
from finetune_trainer.remote.storage import open_storage
from finetune_trainer.stages.erase import erase, read_request
from finetune_trainer.stages.evaluate import evaluate
from finetune_trainer.stages.publish import publish
from tests.trainer.conftest import ROWS, Bench, chat

PERSON = [{"user": {"id": 42}, **chat(f"Jane Roe, letter {n}: what colour is a ruby?", "Red, Jane Roe.")} for n in range(20)]
OTHERS = [{"user": {"id": 7}, **row} for row in ROWS["messages"][:20]]


def asked(**request: Any) -> ErasureReport:
    """As `finetune erase` asks, in a process of its own."""
    command = [sys.executable, "-m", "finetune_trainer", "erase"]
    done = subprocess.run(command, input=json.dumps(request) + "\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "roe" not in done.stderr.lower() and "roe" not in done.stdout.lower(), "what is erased is not told"
    return ErasureReport.model_validate(StageResult.model_validate_json(done.stdout).result)


def erased(**request: Any) -> ErasureReport:
    return ErasureReport.model_validate(erase(read_request(json.dumps(request))).result)


def holding(folder: Path) -> list[str]:
    """Files in which the person is still to be found."""
    found = []
    for path in (path for path in sorted(folder.rglob("*")) if path.is_file()):
        text = (
            " ".join(map(str, pq.read_table(path).to_pylist())) if path.suffix == ".parquet" else path.read_bytes().decode(errors="replace")
        )
        found += [str(path.relative_to(folder))] if "roe" in text.lower() else []
    return found


def rows_of(path: str) -> list[str]:
    return [str(row) for row in pq.read_table(path).column("row").to_pylist()]


def test_a_person_is_erased_from_everything_that_a_job_and_its_model_keep(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = {"metrics": ["loss", "exact-match"], "maxNewTokens": 4, "baseline": {"fewShot": 8}}
    tuning = {"method": "lora", "lora": {"rank": 4}, "hyperparameters": {"maxSteps": 2, "globalBatchSize": 8, "maxLength": 128}}
    checks = {"minExamples": 1, "nearDuplicates": "ignore", "nearLeakage": "ignore"}
    dataset = {"train": {"uri": "pvc://rows/train.jsonl"}, "eval": {"splitFraction": 0.25}, "checks": checks}
    context: Context = bench.context([*PERSON, *OTHERS], publish=[{"model": "bot"}], dataset=dataset, tuning=tuning, evaluation=evaluation)
    context.job.models["bot"] = ModelStorage(storage="pvc://published/bot")
    passing = bench.folder / "ipc"
    passing.mkdir()
    with monkeypatch.context() as patch:
        patch.setenv(IPC_DIR, str(passing))
        bench.train(context)
    assert list(passing.glob("rows-*/**/*.arrow")), "the copy that training reads lies where the supervisor removes it"
    evaluate(context)
    publish(context)
    job, model = Path(context.layout.job), bench.folder / "published" / "bot"
    parquet = ["data/eval.parquet", "data/train.parquet"]
    before = holding(job)
    assert {
        "data/baseline.json",
        "data/probes.json",
        *parquet,
        "reports/data.html",
        "reports/data.json",
        "reports/evaluation.html",
        "reports/evaluation.json",
    } <= set(before), before
    total = len(rows_of(context.layout.train_rows)) + len(rows_of(context.layout.eval_rows))
    learned = sum("Jane Roe" in row for row in rows_of(context.layout.train_rows))
    sums = digests(model / "versions" / "1")

    # 1. A dry run tells the same and leaves all as it is
    content = "".join(json.dumps(row) + "\n" for row in [*OTHERS, *PERSON])
    named = {"rows": {"name": "train.jsonl", "content": base64.b64encode(content.encode()).decode()}, "where": {"user.id": "42"}}
    place = {"workspace": context.workspace}
    dry = asked(dryRun=True, **named, **place)
    assert holding(job) == before and not (job / "erasures.json").exists()
    told = erased(**named, **place)
    assert (told.files, told.learned, told.matching) == (dry.files, dry.learned, len(PERSON))

    # 2. Nothing of the person is left, all of the others is
    assert holding(job) == []
    counts = {file.file.removeprefix(f"jobs/{job.name}/"): (file.what, file.count) for file in told.files}
    assert sum(counts[name][1] for name in parquet) == len(PERSON) and counts["data/train.parquet"] == ("rows", learned)
    left = rows_of(context.layout.train_rows) + rows_of(context.layout.eval_rows)
    assert len(left) == total - len(PERSON) and read_baseline(context).arms
    assert (
        "Answers side by side" in Path(context.layout.evaluation_page).read_text()
        and "Samples" in Path(context.layout.data_page).read_text()
    )
    assert [(one.rows, one.earlier) for one in told.learned] == [(learned, 0)] and told.learned[0].job.startswith("n/job (")

    # 3. The model's storage: probes and digests, and who learned from them; what is published is as it was
    kept = {
        "storage": {"storage": "pvc://published/bot"},
        "mounts": context.job.targets,
        "trained": [one.to_wire() for one in told.trained],
    }
    storage = open_storage(ModelStorage(storage="pvc://published/bot"), context.job.targets, None)
    prompts = learned_prompts(storage, 1)
    assert prompts is not None and learned > 0
    found = erased(**named, **kept)
    assert holding(model) == [] and digests(model / "versions" / "1") == sums
    after = learned_prompts(storage, 1)
    assert after is not None and len(after) == len(prompts) - learned
    assert [(one.version, one.rows) for one in found.learned] == [(1, learned)]
    probes = Probes.model_validate_json((model / "probes/1.json").read_text())
    assert 0 < len(probes.probes) < 8 and [(file.count, file.what) for file in found.files if "probes" in file.file] == [
        (8 - len(probes.probes), "probes")
    ]

    # 4. Once more: nothing to do, and still on record who learned
    again, at_model = erased(**named, **place), erased(**named, **kept)
    assert not again.files and not at_model.files
    assert [(one.rows, one.earlier) for one in (*again.learned, *at_model.learned)] == [(0, learned), (0, learned)]
