"""A FineTuneJob from flags, from questions, or from one that has ended."""

from __future__ import annotations

import re
from typing import Any

import typer

from finetune_api.names import base_name
from finetune_api.validation import parse_spec

from .cluster import Object


def from_flags(
    *,
    name: str | None,
    model: str | None,
    data: str | None,
    eval_fraction: float,
    method: str,
    objective: str,
    epochs: float | None,
    learning_rate: float | None,
    gpus: int,
    nodes: int,
    gpu_memory: str | None,
    queue: str | None,
    publish: str | None,
    ask: bool,
) -> tuple[Object, Object]:
    """(metadata, spec), checked. Raises InvalidDocument, and typer.BadParameter for what is missing."""
    if ask:
        model = model or typer.prompt("Base model", default="hf://Qwen/Qwen3-0.6B")
        data = data or typer.prompt("Rows to train on (hf://, s3://, https://, pvc:// or configmap://)")
        method = typer.prompt("Method (lora, qlora, full)", default=method)
        gpus = typer.prompt("GPUs", default=gpus, type=int)
        gpu_memory = gpu_memory or (typer.prompt("Memory of one GPU", default="24Gi") if gpus else None)
        publish = (
            publish or typer.prompt("Publish the result to (empty: it stays in the workspace)", default="", show_default=False) or None
        )
    for flag, value in (("--model", model), ("--data", data)):
        if value is None:
            raise typer.BadParameter("is needed, or give --file, or --wizard to be asked", param_hint=flag)
    hyper = {k: v for k, v in (("epochs", epochs), ("learningRate", learning_rate)) if v is not None}
    held_out: Object = {"eval": {"splitFraction": eval_fraction}} if eval_fraction else {}
    spec: Object = {
        "model": {"uri": model},
        "dataset": {"train": {"uri": data}, **held_out},
        "tuning": {"method": method, "objective": objective, **({"hyperparameters": hyper} if hyper else {})},
        "distribution": {"gpusPerNode": gpus, **({"nodes": nodes} if nodes != 1 else {})},
        **({"resources": {"gpuMemory": gpu_memory}} if gpu_memory else {}),
        **({"scheduling": {"queue": queue}} if queue else {}),
    }
    if held_out:
        gate: Object = {"gate": {}} if publish else {}
        spec["evaluation"] = {**gate}
    if publish:
        model_name = publish.removeprefix("model://")
        spec["publish"] = [{"uri": publish} if model_name == publish else {"model": model_name}]
    parse_spec(spec)
    return ({"name": name} if name else {"generateName": f"{_named_after(str(model))}-"}), spec


def _named_after(uri: str) -> str:
    last = re.split(r"[/@]", uri.split("://", 1)[-1].rstrip("/").split("@")[0])[-1]
    plain = re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-") or "job"
    return base_name(plain[:40].strip("-"))


def again(job: Object, name: str | None) -> tuple[Object, Object]:
    """(metadata, spec) of another run of a job."""
    spec: dict[str, Any] = {**job["spec"]}
    policy = {k: v for k, v in (spec.get("runPolicy") or {}).items() if k not in ("suspend", "cancel")}
    spec["runPolicy"] = policy
    if not policy:
        del spec["runPolicy"]
    meta = job["metadata"]
    labels = {"labels": meta["labels"]} if meta.get("labels") else {}
    return {**({"name": name} if name else {"generateName": f"{meta['name'][:50].rstrip('-.')}-"}), **labels}, spec
