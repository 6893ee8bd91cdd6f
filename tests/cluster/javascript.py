"""Packages of Node for tests: what node*/package-lock.json pin, installed by the machine's npm (Debian's where there is none) outside the checkout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from . import debian
from .shell import cached, digest_of, run, step

_PROJECTS = {"transformers-js": "node", "openai-js": "node_openai"}


def _installed(name: str) -> Path:
    """A folder with the packages and the scripts of a project."""
    project = Path(__file__).with_name(_PROJECTS[name])

    def build(folder: Path) -> None:
        for file in project.iterdir():
            shutil.copyfile(file, folder / file.name)
        with step(f"installing {name} (once)"):
            # the processor's onnxruntime is in the package; its script would fetch the one for GPUs
            run(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=folder, env={"ONNXRUNTIME_NODE_INSTALL": "skip"})

    debian.ensure(debian.NODE)
    return cached(name, digest_of(project), build)


def install() -> None:
    """All of them."""
    for name in _PROJECTS:
        _installed(name)


def answers(folder: Path, dtype: str, prompts: list[list[dict[str, str]]], tokens: int, scratch: Path) -> list[str]:
    """Greedy answers of a folder that is laid out for Transformers.js. `dtype` may be `default`."""
    asked = scratch / "prompts.json"
    asked.write_text(json.dumps(prompts))
    script = _installed("transformers-js") / "ask.mjs"
    return list(json.loads(run(["node", script, folder, dtype, asked, str(tokens)]).splitlines()[-1]))


def fine_tune(base_url: str, key: str, rows: Path) -> dict[str, Any]:
    """What OpenAI's SDK for Node got from every verb of the fine-tuning API."""
    script = _installed("openai-js") / "fine_tune.mjs"
    return dict(json.loads(run(["node", script, base_url, key, rows]).splitlines()[-1]))
