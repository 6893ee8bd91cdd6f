"""Options and errors that all commands share which ask a cluster."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated

import typer

Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace; else that of the context.")]
Kubeconfig = Annotated[str | None, typer.Option(help="Path of a kubeconfig.")]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig.")]
GatewayURL = Annotated[str | None, typer.Option(envvar="FINETUNE_GATEWAY_URL", help="Address of the gateway.")]
GatewayToken = Annotated[str | None, typer.Option(envvar="FINETUNE_API_KEY", help="API key or token; else the kubeconfig's.")]


class NotPossible(ValueError):
    """What was named does not exist, or what was asked for cannot be done; the text says why."""


def near(name: str, known: Iterable[str], *, most: int = 8) -> str:
    """What of the known is like the name, else all of it, as the end of a sentence; empty where nothing is known."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"; there are: {', '.join(names[:most])}{more}" if names else ""
