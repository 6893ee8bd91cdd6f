"""`finetune chat`: its options."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Context, GatewayToken, GatewayURL, Kubeconfig, Namespace
from .output import console

if TYPE_CHECKING:
    from .gateway import Gateway


def chat(
    model: Annotated[str, typer.Argument(help="FineTunedModel, such as support-bot or support-bot@3.")],
    message: Annotated[str | None, typer.Option("--message", "-m", help="One question; else it asks for them.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Ask the base, too, and show both side by side.")] = False,
    base: Annotated[str | None, typer.Option(help="Name of the base for --compare, else found: its FineTuneEndpoint's.")] = None,
    system: Annotated[str | None, typer.Option(help="System text: that of the training rows.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 answers the same each time.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    url: GatewayURL = None,
    token: GatewayToken = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Talk to a tuned model through the gateway."""
    from .chat import Chat, Talk
    from .gateway import ChatError, gateway_at

    try:
        gateway = gateway_at(url, token, kubeconfig, context)
        names = [_qualified(model, namespace)]
        if compare:
            names.insert(0, _qualified(base, namespace) if base else _base_of(gateway, names[0], namespace, kubeconfig, context))
        options = {k: v for k, v in (("temperature", temperature), ("max_tokens", max_tokens)) if v is not None}
        said = [{"role": "system", "content": system}] if system is not None else []
        talking = Chat(gateway, [Talk(name, list(said)) for name in names], options, console)
        if message is None and sys.stdin.isatty():
            raise typer.Exit(talking.converse())
        question = message if message is not None else sys.stdin.read().strip()
        if not question:
            raise ChatError("there is no question: give -m TEXT, or text on standard input", 2)
        talking.ask(question)
    except ChatError as failure:
        print(failure, file=sys.stderr)
        raise typer.Exit(failure.code) from None


def _qualified(model: str, namespace: str | None) -> str:
    return model if namespace is None or "/" in model else f"{namespace}/{model}"


def _base_of(gateway: Gateway, model: str, namespace: str | None, kubeconfig: str | None, context: str | None) -> str:
    """Name of the base beside a tuned model: what the gateway says of it, else the endpoint that the cluster says serves it."""
    from kubernetes.client import ApiException
    from kubernetes.config import ConfigException
    from urllib3.exceptions import HTTPError

    from .cluster import Models
    from .gateway import ChatError
    from .models import status_of

    known: list[dict[str, Any]] = gateway.models()
    parent = next((found.get("parent") for found in known if found["id"] == model), None)
    if isinstance(parent, str) and parent:
        return parent
    space, _, name = model.rpartition("/")
    served: list[str] = []
    try:
        served = status_of(Models(kubeconfig, context, space or namespace).get(name.partition("@")[0])).served
    except (ApiException, ConfigException, HTTPError):  # there may be no cluster at hand, but a gateway
        pass
    if not served:
        raise ChatError(f"which model is the base of {model}? Name its FineTuneEndpoint: --base NAME", 2)
    return f"{space}/{served[0]}" if space else served[0]
