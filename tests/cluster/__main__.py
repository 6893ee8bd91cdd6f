"""`python -m tests.cluster up|down|load|status|env`: the local cluster from the command line."""

from __future__ import annotations

import argparse
import sys

from . import images, machine
from .kind import KindCluster
from .local import LocalCluster
from .shell import CommandFailed

NAME = "finetune"


def cluster(name: str = NAME) -> LocalCluster | KindCluster:
    """kind where Docker and kind are at hand, plain processes elsewhere."""
    return KindCluster(name) if machine.with_kind() else LocalCluster(name)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="tests.cluster", description=__doc__)
    parser.add_argument("command", choices=["up", "down", "load", "status", "env"])
    command = parser.parse_args().command
    target = cluster()
    try:
        if command == "up":
            target.up(load=images.both())
            print(f"export KUBECONFIG={target.kubeconfig}")
        elif command == "load":
            for image in images.both():
                target.load(image)
        elif command == "down":
            target.down()
        elif command == "status":
            up = target.is_up()
            print("up" if up else "down")
            sys.exit(0 if up else 1)
        else:
            print(f"export KUBECONFIG={target.kubeconfig}")
    except CommandFailed as failure:
        sys.exit(f"{failure}")


if __name__ == "__main__":
    main()
