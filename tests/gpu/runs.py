"""One run: the stages as `finetune run --local` runs them, and `trl sft` on the same settings beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.contract import Layout, read_stage_result
from finetune_api.scalars import quantity
from finetune_api.status import Plan
from finetune_api.validation import parse_spec
from finetune_cli.local import LocalRun, job_file

from . import figures
from .machine import Machine

LORA = {"rank": 16, "alpha": 32, "dropout": 0}
METHODS = ("lora", "qlora", "full")
DENSE = "lora, sdpa"
"""The lora run again with a dense mask: what packing would cost, and whether the rows of a pack see each other."""


@dataclass(frozen=True)
class Scale:
    """How large the runs are."""

    length: int
    steps: int
    rows_per_gpu: int
    rate: float
    """Learning rate of adapters; random weights learn in a few steps only when it is high. A third of it for full."""

    def rate_of(self, name: str) -> float:
        """The learning rate of a run."""
        return self.rate / 3 if name == "full" else self.rate


FULL_SCALE, SMALL_SCALE = Scale(2048, 20, 8, 1e-3), Scale(64, 6, 2, 3e-2)


class Runs:
    """Runs jobs over one model and one set of rows."""

    def __init__(self, folder: Path, model: Path, rows: Path, machine: Machine, scale: Scale, *, cuda: bool) -> None:
        self.folder, self.model, self.rows, self.machine, self.scale = folder, model, rows, machine, scale
        self.gpus = len(machine.gpus) if cuda else 0
        self.half = self.gpus > 0 and machine.gpus[0]["capability"] >= [8, 0]
        self.tflops = figures.peak_tflops(machine.gpus[0]["name"]) or machine.matmul_tflops if self.gpus else None

    def run(self, name: str, *, baseline: bool = True) -> dict[str, Any]:
        """Everything that was seen of one run."""
        layout, local = self._stages(name)
        last = local.status.conditions[-1] if local.status.conditions else None
        found: dict[str, Any] = {"phase": local.status.phase, "message": last.message if last else "", "dense": name == DENSE}
        if local.status.phase != "Succeeded" or local.status.plan is None:
            return found
        plan = local.status.plan
        words = read_stage_result((local.folder / "train-0.result").read_text())
        devices = json.loads(Path(layout.devices).read_text())
        lines = [json.loads(line) for line in Path(layout.history).read_text().splitlines()]
        each = self._flops(layout)
        speed = figures.tokens_per_second(lines[1:])  # the first is of the beginning
        found |= {
            "plan": plan.to_wire(),
            "result": words.result if words else {},
            "kernels": devices["kernels"],
            "ranks": devices["ranks"],
            "estimated": int(quantity(plan.estimated_memory_per_gpu)),
            "measured": max((rank["reserved"] + rank["context"] for rank in devices["ranks"]), default=None),
            "losses": [line["loss"] for line in lines if line.get("loss") is not None],
            "tokens_per_second": speed,
            "flops_per_token": each,
            "mfu": figures.utilisation(speed, each, self.gpus, self.tflops),
        }
        if baseline:
            found["trl"] = self._trl(name, plan, each)
        return found

    def _spec(self, name: str) -> dict[str, Any]:
        method = "lora" if name == DENSE else name
        hyper: dict[str, Any] = {
            "maxSteps": self.scale.steps,
            "globalBatchSize": self.scale.rows_per_gpu * max(1, self.gpus),
            "maxLength": self.scale.length,
            "learningRate": self.scale.rate_of(name),
            "packing": True,
            "attention": "sdpa" if name == DENSE else "auto",
        }
        if self.half:
            hyper["precision"] = "bf16"
        spec: dict[str, Any] = {
            "model": {"uri": f"pvc://models/{self.model.name}"},
            "dataset": {
                "train": {"uri": "pvc://rows/train.jsonl"},
                "eval": {"splitFraction": 0.1},
                "checks": {"minExamples": 1, "nearDuplicates": "ignore", "nearLeakage": "ignore"},
            },
            "tuning": {"method": method, "hyperparameters": hyper, **({"lora": LORA} if method != "full" else {})},
            "distribution": {"gpusPerNode": self.gpus, "strategy": "ddp"},
        }
        if self.gpus:  # in whole GiB; the plan then finds what fits
            spec["resources"] = {"gpuMemory": f"{min(gpu['memory'] for gpu in self.machine.gpus) // 2**30}Gi"}
        if name != DENSE:
            spec["evaluation"] = {"metrics": ["loss", "exact-match"], "maxNewTokens": 8}
            spec["publish"] = [{"uri": f"pvc://published/{name}"}]
        return spec

    def _stages(self, name: str) -> tuple[Layout, LocalRun]:
        volumes = {"models": str(self.model.parent), "rows": str(self.rows), "published": str(self.folder / "published")}
        metadata = {"name": name.replace(", ", "-"), "namespace": "gpu"}
        local = LocalRun(job_file(metadata, parse_spec(self._spec(name)), volumes), self.folder / "workspace")
        local.run()
        return local.layout, local

    def _flops(self, layout: Layout) -> float:
        """Operations per token, from the model's own sizes, the parameters that learn and the rows' mean length."""
        import pyarrow.parquet as parquet

        config = json.loads((self.model / "config.json").read_text())
        lengths = [len(row) for row in parquet.read_table(layout.train_rows, columns=["input_ids"]).column(0).to_pylist()]
        # a token sees half of its own row on average, and long rows hold most tokens
        mean = sum(n * n for n in lengths) / max(1, sum(lengths))
        sizes = _sizes(self.model)
        adapter = Path(layout.output, "adapter_model.safetensors")
        trainable = _parameters(adapter) if adapter.exists() else sizes
        lookup = 0 if config.get("tie_word_embeddings") else config["vocab_size"] * config["hidden_size"]
        return figures.flops_per_token({**config, "parameters": sizes, "lookup": lookup}, trainable, mean)

    def _trl(self, name: str, plan: Plan, each: float) -> dict[str, Any]:
        """`trl sft`, told everything that the plan decided."""
        out = self.folder / f"trl-{name}.json"
        words = trl_words(name, self.model, self.rows, self.folder / f"trl-{name}", plan, self.scale, self)
        command = [sys.executable]
        if self.gpus > 1:
            command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(self.gpus)]
            command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        env = {
            **os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.folder / "huggingface"), **({} if self.gpus else {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}),
        }  # fmt: skip
        done = subprocess.run([*command, "-m", "tests.gpu.trl_sft", str(out), *words], env=env, capture_output=True, text=True, check=False)
        (self.folder / f"trl-{name}.log").write_text(done.stdout + done.stderr)
        if done.returncode != 0 or not out.exists():
            return {"error": (done.stdout + done.stderr).strip()[-600:]}
        found: dict[str, Any] = json.loads(out.read_text())
        steps = found.pop("steps")
        speed = figures.tokens_per_second(steps)
        mfu = figures.utilisation(speed, each, self.gpus, self.tflops)
        return {**found, "losses": [line["loss"] for line in steps], "tokens_per_second": speed, "mfu": mfu}


def trl_words(name: str, model: Path, rows: Path, output: Path, plan: Plan, scale: Scale, runs: Runs) -> list[str]:
    """The command line of `trl sft` for the same run. Its attention is the best that it has without code of one's own."""
    flash = runs.half and "flash-attn" in runs.machine.versions
    liger = runs.gpus > 0 and "liger-kernel" in runs.machine.versions
    half = "bfloat16" if runs.half else "float16" if runs.gpus else "float32"
    settings: dict[str, Any] = {
        "model_name_or_path": model, "dataset_name": rows, "dataset_train_split": "train", "output_dir": output, "max_steps": scale.steps,
        "per_device_train_batch_size": plan.per_device_batch_size, "gradient_accumulation_steps": plan.gradient_accumulation,
        "gradient_checkpointing": plan.gradient_checkpointing, "max_length": scale.length, "packing": True, "learning_rate": scale.rate_of(name),
        "lr_scheduler_type": "cosine", "bf16": half == "bfloat16", "fp16": half == "float16", "use_liger_kernel": liger,
        "dtype": "float32" if name == "full" else half, "attn_implementation": "flash_attention_2" if flash else "sdpa",
        "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "report_to": "none", "seed": 42, "disable_tqdm": True,
    }  # fmt: skip
    if runs.gpus:
        settings |= {"optim": "adamw_torch_fused", **({"tf32": True} if runs.half else {})}
    else:
        settings["use_cpu"] = True
    if name != "full":
        settings |= {"use_peft": True, "lora_r": LORA["rank"], "lora_alpha": LORA["alpha"], "lora_dropout": LORA["dropout"]}
        settings["lora_target_modules"] = "all-linear"
    if name == "qlora":
        settings |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def _parameters(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(str(file), framework="numpy") as tensors:
        return sum(_product(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def _sizes(model: Path) -> int:
    return sum(_parameters(file) for file in model.glob("*.safetensors"))


def _product(shape: list[int]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found
