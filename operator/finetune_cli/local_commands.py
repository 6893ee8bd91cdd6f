"""`finetune run --local` and `finetune preview`: the commands that need no cluster, for a manifest on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_api.spec import FineTuneJobSpec

from .documents import read_jobs
from .output import console

Workspace = Annotated[Path, typer.Option(help="Folder for data, checkpoints and reports of local runs.")]


def _local_jobs(file: Path, pairs: list[str] | None) -> tuple[list[tuple[dict[str, Any], FineTuneJobSpec]], dict[str, str]]:
    """The jobs of a manifest, and the folder of each claim or ConfigMap: those of plain paths, and those that are said."""
    from .paths import LocalPaths

    try:
        said = dict(pair.split("=", 1) for pair in pairs or ())
    except ValueError:
        raise typer.BadParameter("write NAME=FOLDER", param_hint="--volume") from None
    paths = LocalPaths(file.resolve().parent)
    return read_jobs(file, paths.rewrite), {**paths.volumes, **said}


def run(
    file: Annotated[Path, typer.Argument(help="YAML file with a FineTuneJob.")],
    local: Annotated[bool, typer.Option("--local", help="As processes on this machine, without a cluster.")] = False,
    volume: Annotated[list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Folder that stands for a claim or ConfigMap.")] = None,
    workspace: Workspace = Path("finetune-workspace"),
    prepare_only: Annotated[bool, typer.Option("--prepare-only", help="Only check the data and say what fits; no training.")] = False,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with this run, as `finetune list --local` names it.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin a new run, whatever there is; earlier ones are kept.")] = False,
) -> None:
    """Run a manifest on this machine. An earlier run that was made from the same is gone on with; all others are kept."""
    from .local import run_local

    if not local:
        raise typer.BadParameter("only --local runs here; in a cluster: finetune create -f FILE --watch")
    if resume is not None and fresh:
        raise typer.BadParameter("it goes on with a run, or begins one; leave one of the two out", param_hint="--resume, --fresh")
    folder = workspace.resolve()
    jobs, volumes = _local_jobs(file, volume)
    if resume is not None and len(jobs) > 1:
        raise typer.BadParameter(f"{file} holds {len(jobs)} jobs, and a run is of one: give a file with that one", param_hint="--resume")
    good = [
        run_local(metadata, spec, volumes, folder, console, prepare_only=prepare_only, resume=resume, fresh=fresh)
        for metadata, spec in jobs
    ]
    raise typer.Exit(0 if all(good) else 1)


def preview(
    file: Annotated[Path, typer.Argument(help="YAML file with a FineTuneJob, or reports/data.json of a run.")],
    volume: Annotated[list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Folder that stands for a claim or ConfigMap.")] = None,
    workspace: Workspace = Path("finetune-workspace"),
    rows: Annotated[int, typer.Option(help="Rows to show, at most.")] = 1,
) -> None:
    """Show rows as the model sees them, what is learned in color. Of a manifest, the data are prepared on this machine."""
    from .preview import drawn, prepared, read_samples

    if file.suffix == ".json":
        found = [read_samples(file)]
    else:
        jobs, volumes = _local_jobs(file, volume)
        found = [prepared(metadata, spec, volumes, workspace.resolve()) for metadata, spec in jobs]
    for samples in found:
        for text in drawn(samples[:rows]):
            console.print(text, soft_wrap=True)
