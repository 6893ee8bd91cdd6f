"""How a list or a job is written."""

from __future__ import annotations

import enum
import json
import sys
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

console = Console()
"""Of all commands"""


class Output(enum.StrEnum):
    """Forms of it."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


Format = Annotated[Output, typer.Option("--output", "-o", help="table, json, yaml or name.")]


def dump(value: Any, output: Output) -> None:
    """To standard output, as JSON or YAML."""
    text = json.dumps(value, indent=2) if output is Output.JSON else yaml.safe_dump(value, sort_keys=False)
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
