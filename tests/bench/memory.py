"""The peak memory of one training process, measured, beside the plan's estimate.

Without a GPU: tensors of the CPU allocator, as the profiler sees them. With one: torch.cuda.max_memory_allocated.
`python -m tests.bench.memory` prints the table of docs/memory.md.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_api.status import Plan
from finetune_trainer.training.memory import Setting, estimate
from finetune_trainer.training.shape import describe_model
from tests.trainer.conftest import Bench


@dataclass(frozen=True)
class Case:
    """One measurement."""

    method: str = "lora"
    objective: str = "sft"
    hidden: int = 256
    layers: int = 4
    vocabulary: int = 4000
    length: int = 256
    batch: int = 4
    checkpointing: bool = False
    optimizer: str = "adamw"


CASES = {
    "full": Case("full"),
    "full, checkpointing": Case("full", checkpointing=True),
    "full, wide": Case("full", hidden=512, layers=6, batch=2),
    "full, adafactor": Case("full", hidden=512, layers=6, batch=2, optimizer="adafactor"),
    "partial": Case("partial", layers=8),
    "lora": Case(),
    "lora, long": Case(length=768, batch=2),
    "lora, checkpointing": Case(checkpointing=True, layers=8),
    "lora, large vocabulary": Case(vocabulary=32_000, length=128),
    "rslora": Case("rslora"),
    "dora": Case("dora"),
    "ia3": Case("ia3"),
    "prompt": Case("prompt"),
    "pretrain": Case("full", objective="pretrain"),
    "dpo": Case(objective="dpo", batch=2),
    "reward": Case(objective="reward", batch=2),
}


def _model(case: Case, tiny: Path, target: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=case.vocabulary, hidden_size=case.hidden, intermediate_size=int(2.7 * case.hidden), num_hidden_layers=case.layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(target)
    for file in tiny.iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copyfile(file, target / file.name)


@contextlib.contextmanager
def _measured(found: list[int]) -> Iterator[None]:
    """Measure transformers' Trainer.train: its tensors, and those of the model it is given."""
    from transformers import Trainer

    cuda = torch.cuda.is_available()

    original = Trainer.train

    def train(self: Any, *arguments: Any, **more: Any) -> Any:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            result = original(self, *arguments, **more)
            found.append(torch.cuda.max_memory_allocated())
            return result
        static = sum(p.numel() * p.element_size() for p in self.model.parameters())
        static += sum(p.numel() * p.element_size() for p in getattr(getattr(self, "ref_model", None), "parameters", lambda: [])())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = original(self, *arguments, **more)
        now = top = 0
        events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            top = max(top, now)
        found.append(static + top)
        return result

    Trainer.train = train
    try:
        yield
    finally:
        Trainer.train = original


def measure(case: Case, tiny: Path, folder: Path) -> tuple[int, int]:
    """(measured peak, estimate) in bytes, of two steps with two accumulations each."""
    from finetune_trainer.stages.prepare import prepare
    from finetune_trainer.stages.worker import fit

    made = folder / "models" / "made"
    _model(case, tiny, made)
    bench = Bench(folder, made)
    text = " ".join(["red green blue cat dog bird"] * case.length)
    rows = {
        "sft": [{"prompt": f"{i} ", "completion": text} for i in range(40)],
        "pretrain": [{"text": f"{i} {text}"} for i in range(40)],
        "dpo": [{"prompt": f"{i} ", "chosen": text, "rejected": text[5:]} for i in range(40)],
        "reward": [{"prompt": f"{i} ", "chosen": text, "rejected": text[5:]} for i in range(40)],
    }[case.objective]
    hyper = {"maxSteps": 2, "globalBatchSize": 2 * case.batch, "maxLength": case.length, "learningRate": 1e-5, "optimizer": case.optimizer}
    tuning: dict[str, Any] = {
        "method": case.method,
        "objective": case.objective,
        "hyperparameters": {**hyper, "gradientCheckpointing": case.checkpointing},
    }
    checks = {"minExamples": 1, "nearDuplicates": "ignore", "nearLeakage": "ignore"}
    dataset = {"train": {"uri": "pvc://rows/train.jsonl"}, "checks": checks}
    context = bench.context(
        rows, dataset=dataset, tuning=tuning, distribution={"gpusPerNode": int(torch.cuda.is_available()), "perDeviceBatchSize": case.batch}
    )
    plan = Plan.model_validate(prepare(context).result["plan"])
    found: list[int] = []
    with _measured(found):
        fit(context, plan)
    shape = describe_model(context, str(made)).shape
    setting = Setting("ddp", 1, plan.per_device_batch_size, plan.gradient_checkpointing)
    if not torch.cuda.is_available():
        return found[0], estimate(context.spec, shape, setting, element=4).total
    guess = estimate(context.spec, shape, setting, element=2)
    return found[0], guess.total - guess.overhead


def main() -> None:
    """Print the table."""
    from tests.cluster.quickstart import model

    tiny = model("tiny.py", "tiny")
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            peak, guess = measure(case, tiny, Path(scratch))
        print(
            json.dumps(
                {"case": name, "measuredMiB": round(peak / 2**20), "estimateMiB": round(guess / 2**20), "ratio": round(guess / peak, 2)}
            )
        )


if __name__ == "__main__":
    main()
