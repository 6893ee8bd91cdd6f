"""Jobs in the terminal: as a table, in detail, side by side."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from finetune_api.lenient import read_status
from finetune_api.scalars import human_duration, printable
from finetune_api.status import FineTuneJobStatus

from .arms import request_costs
from .cluster import Object
from .view import JobView, sparkline

_STYLES = {"Succeeded": "green", "Failed": "red", "Training": "cyan", "Queued": "yellow", "Suspended": "magenta"}


def age(stamp: str | None) -> str:
    """Time since then, short."""
    if not stamp:
        return ""
    return human_duration(max(0.0, (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds()))


def table(jobs: Iterable[Object], *, everywhere: bool) -> Table:
    """One line per job."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for column in (*(["NAMESPACE"] if everywhere else []), "NAME", "PHASE", "PROGRESS", "LOSS", "QUEUE", "GPUS", "RESTARTS", "AGE"):
        found.add_column(column)
    for job in jobs:
        meta, status = job["metadata"], read_status(job.get("status"))
        progress = status.progress
        queue = status.queue.name if status.queue is not None else status.admission.queue if status.admission is not None else ""
        found.add_row(
            *([meta["namespace"]] if everywhere else []),
            meta["name"],
            Text(status.phase, style=_STYLES.get(status.phase, "")),
            f"{progress.percent}%" if progress is not None else "",
            f"{progress.loss:.4g}" if progress is not None and progress.loss is not None else "",
            queue or "",
            str(status.total_gpus or ""),
            str(len(status.restarts) or ""),
            age(meta.get("creationTimestamp")),
        )
    return found


def losses(lines: Iterable[str]) -> list[float]:
    """The losses that transformers prints, one dictionary a step."""
    found = []
    for line in lines:
        start = re.search(r"\{'loss': .*?\}", line)
        if start is not None:
            try:
                found.append(float(ast.literal_eval(start.group(0))["loss"]))
            except (ValueError, SyntaxError, KeyError, TypeError):
                continue
    return found


def describe(job: Object, events: list[Any], curve: list[float]) -> RenderableType:
    """All that a person wants to know of one job."""
    meta, spec, status = job["metadata"], job.get("spec") or {}, read_status(job.get("status"))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")

    def fact(name: str, value: object) -> None:
        if value not in (None, "", 0):
            facts.add_row(name, Text(str(value)))

    tuning = spec.get("tuning") or {}
    fact("Job", f"{meta['namespace']}/{meta['name']}")
    fact("Phase", status.phase)
    fact("Age", age(meta.get("creationTimestamp")))
    fact("Model", (spec.get("model") or {}).get("uri"))
    fact("Data", ((spec.get("dataset") or {}).get("train") or {}).get("uri"))
    fact("Tuning", f"{tuning.get('objective', 'sft')}, {tuning.get('method', 'lora')}")
    if status.dataset is not None:
        fact("Rows", f"{status.dataset.train} to train on, {status.dataset.eval} held out, {status.dataset.tokens} tokens")
    if status.plan is not None:
        fact("Plan", status.plan.reason or status.plan.strategy)
        fact("Memory", f"{status.plan.estimated_memory_per_gpu} per GPU, estimated" if status.plan.estimated_memory_per_gpu else "")
    _where_it_stands(status, fact)
    parts: list[RenderableType] = [facts]
    if curve:
        low, high = min(curve), max(curve)
        parts += [
            Text(""),
            Text("Loss", style="bold"),
            Text(f"{high:10.4g} ┐"),
            Text(f"{sparkline(curve, 72)}", style="cyan"),
            Text(f"{low:10.4g} ┘"),
        ]
    conditions = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("CONDITION", "STATUS", "REASON", "AGE", "MESSAGE"):
        conditions.add_column(column, overflow="fold")
    for c in status.conditions:
        conditions.add_row(c.type, c.status, c.reason, age(c.last_transition_time), Text(printable(c.message)))
    parts += [Text(""), conditions]
    if status.restarts:
        parts += [Text(""), Text("Restarts", style="bold")]
        for r in status.restarts:
            where = f" on {r.node}" if r.node else ""
            parts.append(Text(printable(f"  attempt {r.attempt}: {r.cause} ({r.reason}), {r.pod}{where}: {r.message}")))
    if events:
        parts += [Text(""), Text("Events", style="bold"), *event_lines(events)]
    parts += [Text(""), JobView(Console(), meta["name"]).summary(status)]
    return Group(*parts)


def _where_it_stands(status: FineTuneJobStatus, fact: Any) -> None:
    if status.queue is not None:
        fact("Waits", printable(status.queue.message))
    if status.admission is not None:
        flavor = f", flavor {status.admission.flavor}" if status.admission.flavor else ""
        fact("Admitted to", f"{status.admission.queue or 'the cluster'}{flavor}, {status.admission.nodes} pod(s)")
        fact("Estimate", status.admission.estimated_duration)
    if status.progress is not None:
        p = status.progress
        fact("Progress", f"step {p.step} of {p.total_steps} ({p.percent}%), loss {p.loss}, ETA {p.eta or '?'}")
    if status.checkpoint is not None:
        fact("Checkpoint", f"step {status.checkpoint.step}, {age(status.checkpoint.saved_at)} ago")
    usage = status.usage
    cost = f", cost {usage.cost:g}" if usage.cost is not None else ""
    if usage.gpu_seconds or usage.queued_seconds:
        fact(
            "Usage",
            f"{usage.gpu_seconds / 3600:.2f} GPU-hours, queued {human_duration(usage.queued_seconds)}, lost {usage.lost_seconds} s{cost}",
        )


def event_lines(events: list[Any]) -> list[Text]:
    """One line per event."""
    found = []
    for event in events:
        when = event.last_timestamp or event.metadata.creation_timestamp
        style = "yellow" if event.type == "Warning" else ""
        found.append(Text(printable(f"  {age(when.isoformat()):>8} ago  {event.reason}: {event.message}"), style=style))
    return found


def compare(jobs: list[Object]) -> Table:
    """Settings and results side by side; what differs is what stands out."""
    found = Table(header_style="bold")
    found.add_column("")
    rows: dict[str, list[str]] = {}
    for index, job in enumerate(jobs):
        found.add_column(job["metadata"]["name"], overflow="fold")
        for name, value in _facts(job).items():
            rows.setdefault(name, [""] * len(jobs))[index] = value
    for name, values in rows.items():
        found.add_row(name, *values, style="" if len(set(values)) == 1 else "bold")
    return found


def _facts(job: Object) -> dict[str, str]:
    spec, status = job.get("spec") or {}, read_status(job.get("status"))
    tuning = spec.get("tuning") or {}
    hyper = {f"hyperparameters.{k}": str(v) for k, v in (tuning.get("hyperparameters") or {}).items() if not isinstance(v, dict)}
    found = {"model": str((spec.get("model") or {}).get("uri", "")), "objective": str(tuning.get("objective", "sft"))}
    found |= {"method": str(tuning.get("method", "lora")), **{f"lora.{k}": str(v) for k, v in (tuning.get("lora") or {}).items()}, **hyper}
    found["phase"] = status.phase
    if status.progress is not None:
        found["steps"], found["loss"] = str(status.progress.step), f"{status.progress.loss}"
    if status.evaluation is not None:
        for metric in status.evaluation.metrics:
            found[metric] = status.evaluation.told(metric)
        for name, row in request_costs(status.evaluation):
            found[name] = ", ".join(f"{arm.name} {text}" for arm, text in zip(status.evaluation.arms, row, strict=True) if text)
        found["gate"] = status.evaluation.gate
    found["GPU-hours"] = f"{status.usage.gpu_seconds / 3600:.2f}"
    if status.usage.cost is not None:
        found["cost"] = f"{status.usage.cost:g}"
    return found
