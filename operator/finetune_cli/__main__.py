"""`finetune`: the command line."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from rich.console import Console

from finetune_api.validation import InvalidDocument

from .documents import read_jobs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="finetune", description="Fine-tune, evaluate and publish models with FineTuneJobs.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run a manifest")
    run.add_argument("--local", action="store_true", required=True, help="as processes on this machine, without a cluster")
    run.add_argument("file", type=Path, help="YAML file with a FineTuneJob")
    run.add_argument("--volume", action="append", default=[], metavar="NAME=FOLDER", help="folder that stands for a claim or ConfigMap")
    run.add_argument("--workspace", type=Path, default=Path("finetune-workspace"), help="folder for data, checkpoints and reports")
    validate = commands.add_parser("validate", help="check a manifest without a cluster")
    validate.add_argument("file", type=Path, nargs="+")
    watch = commands.add_parser("watch", help="follow a job in a cluster until it ends")
    watch.add_argument("name")
    queues = commands.add_parser("queues", help="who has the GPUs, and who waits for what")
    why = commands.add_parser("why", help="why a job waits")
    why.add_argument("name")
    simulate = commands.add_parser("simulate", help="what would happen with another job, quota or node")
    simulate.add_argument("-f", "--file", type=Path, action="append", default=[], help="YAML file with FineTuneJobs to add")
    simulate.add_argument("--quota", action="append", default=[], metavar="QUEUE/FLAVOUR=UNITS", help="another nominal quota")
    simulate.add_argument("--node", action="append", default=[], metavar="NODE[=COUNT]", help="more nodes like one that is there, all free")
    for command in (watch, queues, why, simulate):
        command.add_argument("-n", "--namespace")
        command.add_argument("--kubeconfig")
        command.add_argument("--context")
    return parser


def _on_queues(arguments: argparse.Namespace, console: Console) -> int:
    from finetune_operator.cluster.client import APIError

    from . import queues

    reader = queues.Reader(arguments.kubeconfig, arguments.context)
    try:
        if arguments.command == "queues":
            return asyncio.run(queues.queues(reader, console))
        if arguments.command == "why":
            return asyncio.run(queues.why(reader, arguments.name, arguments.namespace, console))
        wanted = arguments.file, arguments.quota, arguments.node
        return asyncio.run(queues.simulate(reader, *wanted, arguments.namespace, console))
    except (queues.WrongInput, APIError) as failure:
        print(failure, file=sys.stderr)
        return 2


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 the job failed, 2 wrong input."""
    arguments = _parser().parse_args()
    console = Console()
    try:
        if arguments.command == "validate":
            for path in arguments.file:
                found = read_jobs(path)
                if not found:
                    console.print(f"{path}: is valid", highlight=False)
                for metadata, _ in found:
                    console.print(f"{path}: FineTuneJob {metadata.get('name')} is valid", highlight=False)
        elif arguments.command == "watch":
            from .watch import watch

            sys.exit(watch(arguments.name, arguments.namespace, arguments.kubeconfig, arguments.context, console))
        elif arguments.command in ("queues", "why", "simulate"):
            sys.exit(_on_queues(arguments, console))
        else:
            from .local import MissingVolume, run_local

            jobs = read_jobs(arguments.file)
            try:
                volumes = dict(pair.split("=", 1) for pair in arguments.volume)
            except ValueError:
                sys.exit("--volume: write NAME=FOLDER")
            try:
                good = [run_local(metadata, spec, volumes, arguments.workspace.resolve(), console) for metadata, spec in jobs]
            except MissingVolume as failure:
                print(failure, file=sys.stderr)
                sys.exit(2)
            sys.exit(0 if all(good) else 1)
    except InvalidDocument as failure:
        for error in failure.errors:
            print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
