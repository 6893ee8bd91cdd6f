"""`finetune preview`: rows as the model sees them, in the terminal. What is learned is in color."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.text import Text

from finetune_api.scalars import printable
from finetune_api.spec import FineTuneJobSpec

from .local import LocalRun, job_file

Samples = list[list[tuple[str, bool]]]
"""Rows as (text, whether it is learned) pieces."""
LEARNED, CONTEXT = "bold green", "dim"


class NoSamples(ValueError):
    """There is no row to show."""


def prepared(metadata: dict[str, Any], spec: FineTuneJobSpec, volumes: dict[str, str], workspace: Path) -> Samples:
    """The rows of a job, prepared in a folder that does not stay; downloads are those of the workspace. Raises NoSamples."""
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(workspace, "cache")
        cache.mkdir(parents=True, exist_ok=True)
        Path(scratch, "cache").symlink_to(cache)
        run = LocalRun(job_file(metadata, spec.model_copy(update={"publish": []}), volumes), Path(scratch))
        run.run(prepare_only=True)
        if run.status.phase == "Failed":
            told = next((c.message for c in run.status.conditions if c.type == "Failed"), "prepare failed")
            raise NoSamples(told.partition(" (log: ")[0])  # the log goes with the folder
        return read_samples(Path(run.layout.data_report))


def read_samples(report: Path) -> Samples:
    """The rows that prepare drew in reports/data.json, as (text, whether it is learned) pieces. Raises NoSamples."""
    try:
        told: Any = json.loads(report.read_text())
        found = [[(str(text), bool(learned)) for text, learned in row] for row in told["samples"]]
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise NoSamples(f"{report} is no report of prepare (reports/data.json of a run): {failure}") from None
    if not found:
        raise NoSamples(f"{report} holds no row")
    return found


def drawn(rows: Samples) -> Iterator[Text]:
    """Each row as one text, with a line before it that says what the colors mean."""
    for number, row in enumerate(rows, start=1):
        learned = sum(len(text) for text, so in row if so)
        share = 100 * learned / max(1, sum(len(text) for text, _ in row))
        yield Text.assemble(f"row {number}: ", ("learned", LEARNED), ", ", ("context", CONTEXT), f"; {share:.0f} % of the text is learned")
        yield Text.assemble(*((printable(text), LEARNED if so else CONTEXT) for text, so in row))
        yield Text("")
