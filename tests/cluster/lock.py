"""`make lock`: pin the newest versions that pyproject.toml allows, for the tests, the trainer and the operator.

torch is pinned without its local version: the same line takes the CPU build where that is at hand and the CUDA
build elsewhere, whose nvidia packages torch pins itself.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from .environment import LOCKS
from .shell import REPO, run, step

_LEFT_TO_TORCH = re.compile(r"^(nvidia|cuda-|triton)")


def main() -> None:
    """Write the three lock files; the smaller ones are cut from the same resolution."""
    with tempfile.TemporaryDirectory() as scratch:
        uv = Path(scratch, "bin", "uv")
        run([str(getattr(sys, "_base_executable", sys.executable)), "-m", "pip", "install", "--quiet", "--target", scratch, "uv"])
        links = [f"--find-links={folder}" for folder in os.environ.get("PIP_FIND_LINKS", "").split()]
        for name, extras in (("dev", ["--all-extras"]), ("trainer", ["--extra", "trainer"]), ("operator", ["--extra", "operator"])):
            lock = LOCKS[name]
            constraint = [] if name == "dev" else [f"--constraint={LOCKS['dev']}"]
            command = [str(uv), "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--upgrade", "--python-version", "3.11"]
            with step(f"locking {lock.relative_to(REPO)}"):
                run([*command, str(REPO / "pyproject.toml"), *extras, *constraint, *links, "--output-file", str(lock)])
            lines = [
                re.sub(r"^(torch==[0-9.]+)\+.*", r"\1", line) for line in lock.read_text().splitlines() if not _LEFT_TO_TORCH.match(line)
            ]
            lock.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
