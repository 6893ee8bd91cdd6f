"""`python3 -m tests.gpu`: lora, qlora and full on this machine's GPUs, measured, as one JSON document and a table.

Needs an NVIDIA GPU and a Python with torch, transformers, TRL and what else the stages import; no Kubernetes and no network.
Without a GPU it says what it did not check, and exits 0. `--wheels DIR` adds packages that `python -m tests.gpu.carry` fetched
on another machine. `--device cpu --small` goes through everything but CUDA on a small model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from . import figures
from .machine import Machine, look

REPO = Path(__file__).resolve().parents[2]
UNCHECKED = (
    "lora, qlora and full train, are evaluated and published on a GPU, in bf16",
    "each rank has its own GPU",
    "padding-free attention and Liger's kernels, with the losses of a dense mask",
    "estimated against measured peak memory",
    "tokens per second and MFU beside trl sft",
)


def main(words: list[str] | None = None) -> int:
    """Run the check. 0: passed, or nothing to run it on; 1: something does not hold; 2: the environment lacks something."""
    parser = argparse.ArgumentParser(prog="tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto", help="cpu: go through it without a GPU")
    parser.add_argument("--small", action="store_true", help="a model of some thousand parameters and short rows")
    parser.add_argument("--runs", default="lora,qlora,full", help="which runs, by method (%(default)s)")
    parser.add_argument("--no-baseline", action="store_true", help="leave trl sft out")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to use beside the packages that are here")
    parser.add_argument("--out", type=Path, default=REPO / "out" / "gpu.json", help="where the JSON goes (%(default)s)")
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="finetune-gpu-") as scratch:
        _add_paths(Path(scratch), given.wheels)
        return _check(given, Path(scratch))


def _check(given: argparse.Namespace, folder: Path) -> int:
    machine = look()
    print(f"Python {machine.python}; " + ", ".join(f"{name} {version}" for name, version in machine.versions.items()), flush=True)
    if machine.optional_missing:
        print(f"not installed, so not checked: {', '.join(machine.optional_missing)}")
    cuda = given.device == "auto"
    document: dict[str, Any] = {"machine": machine.to_wire(), "runs": {}, "checks": [], "not_checked": []}
    if cuda and not machine.devices and not machine.gpus:
        document |= {"verdict": "no GPU", "not_checked": list(UNCHECKED)}
        print("There is no NVIDIA GPU here: nothing was run. Not checked:\n" + "\n".join(f"  - {line}" for line in UNCHECKED))
        return _end(given.out, document, 0)
    if lacking := _lacking(machine, cuda):
        document |= {"verdict": "environment", "not_checked": [*lacking, *UNCHECKED]}
        print("\n".join(lacking))
        return _end(given.out, document, 2)
    for index, gpu in enumerate(machine.gpus if cuda else []):
        print(f"GPU {index}: {gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB, compute capability {'.'.join(map(str, gpu['capability']))}")
    _run(given, folder, machine, document, cuda)
    found = [figures.Check(**check) for check in document["checks"]]
    document["not_checked"] += [f"{check.run}: {check.what} ({check.saw})" for check in found if check.ok is None]
    print("\n" + figures.table(document["runs"]))
    for check in found:
        print(f"{ {True: 'ok', False: 'NOT OK', None: 'not checked'}[check.ok]:12}{check.run}: {check.what}: {check.saw}")
    for line in document["not_checked"][: -sum(check.ok is None for check in found) or None]:
        print(f"not checked {line}")
    bad = any(check.ok is False for check in found)
    document["verdict"] = "failed" if bad else "passed"
    return _end(given.out, document, int(bad))


def _run(given: argparse.Namespace, folder: Path, machine: Machine, document: dict[str, Any], cuda: bool) -> None:
    from .material import make_model, make_rows
    from .runs import DENSE, FULL_SCALE, METHODS, SMALL_SCALE, Runs

    wanted = [name for name in METHODS if name in given.runs.split(",")]
    if "bitsandbytes" in machine.optional_missing and "qlora" in wanted:
        wanted.remove("qlora")
        document["not_checked"].append("qlora: bitsandbytes is not installed")
    model = make_model(folder, small=given.small)
    runs = Runs(
        folder, model, make_rows(folder / "rows", small=given.small), machine, SMALL_SCALE if given.small else FULL_SCALE, cuda=cuda
    )
    for name in [*wanted, *([DENSE] if "lora" in wanted and cuda else [])]:
        print(f"running {name} ...", flush=True)
        run = runs.run(name, baseline=not given.no_baseline and name != DENSE)
        document["runs"][name] = run
        liger = "liger-kernel" in machine.versions
        checks = figures.check_run(name, run, gpus=runs.gpus, half=runs.half, liger=liger)
        if name == DENSE:
            checks.append(figures.check_same_losses("lora", document["runs"]["lora"].get("losses") or [], run.get("losses") or []))
        document["checks"] += [check.to_wire() for check in checks]
        _write(given.out, {**document, "verdict": f"ended after {name}"})  # where time is lent, it may end
    if cuda and runs.gpus == 1:
        document["not_checked"].append("several ranks, each with its own GPU: there is one GPU")


def _lacking(machine: Machine, cuda: bool) -> list[str]:
    """What stands in the way, with what to do."""
    lines = []
    if machine.missing:
        fetch = "fetch them with `python3 -m tests.gpu.carry FOLDER` on a machine with a network, then give --wheels FOLDER here"
        lines.append(f"missing: {', '.join(machine.missing)}; install them, or {fetch}")
    if cuda and "torch" in machine.versions and not machine.gpus:
        build = f"it is built for CUDA {machine.cuda_build}; look at nvidia-smi" if machine.cuda_build else "it is a build for CPUs"
        lines.append(f"{machine.devices} GPU(s) are here, but torch {machine.versions['torch']} sees none: {build}")
    return lines


def _add_paths(folder: Path, wheels: Path | None) -> None:
    """Our packages from the checkout, and what was carried along: processes that are started get the same."""
    places = [REPO / "operator", REPO / "trainer_image", REPO]
    if wheels is not None:
        site = folder / "site-packages"
        found = sorted(wheels.glob("*.whl"))
        if not found:
            raise SystemExit(f"--wheels {wheels}: there are no wheels in it")
        for wheel in found:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        places.append(site)
    sys.path[:0] = [str(place) for place in places]
    importlib.invalidate_caches()


def _write(out: Path, document: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")


def _end(out: Path, document: dict[str, Any], code: int) -> int:
    _write(out, document)
    print(f"{document['verdict']}; all of it is in {out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
