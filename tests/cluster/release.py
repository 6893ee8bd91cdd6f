"""`make release` and `make release-check`: what is published for a version, made twice the same, and every combination tried.

Chart, CustomResourceDefinitions, bills of materials and the layers with our own code depend on the checkout alone. The layers
below them (Debian's Python, the locked packages) are pinned by version, but take what Debian's mirror has on the day.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

import yaml

from . import images, sbom
from .helm import CHART
from .shell import REPO


def version() -> str:
    """The project's version."""
    return str(tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"])


def _tracked(folder: Path) -> list[Path]:
    """Files of a folder that git knows, in the order of their names; what else lies about is not released."""
    listed = subprocess.run(["git", "ls-files", "-z", str(folder)], cwd=REPO, capture_output=True, text=True, check=True).stdout
    return sorted(REPO / name for name in listed.split("\0") if name)


def _archive(target: Path, root: str, base: Path, files: list[Path]) -> None:
    """A .tgz without times, owners and order of its own."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in files:
            info = tarfile.TarInfo(f"{root}/{path.relative_to(base)}")
            info.size, info.mode = path.stat().st_size, 0o644
            with path.open("rb") as content:
                tar.addfile(info, content)
    with target.open("wb") as sink, gzip.GzipFile(filename="", mode="wb", fileobj=sink, mtime=0) as packed:
        packed.write(buffer.getvalue())


def build(target: Path) -> dict[str, str]:
    """Write a release into the folder: {file: sha256}, also in SHA256SUMS."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    _archive(target / f"finetune-operator-{version()}.tgz", "finetune-operator", CHART, _tracked(CHART))
    for path in _tracked(REPO / "crds"):
        shutil.copyfile(path, target / path.name)
    sbom.write(target)
    for name, folders in images.CODE.items():
        _archive(target / f"{name}-code-{version()}.tgz", "opt/finetune/app", REPO, [f for folder in folders for f in _tracked(folder)])
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(target.iterdir())}
    (target / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    return digests


def problems() -> list[str]:
    """What keeps this checkout from being released."""
    found, wanted = [], version()
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    for field in ("version", "appVersion"):
        if chart[field] != wanted:
            found.append(f"Chart.yaml: {field} is {chart[field]}, pyproject.toml has {wanted}")
    heading = re.search(r"^## (\S+)( \(unreleased\))?", (REPO / "CHANGELOG.md").read_text(), re.M)
    if heading is None or heading.group(1) != wanted:
        found.append(f"CHANGELOG.md: its first section is not {wanted}")
    elif heading.group(2):
        found.append(f"CHANGELOG.md: {wanted} is marked unreleased; write the date")
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=REPO, capture_output=True, text=True, check=True).stdout.splitlines()
    found += [f"not committed: {line}" for line in changed]
    with tempfile.TemporaryDirectory() as folder:
        first, second = build(Path(folder, "a")), build(Path(folder, "b"))
    found += [f"{name} is not the same when it is made twice" for name in first if first[name] != second.get(name)]
    return found


def combinations() -> list[str]:
    """What of all methods and objectives that are accepted together does not learn: `make test` tries each only once."""
    command = [sys.executable, "-m", "pytest", "tests/trainer/test_methods.py", "tests/local/test_local.py", "--durations=25"]
    code = subprocess.run(command, cwd=REPO, env={**os.environ, "FINETUNE_COMBINATIONS": "all"}, check=False).returncode
    return [f"make combinations: pytest's exit code is {code}"] if code else []


def main() -> None:
    """`build FOLDER` or `check`."""
    if sys.argv[1] == "build":
        for name, digest in build(Path(sys.argv[2])).items():
            print(f"{digest[:12]}  {name}")
        return
    found = problems() or combinations()
    print("\n".join(found) or f"{version()} can be released")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
