"""`finetune`: the command line."""

from __future__ import annotations

import argparse
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
    watch.add_argument("-n", "--namespace")
    watch.add_argument("--kubeconfig")
    watch.add_argument("--context")
    return parser


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 the job failed, 2 wrong input."""
    arguments = _parser().parse_args()
    console = Console()
    try:
        if arguments.command == "validate":
            for path in arguments.file:
                for metadata, _ in read_jobs(path):
                    console.print(f"{path}: FineTuneJob {metadata.get('name')} is valid", highlight=False)
        elif arguments.command == "watch":
            from .watch import watch

            sys.exit(watch(arguments.name, arguments.namespace, arguments.kubeconfig, arguments.context, console))
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
