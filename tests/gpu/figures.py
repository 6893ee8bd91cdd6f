"""Arithmetic of the check: tokens per second, model FLOPS utilisation, memory, and what is said of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PEAK_TFLOPS = {
    "B200": 2250, "GB200": 2500, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "H20": 148,
    "A100": 312, "A800": 312, "A30": 165, "A10G": 70, "A10": 125, "A40": 150, "L40S": 362, "L40": 181, "L4": 121,
    "RTX A6000": 155, "RTX 6000 Ada": 364, "RTX 5090": 209, "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip
"""Dense bf16 (fp16 where there is no bf16) of NVIDIA's data sheets, the longest name that fits first."""
WARM_UP = 3
"""First steps that do not count: kernels are compiled, and the allocator finds its sizes."""
LEAST_ESTIMATE, MOST_ESTIMATE = 0.9, 2.0
"""Bounds of the estimated memory over the measured: below, jobs that are told to fit do not."""
LEAST_SPEED = 0.9
"""Tokens per second beside `trl sft`."""
FEW = 3
"""Steps at both ends that the loss is looked at over: one step's rows are not another's."""
LOSS_TOLERANCE = 0.02
"""Relative difference of a step's loss with another attention, in bf16."""


@dataclass(frozen=True)
class Check:
    """One statement; `ok` is None where it could not be checked."""

    run: str
    what: str
    ok: bool | None
    saw: str

    def to_wire(self) -> dict[str, Any]:
        """For the JSON document."""
        return asdict(self)


def peak_tflops(name: str) -> float | None:
    """The data sheet's number for a GPU by its name, None for one that is not known."""
    fitting = [model for model in PEAK_TFLOPS if set(model.split()) <= set(name.replace("-", " ").split())]
    return float(PEAK_TFLOPS[max(fitting, key=len)]) if fitting else None


def tokens_per_second(steps: Sequence[dict[str, Any]], warm_up: int = WARM_UP) -> float | None:
    """After the warm-up, from lines with `seconds` and `tokens` that count up."""
    if len(steps) < warm_up + 2:
        return None
    first, last = steps[warm_up - 1 if warm_up else 0], steps[-1]
    seconds = last["seconds"] - first["seconds"]
    return (last["tokens"] - first["tokens"]) / seconds if seconds > 0 else None


def flops_per_token(model: dict[str, Any], trainable: int, row_length: float) -> float:
    """Operations that the model asks for, recomputation left out: 4 per parameter for the forward pass and the gradients of
    activations, 2 per trained one for its gradient (PaLM, https://arxiv.org/abs/2204.02311, appendix B, says 6 where all are
    trained), and causal attention within a row. An input embedding of its own multiplies nothing.
    """
    width = model["num_attention_heads"] * (model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"])
    attention = 6 * model["num_hidden_layers"] * width * row_length
    return 4 * (model["parameters"] - model["lookup"]) + 2 * trainable + attention


def utilisation(speed: float | None, each: float, gpus: int, tflops: float | None) -> float | None:
    """Model FLOPS utilisation of all GPUs together."""
    return None if speed is None or not gpus or not tflops else speed * each / gpus / tflops / 1e12


def check_run(name: str, run: dict[str, Any], *, gpus: int, half: bool, liger: bool) -> list[Check]:
    """What is said of one run. `half`: whether the GPUs can do varlen and flash attention; `liger`: whether it is installed."""
    found = [
        Check(name, "all stages succeed", run["phase"] == "Succeeded", run["message"]),
    ]
    losses = run.get("losses") or []
    if run["phase"] != "Succeeded" or not losses:
        return found
    few = min(FEW, max(1, len(losses) // 2))
    first, last = _mean(losses[:few]), _mean(losses[-few:])
    found.append(Check(name, "the loss falls", last < first, f"{first:.3f} -> {last:.3f}"))
    ranks = run["ranks"]
    if not gpus:
        unseen = ("each rank has its own GPU", "padding-free attention and Liger", "estimated against measured memory")
        return [*found, *(Check(name, what, None, "no GPU") for what in unseen), _speed(name, run, None)]
    own = {(rank["host"], rank["uuid"]) for rank in ranks}
    found.append(Check(name, "each rank has its own GPU", len(own) == len(ranks) == gpus, f"{len(own)} GPUs for {gpus} ranks"))
    padding_free = any(word in run["kernels"] for word in ("varlen", "flash_attention"))
    kernels = padding_free and ("Liger" in run["kernels"] or not liger) if half else None
    if not run.get("dense"):
        found.append(Check(name, "padding-free attention and Liger", kernels, run["kernels"]))
    ratio, measured = run["estimated"] / run["measured"], run["measured"]
    words = f"{run['estimated'] / 2**30:.1f} GiB estimated, {measured / 2**30:.1f} GiB measured ({ratio:.2f})"
    if not run.get("dense"):  # a mask over the pack is not in the estimate: auto never asks for one here
        found.append(Check(name, "estimated against measured memory", LEAST_ESTIMATE <= ratio <= MOST_ESTIMATE, words))
    return [*found, _speed(name, run, LEAST_SPEED)] if not run.get("dense") else found


def _speed(name: str, run: dict[str, Any], least: float | None) -> Check:
    other, mine = run.get("trl"), run.get("tokens_per_second")
    if not other or not other.get("tokens_per_second") or not mine:
        return Check(name, "tokens per second beside trl sft", None, (other or {}).get("error") or "not run")
    ratio = mine / other["tokens_per_second"]
    return Check(
        name, "tokens per second beside trl sft", None if least is None else ratio >= least,
        f"{mine:,.0f} beside {other['tokens_per_second']:,.0f} ({ratio:.2f}), trl's attention {other.get('attention')}",
    )  # fmt: skip


def check_same_losses(name: str, found: Sequence[float], dense: Sequence[float]) -> Check:
    """Whether packed rows do not see each other: the losses are those of a dense mask, step by step."""
    if not found or len(found) != len(dense):
        return Check(name, "the losses are those of a dense mask", False, f"{len(found)} and {len(dense)} steps")
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, dense, strict=True))
    return Check(name, "the losses are those of a dense mask", worst <= LOSS_TOLERANCE, f"largest difference {worst:.2%}")


def table(runs: dict[str, dict[str, Any]]) -> str:
    """The measurements, a run a line."""
    head = ("run", "kernels", "tokens/s", "MFU", "trl sft tokens/s", "MFU", "GiB measured", "estimated", "trl sft", "loss")
    lines = [head]
    for name, run in runs.items():
        other, losses = run.get("trl") or {}, run.get("losses") or []
        lines.append(
            (
                name,
                run.get("kernels") or run["phase"],
                _number(run.get("tokens_per_second"), "{:,.0f}"),
                _number(run.get("mfu"), "{:.1%}"),
                _number(other.get("tokens_per_second"), "{:,.0f}"),
                _number(other.get("mfu"), "{:.1%}"),
                _number(run.get("measured"), "{:.1f}", 2**30),
                _number(run.get("estimated"), "{:.1f}", 2**30),
                _number(other.get("measured"), "{:.1f}", 2**30),
                f"{losses[0]:.2f} -> {losses[-1]:.2f}" if losses else "-",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _number(value: float | None, shape: str, unit: float = 1.0) -> str:
    return "-" if value is None else shape.format(value / unit)
