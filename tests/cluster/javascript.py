"""Transformers.js for tests: the packages that node/package-lock.json pins, installed by the machine's npm (Debian's where there is none) outside the checkout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from . import debian
from .shell import cached, digest_of, run, step

_PROJECT = Path(__file__).with_name("node")


def installed() -> Path:
    """A folder with the packages and the scripts of node/."""

    def build(folder: Path) -> None:
        for file in _PROJECT.iterdir():
            shutil.copyfile(file, folder / file.name)
        with step("installing Transformers.js (once)"):
            # the processor's onnxruntime is in the package; its script would fetch the one for GPUs
            run(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=folder, env={"ONNXRUNTIME_NODE_INSTALL": "skip"})

    debian.ensure(debian.NODE)
    return cached("transformers-js", digest_of(_PROJECT), build)


def answers(folder: Path, dtype: str, prompts: list[list[dict[str, str]]], tokens: int, scratch: Path) -> list[str]:
    """Greedy answers of a folder that is laid out for Transformers.js. `dtype` may be `default`."""
    asked = scratch / "prompts.json"
    asked.write_text(json.dumps(prompts))
    script = installed() / "ask.mjs"
    return list(json.loads(run(["node", script, folder, dtype, asked, str(tokens)]).splitlines()[-1]))
