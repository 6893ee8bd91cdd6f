"""The arms of an evaluation side by side: what each scored, and what a request of it costs."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from finetune_api.evaluation_status import EvaluationArm, EvaluationStatus

_LOWER = ("loss", "perplexity")


def request_costs(evaluation: EvaluationStatus) -> list[tuple[str, list[str]]]:
    """(name, a text for each arm) of what a request costs, where that was measured."""

    def text(value: float | None, unit: str = "") -> str:
        return "" if value is None else f"{value:.4g}{unit}"

    rows = [
        ("tokens sent", [text(arm.prompt_tokens) for arm in evaluation.arms]),
        ("tokens answered", [text(arm.answer_tokens) for arm in evaluation.arms]),
        ("latency", [text(arm.latency_seconds, " s") for arm in evaluation.arms]),
    ]
    return [(name, row) for name, row in rows if any(row)]


def title(arm: EvaluationArm) -> str:
    """Its name for people."""
    names = {"Base": "base", "Instructed": "instructed", "FewShot": f"{arm.shots} examples", "Champion": "champion", "Tuned": "tuned"}
    return names[arm.name]


def arms_table(evaluation: EvaluationStatus) -> Table:
    """A column for each arm; the tuned model's is green where none of the base's is as good."""
    table = Table()
    table.add_column("metric")
    for arm in evaluation.arms:
        table.add_column(title(arm), justify="right")
    for metric in evaluation.metrics:
        numbers = [arm.metrics.get(metric) for arm in evaluation.arms]
        cells: list[RenderableType] = ["" if number is None else f"{number:.4g}" for number in numbers]
        bases = [arm.metrics.get(metric) for arm in evaluation.arms if arm.name not in ("Champion", "Tuned")]
        known = [number for number in bases if number is not None]
        if (tuned := numbers[-1]) is not None and known:
            better = tuned < min(known) if metric.endswith(_LOWER) else tuned > max(known)
            cells[-1] = Text(f"{tuned:.4g}", style="bold green" if better else "red")
        table.add_row(metric, *cells)
    costs = request_costs(evaluation)
    if costs:
        table.add_section()
    for name, row in costs:
        table.add_row(name, *row)
    return table


def verdict(evaluation: EvaluationStatus) -> str:
    """How much better the tuned model is, over which arm, and what the gate said."""
    if evaluation.improvement is None or not evaluation.interval:
        return ""
    low, high = evaluation.interval
    over = f" over {evaluation.compared_with}" if evaluation.compared_with is not None else ""
    gate = "" if evaluation.gate == "None" else f", gate {evaluation.gate}"
    return f"improvement{over} {evaluation.improvement:.4g}, between {low:.4g} and {high:.4g}{gate}"
