"""prepare beside loading everything in memory: rows per second and peak memory, at two sizes, to see what grows.

The baseline reads the file into a list, renders and tokenises it in one process, and drops exact duplicates: less work
than prepare does (no near duplicates, no checks, no report).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.cluster.quickstart import model

SIZES = (20_000, 100_000)
_PEAK = (
    "import sys,threading,time,psutil,subprocess\n"
    "p=psutil.Popen(sys.argv[1:]);top=0\n"
    "while p.poll() is None:\n"
    "  try: top=max(top,sum(q.memory_full_info().pss for q in [p,*p.children(recursive=True)]))\n"
    "  except psutil.Error: pass\n"
    "  time.sleep(0.2)\n"
    "print('PEAK',top);sys.exit(p.returncode)"
)
_BASELINE = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rows = [json.loads(line)["messages"] for line in open(sys.argv[2])]
seen, kept = set(), []
for row in rows:
    key = json.dumps(row, sort_keys=True)
    if key not in seen:
        seen.add(key)
        kept.append(row)
tokens = []
for row in kept:
    text = tokenizer.apply_chat_template(row, tokenize=False)
    prompt = tokenizer.apply_chat_template(row[:-1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    head = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    tokens.append({"input_ids": ids, "labels": [-100] * head + ids[head:]})
from datasets import Dataset
Dataset.from_list(tokens).to_parquet(sys.argv[3])
"""


def write_rows(path: Path, count: int) -> None:
    """Conversations of some 60 to 90 tokens, one in a hundred a duplicate."""
    with path.open("w") as sink:
        for index in range(count):
            number = index if index % 100 else index // 2
            question = f"Order {number * 7919 % 1000003} of customer {number * 104729 % 999983}: {' '.join(f'item{(number * k) % 9973}' for k in range(3, 9))}. Where is it?"
            answer = f"It left warehouse {number % 37} on day {number % 365} and arrives in {number % 9 + 1} days."
            sink.write(json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}) + "\n")


def _run(command: list[str]) -> tuple[float, float]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TOKENIZERS_PARALLELISM": "false"}
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", _PEAK, *command], env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return time.monotonic() - started, float(re.findall(r"PEAK (\d+)", done.stdout)[-1]) / 2**20


def bench(sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """Seconds, rows per second and peak MiB (PSS of all processes) of both arms."""
    base = model("tiny.py", "tiny")
    found: dict[str, Any] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "rows").mkdir()
            write_rows(folder / "rows" / "train.jsonl", size)
            spec = {
                "model": {"uri": f"pvc://models/{base.name}"},
                "dataset": {"train": {"uri": "pvc://rows/train.jsonl"}},
                "distribution": {"gpusPerNode": 0},
                "tuning": {"hyperparameters": {"maxLength": 256}},
            }
            job = {
                "name": "j",
                "namespace": "n",
                "uid": "12345678",
                "spec": spec,
                "sources": {"pvc://models": str(base.parent), "pvc://rows": str(folder / "rows")},
            }
            (folder / "job.json").write_text(json.dumps(job))
            seconds, peak = _run(
                [sys.executable, "-m", "finetune_trainer", "prepare", "--job", f"{folder}/job.json", "--workspace", f"{folder}/w"]
            )
            arms = {"prepare": {"seconds": round(seconds, 1), "rows_per_second": round(size / seconds), "peak_mib": round(peak)}}
            if size <= max(SIZES):
                seconds, peak = _run(
                    [sys.executable, "-c", _BASELINE, str(base), str(folder / "rows" / "train.jsonl"), str(folder / "out.parquet")]
                )
                arms["in_memory"] = {"seconds": round(seconds, 1), "rows_per_second": round(size / seconds), "peak_mib": round(peak)}
            found[str(size)] = arms
            print(json.dumps({str(size): arms}), flush=True)
    return found


if __name__ == "__main__":
    print(json.dumps(bench(tuple(int(word) for word in sys.argv[1:]) or SIZES), indent=1))
