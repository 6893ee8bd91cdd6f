"""`finetune erase`: one person's rows out of what jobs and models keep, and what became of each file."""

from __future__ import annotations

import base64
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_api.erasure import ErasureReport, ErasureRequest, RowsFile, TrainedOn

from .local_commands import Workspace
from .options import Context, Kubeconfig, Namespace, NotPossible
from .output import Format, Output, console, dump

_MOST_ROWS = 256 * 2**20
"""Bytes of a file of rows."""


def erase(
    containing: Annotated[list[str] | None, typer.Option(help="Text of the person's, such as a name or an address.")] = None,
    rows: Annotated[Path | None, typer.Option(help="File with the rows, as they stand in the data set; or with prompts.")] = None,
    where: Annotated[list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Of --rows, those with this value.")] = None,
    column: Annotated[list[str] | None, typer.Option(metavar="NAME=NAME", help="A column of --rows, as dataset.columns names it.")] = None,
    job: Annotated[list[str] | None, typer.Option(help="Look into the workspace of this job.")] = None,
    claim: Annotated[list[str] | None, typer.Option(help="Look into all workspaces on this claim.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Look into what this FineTunedModel keeps.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Look into all jobs, claims and models of the namespace.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Look into the runs on this machine instead.")] = False,
    workspace: Workspace = Path("finetune-workspace"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be removed.")] = False,
    image: Annotated[str | None, typer.Option(help="Trainer image; else that of a pod of the namespace.")] = None,
    output: Format = Output.TABLE,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Remove one person's rows from prepared data, reports, probes and digests of prompts, and tell what was removed.

    Weights that learned from them, and your own data, stay: the weights are named.
    """
    from . import erase as module

    request = ErasureRequest(dry_run=dry_run, containing=containing or [], rows=_rows(rows), where=_pairs(where, "--where"), readings=[])
    columns = _pairs(column, "--column")
    if local:
        if claim or model or everything:
            raise typer.BadParameter("it looks into runs on this machine: leave --claim, --model and --all out", param_hint="--local")
        _local(request, workspace.resolve(), job or [], columns, output)
        return
    from .cluster import Jobs, Models

    cluster = Jobs(kubeconfig, context, namespace)
    jobs, models = cluster.all(), Models(kubeconfig, context, namespace).all() if model or everything else []
    chosen = module.places(module.Choice(job or [], claim or [], model or [], everything), jobs, models)
    template = module.template_of(cluster)
    found = image or (template.spec.containers[0].image if template is not None else None)
    if found is None:
        raise NotPossible(f"no pod in namespace {cluster.namespace} runs the trainer's image; name it with --image")
    request.readings = module.readings(jobs, columns)
    trained: list[TrainedOn] = []
    reports: list[tuple[str, ErasureReport]] = []
    failed = False
    for place in chosen:
        if not module.is_there(cluster, place):
            print(f"{place.shown}: the claim is gone, and all that was on it", file=sys.stderr)
            continue
        try:
            report = module.ask_in(cluster, module.pod_at(place, found, template), module.request_at(place, request, trained))
        except NotPossible as failure:  # the others are looked into all the same
            print(f"{place.shown}: {failure}", file=sys.stderr)
            failed = True
            continue
        trained += report.trained
        reports.append((place.shown, report))
        _show(place.shown, report, module.published_by(jobs), output)
    for name in module.mentioned(jobs, request.containing):
        print(f"the status of FineTuneJob {name} mentions it, in a message: finetune delete {name}", file=sys.stderr)
    _end(reports, output)
    raise typer.Exit(2 if failed else 0)


def _local(request: ErasureRequest, workspace: Path, named: list[str], columns: dict[str, str], output: Output) -> None:
    from . import erase as module
    from .runs import Lock, runs_in

    with ExitStack() as held:

        def hold(folder: Path) -> bool:
            lock = Lock(folder)
            held.callback(lock.close)
            return lock.taken

        folders = module.local_folders(workspace, named, hold)
        readings = module.readings([run.job for run in runs_in(workspace)], columns)
        request = request.model_copy(update={"readings": readings, "workspace": str(workspace), "folders": folders})
        report = module.ask_here(request)
    _show(str(workspace), report, {}, output)
    _end([(str(workspace), report)], output)


def _show(shown: str, report: ErasureReport, published: dict[str, list[str]], output: Output) -> None:
    from . import erase as module

    if output is Output.TABLE:
        for line in (f"{shown}:", *module.told(report, published)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _end(reports: list[tuple[str, ErasureReport]], output: Output) -> None:
    if output is not Output.TABLE:
        hidden = {"trained"}
        dump([{"place": shown, **{k: v for k, v in report.to_wire().items() if k not in hidden}} for shown, report in reports], output)
        return
    console.print(
        "Not removed: weights that learned from it (named above: train anew without those rows, then retire them), your own data that "
        "the jobs were made from, copies elsewhere (backups, earlier versions of objects in a bucket).",
        highlight=False,
        soft_wrap=True,
    )


def _rows(path: Path | None) -> RowsFile | None:
    if path is None:
        return None
    try:
        if path.stat().st_size > _MOST_ROWS:
            raise typer.BadParameter(f"{path} is over {_MOST_ROWS >> 20} MiB; give the person's rows alone", param_hint="--rows")
        return RowsFile(name=path.name, content=base64.b64encode(path.read_bytes()).decode())
    except OSError as failure:
        raise typer.BadParameter(f"{path}: {failure.strerror or failure}", param_hint="--rows") from None


def _pairs(given: list[str] | None, option: str) -> dict[str, Any]:
    found = dict(one.split("=", 1) for one in given or () if "=" in one)
    if len(found) < len(given or ()):
        raise typer.BadParameter("write COLUMN=VALUE, each column once", param_hint=option)
    return found
