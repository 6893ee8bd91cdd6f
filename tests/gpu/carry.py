"""Fetch the wheels that a GPU machine without a network lacks: `python3 -m tests.gpu.carry FOLDER [--python 3.12] [--cuda 130] [NAME ...]`.

Without names: all that the stages need beside torch, transformers, accelerate, peft and what comes with them. Versions are those
of trainer_image/requirements.lock. All of it has to stay below 60 MB, so bitsandbytes keeps its library for one CUDA alone.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import zipfile
from pathlib import Path

LIMIT = 60 * 10**6
LOCK = Path(__file__).resolve().parents[2] / "trainer_image" / "requirements.lock"
NAMES = (
    "trl", "datasets", "dill", "multiprocess", "xxhash", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "duckdb",
    "rensa", "py3langid", "jsonschema", "jsonschema-specifications", "referencing", "rpds-py", "attrs", "bitsandbytes", "liger-kernel",
)  # fmt: skip
_PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]


def locked(names: list[str], lock: str) -> list[str]:
    """`name==version` of each, as the lock has it. Raises KeyError for one that it has not."""
    versions = {name.lower(): version for name, version in re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", lock, re.M)}
    return [f"{name}=={versions[name.lower()]}" for name in names]


def prune(wheel: Path, cuda: str) -> None:
    """Leave bitsandbytes' libraries for other accelerators out."""
    kept = wheel.with_suffix(".kept")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(kept, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            library = re.search(r"libbitsandbytes_(\w+)\.so$", entry.filename)
            if library is None or library.group(1) in ("cpu", f"cuda{cuda}"):
                new.writestr(entry, old.read(entry))
    kept.replace(wheel)


def main() -> None:
    """Download, prune, and print the sum."""
    parser = argparse.ArgumentParser(prog="tests.gpu.carry", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=list(NAMES))
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="of the GPU machine (%(default)s)")
    parser.add_argument("--cuda", default="130", help="of the GPU machine's torch, as bitsandbytes writes it (%(default)s)")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", given.python, "--dest", str(given.folder)]
    command += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, *locked(given.names, LOCK.read_text())], check=True)
    for wheel in given.folder.glob("bitsandbytes-*.whl"):
        prune(wheel, given.cuda)
    total = sum(wheel.stat().st_size for wheel in given.folder.glob("*.whl"))
    print(f"{total / 10**6:.1f} MB in {given.folder}")
    if total > LIMIT:
        raise SystemExit(f"that is more than {LIMIT // 10**6} MB; name the packages that are missing there")


if __name__ == "__main__":
    main()
