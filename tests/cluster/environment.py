"""Python environments outside the checkout, made from the lock files and cached.

The trainer's and the operator's packages also go into the images; `dev` adds the operator's, the CLI's and the tests'
packages to the trainer's, so that torch is installed once.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .shell import REPO, cached, digest_of, run, say, step

LOCKS = {
    "trainer": REPO / "trainer_image" / "requirements.lock",
    "operator": REPO / "operator" / "requirements.lock",
    "dev": REPO / "tests" / "requirements.lock",
}
#: what `.venv/bin` gets beside python
COMMANDS = {"finetune": "finetune_cli", "pytest": "pytest", "mypy": "mypy"}
BINARIES = ("kubectl", "ruff")


def _pins(lock: Path) -> list[str]:
    return [line.strip() for line in lock.read_text().splitlines() if line.strip() and not line.startswith("#")]


def _python() -> str:
    """The machine's own interpreter, which has pip and venv, also when called from `.venv`."""
    return str(getattr(sys, "_base_executable", sys.executable))


def site_packages(name: str) -> Path:
    """Folder with the packages of the lock file; installed when absent."""
    pins = _pins(LOCKS[name])
    if name == "dev":  # torch and its like are there already, in the trainer's folder
        trainer = set(_pins(LOCKS["trainer"]))
        pins = [pin for pin in pins if pin not in trainer]

    def build(folder: Path) -> None:
        with step(f"installing the Python packages of {name} ({len(pins)} packages, once)"):
            target = folder / "site-packages"
            run([_python(), "-m", "pip", "install", "--quiet", "--no-input", "--no-deps", "--target", target, *pins])

    return cached(f"python-{name}", digest_of("\n".join(pins), sys.version[:4]), build) / "site-packages"


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


def main() -> None:
    """Make the environments and `.venv`."""
    if sys.version_info[:2] != (3, 11):
        say(f"Python {sys.version.split()[0]}: the lock files and the images are made with 3.11")
    virtual_environment()


if __name__ == "__main__":
    main()
