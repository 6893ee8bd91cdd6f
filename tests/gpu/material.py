"""What the runs need, made on the spot: a model of a real configuration with random weights, a tokenizer, and rows."""

from __future__ import annotations

import json
import random
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
REAL = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "max_position_embeddings": 32_768, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
"""Qwen2.5-0.5B: 494 million parameters."""
SMALL = {**REAL, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_MODEL = """
import json, runpy, sys, torch
from transformers import Qwen2Config, Qwen2ForCausalLM
script, tiny, target, sizes = sys.argv[1:]
sys.argv = [script, tiny]
runpy.run_path(script, run_name="__main__")
torch.manual_seed(0)
config = Qwen2Config(**json.loads(sizes), pad_token_id=0, bos_token_id=1, eos_token_id=1)
Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
"""
_TINY = REPO / "examples" / "models" / "tiny.py"
"""Whose words and tokenizer are used."""


def make_model(folder: Path, *, small: bool) -> Path:
    """Write the model; weights are random, the tokenizer is that of examples/models/tiny.py."""
    tiny, target = folder / "tiny", folder / "models" / "made"
    words = [sys.executable, "-c", _MODEL, str(_TINY), str(tiny), str(target), json.dumps(SMALL if small else REAL)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the model was not made: {(done.stdout + done.stderr)[-2000:]}")
    for file in tiny.iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copyfile(file, target / file.name)
    return target


def make_rows(folder: Path, *, small: bool) -> Path:
    """Write rows of very different lengths, as real ones are: packing and its attention have something to do."""
    folder.mkdir(parents=True)
    chance, rows, words = random.Random(0), [], runpy.run_path(str(_TINY))["WORDS"]
    for index in range(48 if small else 800):
        length = min(40 if small else 1500, int(chance.lognormvariate(2.5 if small else 5.0, 0.9)) + 4)
        answer = " ".join(chance.choice(words) for _ in range(length))
        rows.append({"prompt": f"what is number {index}? ", "completion": answer})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
