"""`finetune usage`: what was asked of models through the gateway, by key, model and day."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from finetune_api.scalars import printable
from finetune_api.usage import UsageRow

from .options import Context, GatewayToken, GatewayURL, Kubeconfig
from .output import Format, Output, console, dump

COUNTS = ("requests", "errors", "prompt_tokens", "completion_tokens")
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Only of this namespace; else all that you may see.")]


def usage(
    key: Annotated[str | None, typer.Option(help="Only of this API key, by its id.")] = None,
    user: Annotated[str | None, typer.Option(help="Only of this user of Kubernetes tokens.")] = None,
    model: Annotated[str | None, typer.Option(help="Only of this model, such as support-bot or support-bot@3.")] = None,
    days: Annotated[int, typer.Option(min=1, help="So many days, in UTC, with today.")] = 30,
    daily: Annotated[bool, typer.Option("--daily", help="Each day by itself.")] = False,
    output: Format = Output.TABLE,
    url: GatewayURL = None,
    token: GatewayToken = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """What was used, by key, model and day: requests and tokens."""
    from .gateway import ChatError, gateway_at

    if output is Output.NAME:
        raise typer.BadParameter("usage has no names; write table, json or yaml", param_hint="--output")
    asked = {"days": days, "key": key, "user": user, "model": model, "namespace": namespace}
    try:
        gateway = gateway_at(url, token, kubeconfig, context)
        found = gateway.usage({name: value for name, value in asked.items() if value is not None})
    except ChatError as failure:
        print(failure, file=sys.stderr)
        raise typer.Exit(failure.code) from None
    if output is Output.TABLE:
        console.print(table(found.rows, daily=daily))
    else:
        dump(found.model_dump(mode="json", by_alias=True, exclude_none=True), output)


def table(rows: Iterable[UsageRow], *, daily: bool) -> Table:
    """By day, or all days together; with the sum of all."""
    sums: dict[tuple[str, ...], list[int]] = {}
    total = [0] * len(COUNTS)
    for row in rows:
        model = row.model if row.version is None else f"{row.model}@{row.version}"
        group = (*([row.day] if daily else []), row.namespace, model, row.key, row.user)
        of_group = sums.setdefault(group, [0] * len(COUNTS))
        for index, name in enumerate(COUNTS):
            count = getattr(row, name)
            of_group[index] += count
            total[index] += count
    found = Table(box=None, pad_edge=False)
    for column in (*(["DAY"] if daily else []), "NAMESPACE", "MODEL", "CALLER"):
        found.add_column(column, overflow="fold")
    for column in ("REQUESTS", "ERRORS", "PROMPT", "COMPLETION"):
        found.add_column(column, justify="right")
    for (*words, key, user), counts in sorted(sums.items()):
        found.add_row(*(Text(printable(word)) for word in (*words, key or user)), *map(str, counts))
    found.add_row("TOTAL", *[""] * (3 if daily else 2), *map(str, total))
    return found
