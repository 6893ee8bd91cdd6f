"""`finetune models`: the versions of a FineTunedModel, which of them is the champion, and another choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Context, Kubeconfig, Namespace, NotPossible, near
from .output import Format, Output, console, dump

if TYPE_CHECKING:
    from finetune_api.tuned_model import ModelVersion

    from .cluster import Models, Object

models = typer.Typer(help="Versions of FineTunedModels: list, compare, promote, roll back.", no_args_is_help=True)


def _names(ctx: typer.Context, incomplete: str) -> list[str]:
    """For the shell: models of the namespace."""
    options = ctx.params
    try:
        found = _models(options.get("namespace"), options.get("kubeconfig"), options.get("context")).all()
    except Exception:  # a shell that completes shows no errors
        return []
    return [model["metadata"]["name"] for model in found if model["metadata"]["name"].startswith(incomplete)]


Name = Annotated[str, typer.Argument(help="Name of the FineTunedModel.", autocompletion=_names)]
Version = Annotated[int, typer.Argument(help="Number of the version.", min=1)]

_TRIES = 5
"""Of a write that meets the operator's own of the status."""


def _models(namespace: str | None, kubeconfig: str | None, context: str | None, *, everywhere: bool = False) -> Models:
    from .cluster import Models

    return Models(kubeconfig, context, namespace, everywhere=everywhere)


def _get(found: Models, name: str) -> Object:
    """The model. Raises NotPossible with the names that are near."""
    from kubernetes.client import ApiException

    try:
        return found.get(name)
    except ApiException as failure:
        if failure.status != 404:
            raise
    try:
        known = [model["metadata"]["name"] for model in found.all()]
    except ApiException:  # who may get one need not be allowed to list all
        known = []
    raise NotPossible(f"there is no FineTunedModel {name} in namespace {found.namespace}{near(name, known)}")


@models.command("list")
def list_(
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Models of all namespaces.")] = False,
    output: Format = Output.TABLE,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """List models with their champion and its score."""
    from . import models as module

    found = _models(namespace, kubeconfig, context, everywhere=all_namespaces).all()
    if output is Output.TABLE:
        console.print(module.table(found, everywhere=all_namespaces))
    elif output is Output.NAME:
        for model in found:
            print(f"finetunedmodel/{model['metadata']['name']}")
    else:
        dump({"apiVersion": "v1", "kind": "List", "items": found}, output)


@models.command()
def get(
    name: Name, output: Format = Output.TABLE, namespace: Namespace = None, kubeconfig: Kubeconfig = None, context: Context = None
) -> None:
    """A model with all its versions."""
    from . import models as module

    model = _get(_models(namespace, kubeconfig, context), name)
    if output is Output.TABLE:
        console.print(module.describe(model))
    elif output is Output.NAME:
        print(f"finetunedmodel/{name}")
    else:
        dump(model, output)


@models.command()
def compare(
    name: Name,
    version: Annotated[list[int], typer.Argument(help="Numbers of the versions, such as 2 3.", min=1)],
    output: Format = Output.TABLE,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Versions side by side: scores of all arms, data, settings that differ; what differs is bold."""
    from . import models as module

    if len(set(version)) < 2:
        raise typer.BadParameter("name two versions or more", param_hint="VERSION...")
    model = _get(_models(namespace, kubeconfig, context), name)
    found = [module.version_of(model, number) for number in dict.fromkeys(version)]
    if output is Output.TABLE:
        console.print(module.compare(name, found))
    else:
        _dump_versions(name, [one.to_wire() for one in found], output)


@models.command()
def lineage(
    name: Name,
    version: Annotated[int | None, typer.Argument(help="Number of the version; else the champion.", min=1)] = None,
    output: Format = Output.TABLE,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """What a version was made from, back to the base."""
    from . import models as module

    line = module.ancestry(_get(_models(namespace, kubeconfig, context), name), version)
    if output is Output.TABLE:
        console.print(module.lineage(name, line))
    else:
        _dump_versions(name, line, output)


def _dump_versions(name: str, found: list[dict[str, Any]], output: Output) -> None:
    if output is Output.NAME:
        for one in found:
            number = one.get("version", one.get("number"))
            print(one["base"] if number is None else f"{name}@{number}")
    else:
        dump(found, output)


@models.command()
def promote(name: Name, version: Version, namespace: Namespace = None, kubeconfig: Kubeconfig = None, context: Context = None) -> None:
    """Make a version the champion, by pinning it (spec.champion)."""
    from . import models as module

    _pin(_models(namespace, kubeconfig, context), name, lambda model: module.version_of(model, version))


@models.command()
def rollback(
    name: Name,
    version: Annotated[int | None, typer.Argument(help="Number of the version; else the champion before.", min=1)] = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Go back to the version that was champion before, or to the one given, by pinning it."""
    from . import models as module

    _pin(_models(namespace, kubeconfig, context), name, lambda model: module.rollback_target(model, version))


def _pin(found: Models, name: str, chosen: Callable[[Object], ModelVersion]) -> None:
    """Set spec.champion, unless somebody else did meanwhile. Raises NotPossible."""
    from kubernetes.client import ApiException

    from . import models as module

    model = _get(found, name)
    version, wanted = chosen(model), _choice(model)
    for _ in range(_TRIES):
        if model["spec"].get("champion") == version.number:
            console.print(f"finetunedmodel/{name}: version {version.number} is pinned already", highlight=False, soft_wrap=True)
            return
        try:
            found.patch(name, {"champion": version.number}, seen=model["metadata"]["resourceVersion"])
        except ApiException as failure:
            if failure.status != 409:
                raise
            model = _get(found, name)
            if _choice(model) == wanted:  # only something else of it changed
                continue
            raise NotPossible(f"{name}: somebody else has changed its champion meanwhile; see finetune models get {name}") from None
        for line in module.pinned(model, version):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        return
    raise NotPossible(f"{name} changes all the time: nothing was written; try again")


def _choice(model: Object) -> tuple[Any, Any]:
    return model["spec"].get("champion"), (model.get("status") or {}).get("champion")
