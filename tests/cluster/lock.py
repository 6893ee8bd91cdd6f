"""`make lock`: pin the newest versions that pyproject.toml allows, with their hashes and all that they depend on.

One resolution for every Python from 3.11 to 3.13 (`dev`, of which the trainer's and the operator's locks are parts), for Linux on
x86_64 (`tool.uv.environments`). uv and Go's toolchain are pinned beside them. Kubernetes and its like: tests/cluster/go.
"""

from __future__ import annotations

from .environment import LOCKS, TOOLS, uv
from .shell import REPO, run, step

_COMPILE = ("pip", "compile", "--quiet", "--universal", "--python-version", "3.11.2", "--generate-hashes", "--no-header", "--no-annotate")
_EVERYWHERE = " ; python_full_version < '3.14' and platform_machine == 'x86_64' and sys_platform == 'linux'"
"""The marker that `tool.uv.environments` puts on every line."""


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


if __name__ == "__main__":
    main()
