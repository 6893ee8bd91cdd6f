"""Tokens per second of the trainer beside `trl sft` with the same model, rows, batch, adapter and steps.

Non-padding tokens over the training loop's own time; model loading is left out on both sides. The arms take turns.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from finetune_api.validation import parse_job
from finetune_cli.local import LocalRun, job_file
from tests.cluster.quickstart import model
from tests.cluster.shell import REPO

ROUNDS, STEPS, BATCH, LENGTH = 5, 8, 8, 128


def bench() -> dict[str, Any]:
    """Medians of both arms and their ratio."""
    folder = model("smollm2.py", "SmolLM2-135M-Instruct")
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "data")
        data.mkdir()
        rows = [json.loads(line)["messages"] for line in (REPO / "examples/data/support-tickets.jsonl").read_text().splitlines()]
        shaped = [{"prompt": f"{q['content']}\n", "completion": a["content"]} for q, a in rows]
        (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shaped))
        for index in range(ROUNDS):
            ours.append(_ours(Path(scratch, f"ours-{index}"), folder, data))
            theirs.append(_trl(Path(scratch, f"trl-{index}"), folder, data))
    mine, base = statistics.median(ours), statistics.median(theirs)
    return {
        "steps": STEPS,
        "tokens_per_second": {"finetune": round(mine, 1), "trl_sft": round(base, 1)},
        "ratio": round(mine / base, 3),
        "spread": {"finetune": [round(min(ours), 1), round(max(ours), 1)], "trl_sft": [round(min(theirs), 1), round(max(theirs), 1)]},
    }


def _ours(folder: Path, base: Path, data: Path) -> float:
    document = yaml.safe_load((REPO / "examples" / "tiny.yaml").read_text())
    spec = document["spec"]
    spec["model"] = {"uri": f"pvc://models/{base.name}"}
    spec["dataset"] = {"train": {"uri": "pvc://rows/train.jsonl"}}
    hyper = {"maxSteps": STEPS, "learningRate": 2e-4, "globalBatchSize": BATCH, "maxLength": LENGTH}
    spec["tuning"] = {"lora": {"rank": 8, "alpha": 16, "dropout": 0}, "hyperparameters": hyper}
    spec["distribution"] = {"gpusPerNode": 0, "perDeviceBatchSize": BATCH}
    del spec["evaluation"], spec["publish"]
    metadata, parsed = parse_job(document)
    run = LocalRun(job_file(metadata, parsed, {"models": str(base.parent), "rows": str(data)}), folder)
    run.run()
    if run.status.phase != "Succeeded":
        raise RuntimeError(run.status.conditions[-1].message)
    last = json.loads(Path(run.layout.history).read_text().splitlines()[-1])
    shutil.rmtree(folder)
    return float(last["tokensPerSecond"])


def _trl(folder: Path, base: Path, data: Path) -> float:
    command = [
        sys.executable, "-m", "trl.scripts.sft", "--model_name_or_path", base, "--dataset_name", data, "--output_dir", folder,
        "--max_steps", STEPS, "--per_device_train_batch_size", BATCH, "--gradient_accumulation_steps", 1, "--max_length", LENGTH,
        "--learning_rate", 2e-4, "--lr_scheduler_type", "cosine", "--use_peft", "--lora_r", 8, "--lora_alpha", 16, "--lora_dropout", 0,
        "--lora_target_modules", "all-linear", "--use_cpu", "--bf16", "False", "--gradient_checkpointing", "False", "--logging_steps", 1,
        "--save_strategy", "no", "--report_to", "none", "--dtype", "float32",
        "--attn_implementation", "sdpa", "--eval_strategy", "no", "--dataset_train_split", "train",
    ]  # fmt: skip
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    env["OMP_NUM_THREADS"] = str(os.cpu_count())
    done = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-3000:])
    tokens = re.findall(r"'num_tokens': '?([0-9.e+]+)", done.stdout + done.stderr)
    seconds = re.findall(r"'train_runtime': '?([0-9.]+)", done.stdout + done.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    return float(tokens[-1]) / float(seconds[-1])
