"""The trainer beside `trl sft` and beside plain `transformers.Trainer` with padding: same model, rows, batch, adapter, seed and steps.

Non-padding tokens over the training loop's own time (model loading is left out on all sides) and over its CPU time
(which a busy neighbour disturbs less), the process's peak memory, and the time from process start to the first
optimizer step. The arms take turns, in another order every round.
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
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.contract import Env
from finetune_api.status import Plan
from finetune_api.validation import parse_job
from finetune_cli.local import LocalRun, job_file
from tests.cluster.quickstart import model
from tests.cluster.shell import REPO

ROUNDS, STEPS, BATCH, LENGTH = 3, 8, 8, 128
FIELDS = ("tokens_per_second", "tokens_per_cpu_second", "peak_mib", "first_step")
WRAPPER = "import os,sys,resource; p=os.spawnvp(os.P_WAIT,sys.argv[1],sys.argv[1:]); print('PEAK',resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(p)"


@dataclass
class Run:
    """One run of one arm."""

    tokens_per_second: float
    tokens_per_cpu_second: float
    peak_mib: float
    first_step: float


def bench() -> dict[str, Any]:
    """Medians of all arms and the ratios of ours to the others."""
    folder = model("smollm2.py", "SmolLM2-135M-Instruct")
    with tempfile.TemporaryDirectory() as scratch:
        even, mixed = Path(scratch, "even"), Path(scratch, "mixed")
        _rows(even, mixed)
        arms: dict[str, list[Run]] = {}
        turns: list[tuple[str, Callable[[], Run]]] = [
            ("finetune", lambda: _ours(Path(scratch, "run"), folder, even)),
            ("trl_sft", lambda: _trl(Path(scratch, "run"), folder, even)),
            ("transformers_trainer", lambda: _plain(Path(scratch, "run"), folder, even)),
            ("finetune_mixed", lambda: _ours(Path(scratch, "run"), folder, mixed, packing=True)),
            ("trl_sft_mixed", lambda: _trl(Path(scratch, "run"), folder, mixed)),
            ("transformers_trainer_mixed", lambda: _plain(Path(scratch, "run"), folder, mixed)),
        ]
        for turn in range(ROUNDS):
            for name, run in turns[turn:] + turns[:turn]:
                arms.setdefault(name, []).append(run())
                print(json.dumps({"arm": name, **arms[name][-1].__dict__}), flush=True)
                shutil.rmtree(Path(scratch, "run"), ignore_errors=True)

    def middle(arm: str, field: str) -> float:
        return statistics.median(getattr(run, field) for run in arms[arm])

    found: dict[str, Any] = {"steps": STEPS, "rounds": ROUNDS}
    for field in FIELDS:
        found[field] = {arm: round(middle(arm, field), 1) for arm in arms}
    found["spread"] = {arm: [round(f(r.tokens_per_second for r in runs), 1) for f in (min, max)] for arm, runs in arms.items()}
    for ours, others in (
        ("finetune", ("trl_sft", "transformers_trainer")),
        ("finetune_mixed", ("trl_sft_mixed", "transformers_trainer_mixed")),
    ):
        for other in others:
            found[f"{ours}/{other}"] = {f: round(middle(ours, f) / middle(other, f), 3) for f in FIELDS}
    return found


def _rows(even: Path, mixed: Path) -> None:
    """Support tickets, all of about one length; and answers of 1 to 16 tickets, as real conversations differ."""
    pairs = [json.loads(line)["messages"] for line in (REPO / "examples/data/support-tickets.jsonl").read_text().splitlines()]
    shaped = [{"prompt": f"{q['content']}\n", "completion": a["content"]} for _, q, a in pairs]
    long = [
        {
            "prompt": row["prompt"],
            "completion": " ".join(shaped[(i + k) % len(shaped)]["prompt"] for k in range((1, 1, 1, 2, 1, 1, 4, 16)[i % 8])),
        }
        for i, row in enumerate(shaped)
    ]
    for folder, rows in ((even, shaped), (mixed, long)):
        folder.mkdir()
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _run(command: list[Any], env: dict[str, str]) -> Run:
    """Run an arm's process. It prints BEGIN, FIRST and LAST (the time and CPU time at the loop's start, first and last step), and TRL's or our log of tokens and seconds."""
    started = time.time()
    done = subprocess.run([sys.executable, "-c", WRAPPER, *map(str, command)], env=env, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    if done.returncode != 0:
        raise RuntimeError(text[-3000:])
    tokens = re.findall(r"'num_(?:input_)?tokens(?:_seen)?': '?([0-9.e+]+)", text)
    marks = {word: (float(at), float(cpu)) for word, at, cpu in re.findall(r"(BEGIN|FIRST|LAST) ([0-9.]+) ([0-9.]+)", text)}
    seconds, cpu = (last - begin for begin, last in zip(marks["BEGIN"], marks["LAST"], strict=True))  # before the final checkpoint
    peak = re.findall(r"PEAK ([0-9]+)", text)
    return Run(float(tokens[-1]) / seconds, float(tokens[-1]) / cpu, float(peak[-1]) / 1024, marks["FIRST"][0] - started)


def _environment() -> dict[str, str]:
    return {
        **os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(os.cpu_count()), "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "hooks"), *(p for p in sys.path if p)]), "FINETUNE_BENCH": "1",
    }  # fmt: skip


def _ours(folder: Path, base: Path, data: Path, *, packing: bool = False) -> Run:
    import yaml

    document = yaml.safe_load((REPO / "examples" / "tiny.yaml").read_text())
    spec = document["spec"]
    spec["model"] = {"uri": f"pvc://models/{base.name}"}
    checks = {"nearDuplicates": "ignore", "nearLeakage": "ignore", "duplicates": "keep"}
    spec["dataset"] = {"train": {"uri": "pvc://rows/train.jsonl"}, "checks": checks}
    length = 4 * LENGTH if data.name == "mixed" else LENGTH
    hyper = {
        "maxSteps": STEPS,
        "learningRate": 2e-4,
        "globalBatchSize": BATCH,
        "maxLength": length,
        "packing": packing,
        "gradientCheckpointing": False,
    }
    spec["tuning"] = {"lora": {"rank": 8, "alpha": 16, "dropout": 0}, "hyperparameters": hyper}
    spec["distribution"] = {"gpusPerNode": 0, "perDeviceBatchSize": BATCH}
    del spec["evaluation"], spec["publish"]
    metadata, parsed = parse_job(document)
    local = LocalRun(job_file(metadata, parsed, {"models": str(base.parent), "rows": str(data)}), folder)
    from finetune_trainer.job.context import Context
    from finetune_trainer.stages.prepare import prepare

    plan = Plan.model_validate(prepare(Context.load(str(local.job_json), str(folder))).result["plan"])
    env = {**_environment(), Env.PLAN: json.dumps(plan.to_wire()), Env.ALLOW_CPU: "1"}
    return _run([sys.executable, "-m", "finetune_trainer", "train", "--job", local.job_json, "--workspace", folder], env)


def _trl(folder: Path, base: Path, data: Path) -> Run:
    length = 4 * LENGTH if data.name == "mixed" else LENGTH
    command = [
        sys.executable, "-m", "trl.scripts.sft", "--model_name_or_path", base, "--dataset_name", data, "--output_dir", folder,
        "--max_steps", STEPS, "--per_device_train_batch_size", BATCH, "--gradient_accumulation_steps", 1, "--max_length", length,
        "--learning_rate", 2e-4, "--lr_scheduler_type", "cosine", "--use_peft", "--lora_r", 8, "--lora_alpha", 16, "--lora_dropout", 0,
        "--lora_target_modules", "all-linear", "--use_cpu", "--bf16", "False", "--gradient_checkpointing", "False", "--logging_steps", 1,
        "--save_strategy", "no", "--report_to", "none", "--dtype", "float32",
        "--attn_implementation", "sdpa", "--eval_strategy", "no", "--dataset_train_split", "train",
    ]  # fmt: skip
    return _run(command, _environment())


def _plain(folder: Path, base: Path, data: Path) -> Run:
    command = [sys.executable, Path(__file__).parent / "plain_trainer.py", base, data / "train.jsonl", folder, STEPS, BATCH]
    return _run([*command, 4 * LENGTH if data.name == "mixed" else LENGTH], _environment())


if __name__ == "__main__":
    print(json.dumps(bench(), indent=1))
