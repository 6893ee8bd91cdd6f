"""Bases of other families than the tiny Llama: real classes of transformers, a few thousand weights, the tiny model's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from finetune_trainer.process.errors import UserError
from finetune_trainer.stages.prepare import prepare
from tests.trainer.conftest import ROWS, Bench

SIZES = {
    "vocab_size": 327, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
MIXTURE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def make(family: str, folder: Path, tokenizer: Path, *, kind: str = "ForCausalLM", **settings: Any) -> Path:
    """Save a model of a family, by transformers' names for its classes. `kind`: what follows the family's name in its own, or all of it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    name = f"{family}LMHeadModel" if family in ("CTRL", "GPT2", "OpenAIGPT") and kind == "ForCausalLM" else f"{family}{kind}"
    getattr(transformers, name if kind.startswith(("For", "LM")) else kind)(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / file).exists():
            shutil.copyfile(tokenizer / file, folder / file)
    return folder


def copied(model: Path, folder: Path, **config: Any) -> Path:
    """A copy of a model, with settings of its config.json replaced."""
    shutil.copytree(model, folder)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, **config}))
    return folder


LORA = {"rank": 4, "alpha": 8, "dropout": 0}
HYPER = {"maxSteps": 2, "learningRate": 1e-3, "globalBatchSize": 4, "maxLength": 128}
Sizes = dict[str, Any]


def tuning(**more: Any) -> dict[str, Any]:
    return {"lora": LORA, "hyperparameters": HYPER, **more}


def refused(bench: Bench, folder: Path, rows: list[dict[str, Any]] | None = None, **spec: Any) -> UserError:
    """What prepare says to a base in the bench's own volume."""
    model = {"uri": f"pvc://rows/{folder.name}"}
    with pytest.raises(UserError) as found:
        prepare(bench.context(rows or ROWS["messages"], **{"model": model, "tuning": tuning(), **spec}))
    return found.value
