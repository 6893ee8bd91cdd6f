"""How a job looks in the terminal: phases, progress bar, loss, and the scores at the end. The same for every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_api.evaluation_status import PROMPTING_MAY_DO
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import SAID_BY_OTHERS, Condition, FineTuneJobStatus

from .arms import arms_table, verdict

STAGES = (("Preparing", "prepare"), ("Starting", "start"), ("Training", "train"), ("Evaluating", "evaluate"), ("Publishing", "publish"))
_ORDER = ["Pending", "Preparing", "Queued", "Starting", "Training", "Evaluating", "Publishing", "Succeeded"]
#: reasons of a False condition that are waited for
_PASSING = frozenset({"Starting", "Completed", "Resumed", "Unschedulable", "ContainerNotStarted", "ImagePullFailed", "WaitingForSource"})
_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 40) -> str:
    """A curve of block characters, the newest value last."""
    if not values:
        return ""
    if len(values) > width:
        size = len(values) / width
        values = [
            sum(part) / len(part) for i in range(width) if (part := values[int(i * size) : max(int((i + 1) * size), int(i * size) + 1)])
        ]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_BARS[min(7, int((value - low) / span * 8))] for value in values)


class JobView:
    """Follows one job's status and draws it; on a pipe it prints a line per change instead."""

    def __init__(self, console: Console, name: str, spec: FineTuneJobSpec | None = None) -> None:
        self.console, self.name, self.spec = console, name, spec
        self.losses: list[float] = []
        self._seen: dict[str, tuple[str, str]] = {}
        self._told: list[str] = []
        self._line: tuple[str, int] | None = None
        self._last_step = -1

    def update(self, status: FineTuneJobStatus) -> list[str]:
        """Take a new status; returns the lines of what is new in it."""
        progress = status.progress
        if progress is not None and progress.loss is not None and progress.step != self._last_step:
            if progress.step < self._last_step:
                self.losses.clear()
            self._last_step = progress.step
            self.losses.append(progress.loss)
        news = []
        for condition in status.conditions:
            if condition.type in SAID_BY_OTHERS:
                continue
            state = (condition.status, condition.reason)
            if self._seen.get(condition.type) != state:
                self._seen[condition.type] = state
                mark = {"True": "✓", "False": "✗", "Unknown": "…"}[condition.status]
                if condition.type == "Failed":
                    mark = "✗"
                elif condition.status == "False" and (condition.reason in _PASSING or condition.type == "Admitted"):
                    mark = "…"
                news.append(f"{mark} {condition.type}: {self._once(condition)}")
        return news

    def _once(self, condition: Condition) -> str:
        """A condition's message, or of one that says again what another said its reason and the rest of it."""
        told = next((text for text in self._told if condition.message.startswith(text)), None)
        if condition.message and told is None:
            self._told.append(condition.message)
        rest = (condition.message if told is None else condition.message[len(told) :]).strip()
        return (rest or condition.reason) if told is None else f"{condition.reason} {rest}".strip()

    def render(self, status: FineTuneJobStatus) -> RenderableType:
        """The live part: phases, bar, loss."""
        line = Text(f"{self.name}  ", style="bold")
        reached = _ORDER.index(status.phase) if status.phase in _ORDER else -1
        for phase, label in STAGES:
            position = _ORDER.index(phase)
            if status.phase == phase or (phase == "Starting" and status.phase == "Queued"):
                line.append(f"● {label}  ", style="bold yellow")
            elif 0 <= position < reached:
                line.append(f"✓ {label}  ", style="green")
            else:
                line.append(f"○ {label}  ", style="dim")
        if status.phase in ("Failed", "Suspended"):
            line.append(status.phase, style="bold red")
        parts: list[RenderableType] = [line]
        if status.phase == "Queued" and status.queue is not None:
            parts.append(Text(status.queue.message, style="yellow"))
        progress = status.progress
        if progress is not None and progress.total_steps:
            row = Table.grid(padding=(0, 1))
            row.add_row(
                ProgressBar(total=progress.total_steps, completed=progress.step, width=40),
                f"{progress.percent:3d}%",
                f"step {progress.step}/{progress.total_steps}",
                f"{progress.tokens_per_second:.0f} tokens/s" if progress.tokens_per_second else "",
                f"ETA {progress.eta}" if progress.eta and status.phase == "Training" else "",
                f"restarts {status.attempt}" if status.attempt else "",
            )
            parts.append(row)
        if self.losses:
            parts.append(Text(f"loss {self.losses[-1]:8.4f}  {sparkline(self.losses)}", style="cyan"))
        return Group(*parts)

    def plain(self, status: FineTuneJobStatus) -> str | None:
        """A line for a pipe, when the phase changed or another tenth is done."""
        progress = status.progress
        tenth = progress.percent // 10 if progress is not None else 0
        if self._line == (status.phase, tenth):
            return None
        self._line = (status.phase, tenth)
        if progress is None or status.phase != "Training":
            return f"{self.name}: {status.phase}"
        loss = "" if progress.loss is None else f", loss {progress.loss:.4f}"
        return f"{self.name}: {status.phase} {progress.percent}% (step {progress.step}/{progress.total_steps}{loss}, ETA {progress.eta or '?'})"

    def summary(self, status: FineTuneJobStatus) -> RenderableType:
        """The end: scores of the tuned model beside those of its base, and where the result is."""
        parts: list[RenderableType] = []
        if status.evaluation is not None:
            rows = f"{status.evaluation.examples} held-out rows of {status.evaluation.prompts} prompts"
            parts += [Text(f"{self.name}: {rows}", style="italic"), arms_table(status.evaluation), Text(verdict(status.evaluation))]
            evaluated = status.condition("Evaluated")
            if evaluated is not None and evaluated.reason == PROMPTING_MAY_DO:
                parts.append(
                    Text(f"{PROMPTING_MAY_DO}: the base with an instruction or examples is not measurably worse", style="bold yellow")
                )
        if versions := [f"{artifact.model}@{artifact.version}" for artifact in status.artifacts if artifact.model is not None]:
            parts.append(Text(f"version: {', '.join(versions)}", style="bold"))
        for artifact in status.artifacts:
            parts.append(Text(f"published: {artifact.uri}  {artifact.digest[:19]}  {artifact.bytes / 1e6:.1f} MB", style="bold"))
        for form in status.forms:
            same = f"{form.equal_answers} of {form.probes} greedy answers as the tuned model's" if form.probes else "not asked"
            parts.append(Text(f"  {form.name}  {form.bytes / 1e6:.1f} MB  {same}"))
        failed = status.condition("Failed")
        if failed is not None and failed.status == "True" and "Failed" not in self._seen:
            parts.append(Text(f"{failed.reason}: {failed.message}", style="bold red"))
        return Group(*parts)

    def follow(self, read: Callable[[], FineTuneJobStatus | None], pause: Callable[[], None]) -> Literal["Succeeded", "Failed", "Gone"]:
        """Draw until the job has ended."""
        status = FineTuneJobStatus()
        live = Live(self.render(status), console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        if live is not None:
            live.start()
        try:
            while True:
                latest = read()
                if latest is None:
                    return "Gone"
                status = latest
                for line in self.update(status):
                    self.console.print(line, highlight=False, markup=False, soft_wrap=True)
                if live is not None:
                    live.update(self.render(status))
                elif (line_ := self.plain(status)) is not None:
                    self.console.print(line_, highlight=False, markup=False, soft_wrap=True)
                if status.finished:
                    break
                pause()
        finally:
            if live is not None:
                live.stop()
        self.console.print(self.summary(status))
        return "Succeeded" if status.is_true("Succeeded") else "Failed"
