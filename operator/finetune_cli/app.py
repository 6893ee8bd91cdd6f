"""`finetune`, also as `kubectl finetune`: the commands. What they do is in the modules beside this one."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_api import API_VERSION, KIND
from finetune_api.advice import advice
from finetune_api.spec import FineTuneJobSpec

from . import chat_command, erase_command, keys, local_commands, model_commands, usage_command
from .documents import read_documents
from .local_commands import Workspace
from .options import Context, Kubeconfig, Namespace
from .output import Format, Output, console, dump

app = typer.Typer(
    name="finetune",
    help="Fine-tune, evaluate and publish models with FineTuneJobs.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 the job failed, 2 wrong input or not there, 130 interrupted.",
)

Name = Annotated[str, typer.Argument(help="Name of the FineTuneJob.", autocompletion=lambda ctx, incomplete: _names(ctx, incomplete))]


def _names(ctx: typer.Context, incomplete: str) -> list[str]:
    """For the shell: jobs of the namespace."""
    options = ctx.params
    try:
        found = _jobs(options.get("namespace"), options.get("kubeconfig"), options.get("context")).all()
    except Exception:  # a shell that completes shows no errors
        return []
    return [job["metadata"]["name"] for job in found if job["metadata"]["name"].startswith(incomplete)]


def _jobs(namespace: str | None, kubeconfig: str | None, context: str | None, *, everywhere: bool = False) -> Any:
    from .cluster import Jobs

    return Jobs(kubeconfig, context, namespace, everywhere=everywhere)


@app.command()
def validate(file: Annotated[list[Path], typer.Argument(help="YAML files with objects of ours.")]) -> None:
    """Check manifests without a cluster."""
    for path in file:
        for document in read_documents(path):
            console.print(f"{path}: {document.kind} {document.name} is valid", highlight=False, soft_wrap=True)
            for warning in advice(document.spec) if isinstance(document.spec, FineTuneJobSpec) else ():
                console.print(f"  warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)


app.command()(local_commands.run)
app.command()(local_commands.preview)
app.command()(erase_command.erase)
app.add_typer(keys.keys, name="keys")
app.command()(usage_command.usage)
app.command()(chat_command.chat)
app.add_typer(model_commands.models, name="models")


@app.command()
def create(
    file: Annotated[Path | None, typer.Option("--file", "-f", help="YAML file with jobs, models, endpoints.")] = None,
    name: Annotated[str | None, typer.Option(help="Name; else one is made from the model's.")] = None,
    model: Annotated[str | None, typer.Option(help="URI of the base model, such as hf://org/model@revision.")] = None,
    data: Annotated[str | None, typer.Option(help="URI of the rows to train on.")] = None,
    eval_fraction: Annotated[float, typer.Option(help="Share of the rows held out; 0 for none.")] = 0.1,
    method: Annotated[str, typer.Option(help="lora, qlora, full, ...")] = "lora",
    objective: Annotated[str, typer.Option(help="sft, dpo, ...")] = "sft",
    epochs: Annotated[float | None, typer.Option(help="Passes over the rows.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    gpus: Annotated[int, typer.Option(help="GPUs per node; 0 trains on CPU.")] = 1,
    nodes: Annotated[int, typer.Option(help="Worker pods.")] = 1,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of one GPU, such as 80Gi.")] = None,
    queue: Annotated[str | None, typer.Option(help="FineTuneQueue.")] = None,
    publish: Annotated[str | None, typer.Option(help="URI that the result goes to; model://NAME makes a version of a model.")] = None,
    wizard: Annotated[bool, typer.Option("--wizard", help="Ask for what is missing.")] = False,
    dry_run: Annotated[str | None, typer.Option(help="client prints the manifest, server lets the cluster check it.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it until it ends.")] = False,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Make jobs from a file, from flags, or by asking; of a file also models and endpoints."""
    from .create import from_flags

    if dry_run not in (None, "client", "server"):
        raise typer.BadParameter("write client or server", param_hint="--dry-run")
    if file is None:
        metadata, spec = from_flags(
            name=name, model=model, data=data, eval_fraction=eval_fraction, method=method, objective=objective, epochs=epochs,
            learning_rate=learning_rate, gpus=gpus, nodes=nodes, gpu_memory=gpu_memory, queue=queue, publish=publish, ask=wizard,
        )  # fmt: skip
        found = [(KIND, metadata, spec)]
    else:
        found = [(d.kind, d.metadata, d.spec.to_wire(exclude_unset=True)) for d in read_documents(file)]
    if dry_run == "client":
        for index, (kind, metadata, spec) in enumerate(found):
            print("---\n" if index else "", end="")
            dump({"apiVersion": API_VERSION, "kind": kind, "metadata": metadata, "spec": spec}, Output.YAML)
        return
    from .cluster import CREATED

    job = None
    for kind, metadata, spec in found:
        if kind not in CREATED:
            print(f"{kind} {metadata.get('name')} is an administrator's and left out: kubectl apply -f {file}", file=sys.stderr)
            continue
        made, warnings = CREATED[kind](kubeconfig, context, namespace).create(metadata, spec, dry_run=dry_run == "server")
        for warning in warnings:
            print(f"Warning: {warning}", file=sys.stderr)
        console.print(f"{kind.lower()}/{made['metadata']['name']} created{' (server dry run)' if dry_run else ''}", highlight=False)
        job = made if kind == KIND else job
    if watch and job is not None and dry_run is None:
        _watch(job["metadata"]["name"], job["metadata"]["namespace"], kubeconfig, context)


def _write(found: list[Any], output: Output, *, everywhere: bool) -> None:
    from . import show

    if output is Output.TABLE:
        console.print(show.table(found, everywhere=everywhere))
    elif output is Output.NAME:
        for job in found:
            print(f"finetunejob/{job['metadata']['name']}")
    else:
        dump({"apiVersion": "v1", "kind": "List", "items": found}, output)


@app.command("list")
def list_(
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Jobs of all namespaces.")] = False,
    phase: Annotated[str | None, typer.Option(help="Only jobs of this phase.")] = None,
    output: Format = Output.TABLE,
    local: Annotated[bool, typer.Option("--local", help="The runs of `finetune run --local` instead.")] = False,
    workspace: Workspace = Path("finetune-workspace"),
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """List jobs, or the runs on this machine."""
    if local:
        from .runs import list_runs

        list_runs(workspace.resolve(), phase, output, console)
        return
    found = _jobs(namespace, kubeconfig, context, everywhere=all_namespaces).all()
    kept = [job for job in found if phase is None or (job.get("status") or {}).get("phase", "Pending").lower() == phase.lower()]
    _write(kept, output, everywhere=all_namespaces)


@app.command()
def get(
    name: Name, output: Format = Output.TABLE, namespace: Namespace = None, kubeconfig: Kubeconfig = None, context: Context = None
) -> None:
    """Show one job."""
    job = _jobs(namespace, kubeconfig, context).get(name)
    if output in (Output.TABLE, Output.NAME):
        _write([job], output, everywhere=False)
    else:
        dump(job, output)


@app.command()
def describe(name: Name, namespace: Namespace = None, kubeconfig: Kubeconfig = None, context: Context = None) -> None:
    """Everything about a job: plan, progress, loss, conditions, restarts, events, scores."""
    from . import logs, show

    jobs = _jobs(namespace, kubeconfig, context)
    job = jobs.get(name)
    console.print(show.describe(job, jobs.events(job), show.losses(logs.rank_zero(jobs, job))))


@app.command("logs")
def logs_(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    stage: Annotated[str | None, typer.Option(help="prepare, check, train, evaluate or publish.")] = None,
    rank: Annotated[int | None, typer.Option(help="Only this worker pod.")] = None,
    tail: Annotated[int | None, typer.Option(help="Only so many last lines of each pod.")] = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Logs of all pods, every line with its stage and rank."""
    from . import logs

    raise typer.Exit(logs.logs(_jobs(namespace, kubeconfig, context), name, stage, rank, tail, follow=follow, console=console))


@app.command()
def events(name: Name, namespace: Namespace = None, kubeconfig: Kubeconfig = None, context: Context = None) -> None:
    """What happened to a job, the oldest first."""
    from . import show

    jobs = _jobs(namespace, kubeconfig, context)
    for line in show.event_lines(jobs.events(jobs.get(name))):
        console.print(line, soft_wrap=True)


def _watch(name: str, namespace: str | None, kubeconfig: str | None, context: str | None) -> None:
    from .watch import watch

    raise typer.Exit(watch(name, namespace, kubeconfig, context, console))


@app.command()
def watch(name: Name, namespace: Namespace = None, kubeconfig: Kubeconfig = None, context: Context = None) -> None:
    """Follow a job until it ends, with its progress."""
    _watch(name, namespace, kubeconfig, context)


def _change(done: str, policy: dict[str, Any]) -> Callable[..., None]:
    def command(name: Name, namespace: Namespace = None, kubeconfig: Kubeconfig = None, context: Context = None) -> None:
        _jobs(namespace, kubeconfig, context).patch(name, {"runPolicy": policy})
        console.print(f"finetunejob/{name} {done}", highlight=False)

    return command


app.command("suspend", help="Stop a job at a checkpoint and give its GPUs back; resume goes on from there.")(
    _change("suspended", {"suspend": True})
)
app.command("resume", help="Let a suspended job go on.")(_change("resumed", {"suspend": False}))
app.command("cancel", help="End a job for good; its checkpoints stay until it is deleted.")(_change("cancelled", {"cancel": True}))


@app.command()
def retry(
    name: Name,
    new_name: Annotated[str | None, typer.Option("--name", help="Name of the new job.")] = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Make a new job with the spec of one that has ended."""
    from .create import again

    jobs = _jobs(namespace, kubeconfig, context)
    made, _ = jobs.create(*again(jobs.get(name), new_name))
    console.print(f"finetunejob/{made['metadata']['name']} created", highlight=False)


@app.command()
def delete(
    name: Annotated[list[str], typer.Argument(help="Names of FineTuneJobs.")],
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Delete jobs with their pods and their own workspaces; what was published stays."""
    jobs = _jobs(namespace, kubeconfig, context)
    for one in name:
        jobs.delete(one)
        console.print(f"finetunejob/{one} deleted", highlight=False)


@app.command()
def download(
    name: Name,
    target: Annotated[Path | None, typer.Argument(help="Folder; else the job's name.")] = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Copy the published result of a job onto this machine."""
    from finetune_api.lenient import read_status

    from .download import NotHere
    from .download import download as fetch

    jobs = _jobs(namespace, kubeconfig, context)
    job = jobs.get(name)
    artifacts, pods = read_status(job.get("status")).artifacts, jobs.pods(job)
    if not artifacts or not pods:
        raise typer.BadParameter(f"{name} has published nothing" if not artifacts else f"{name} has no pod left to take its image from")
    folder = target or Path(name)
    try:
        count = fetch(jobs, artifacts[0], pods[0].spec.containers[0].image, folder)
    except NotHere as failure:
        print(failure, file=sys.stderr)
        raise typer.Exit(2) from None
    console.print(f"{count} files of {artifacts[0].uri} in {folder}", highlight=False)


@app.command()
def compare(
    name: Annotated[list[str], typer.Argument(help="Names of FineTuneJobs.")],
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Settings and results of jobs side by side; what differs is bold."""
    from . import show

    jobs = _jobs(namespace, kubeconfig, context)
    console.print(show.compare([jobs.get(one) for one in name]))


@app.command()
def estimate(
    name: Name,
    gpu: Annotated[str | None, typer.Option(help="Kind of GPU; else all that are known.")] = None,
    price: Annotated[float | None, typer.Option(help="Price of one for an hour.")] = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Memory, time and cost of a job, from what prepare found."""
    from finetune_api.lenient import read_status

    from . import estimate as estimates

    if gpu is not None and gpu not in estimates.GPUS:
        raise typer.BadParameter(f"{gpu} is not known; write one of {', '.join(estimates.GPUS)}", param_hint="--gpu")
    status = read_status(_jobs(namespace, kubeconfig, context).get(name).get("status"))
    try:
        estimates.show(name, status, gpu, price, console)
    except estimates.NothingToEstimate as failure:
        print(failure, file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def explain(path: Annotated[str, typer.Argument(help="Such as spec.tuning.method, model.spec or endpoint.status.")] = "spec") -> None:
    """A field of the API with its type, default and documentation."""
    from .explain import NoSuchField
    from .explain import explain as show

    try:
        show(path, console)
    except NoSuchField as failure:
        print(failure, file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def queues(namespace: Namespace = None, kubeconfig: Kubeconfig = None, context: Context = None) -> None:
    """Who has the GPUs, and who waits for what."""
    from . import queues as module

    raise typer.Exit(asyncio.run(module.queues(module.Reader(kubeconfig, context), console)))


@app.command()
def why(name: Name, namespace: Namespace = None, kubeconfig: Kubeconfig = None, context: Context = None) -> None:
    """Why a job waits."""
    from . import queues as module

    raise typer.Exit(asyncio.run(module.why(module.Reader(kubeconfig, context), name, namespace, console)))


@app.command()
def simulate(
    file: Annotated[list[Path] | None, typer.Option("--file", "-f", help="YAML file with FineTuneJobs to add.")] = None,
    quota: Annotated[list[str] | None, typer.Option(metavar="QUEUE/FLAVOR=UNITS", help="Another nominal quota.")] = None,
    node: Annotated[list[str] | None, typer.Option(metavar="NODE[=COUNT]", help="More nodes like one that is there, all free.")] = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """What would happen with another job, quota or node."""
    from . import queues as module

    wanted = file or [], quota or [], node or []
    raise typer.Exit(asyncio.run(module.simulate(module.Reader(kubeconfig, context), *wanted, namespace, console)))
