"""The GPU check where there is no GPU: its arithmetic, what it says, and how it ends."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import __main__ as command
from tests.gpu import carry, figures, machine
from tests.gpu.machine import Machine


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla T4", 65),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("Something New", None),
    ],
)
def test_peaks(name: str, tflops: float | None) -> None:
    assert figures.peak_tflops(name) == tflops


def test_speed_leaves_the_warm_up_out() -> None:
    slow = [{"seconds": 10.0 * n, "tokens": 100 * n} for n in (1, 2, 3)]
    steady = [{"seconds": 30 + n, "tokens": 300 + 100 * n} for n in (1, 2, 3, 4)]
    assert figures.tokens_per_second([*slow, *steady]) == 100
    assert figures.tokens_per_second(slow) is None


def test_operations_and_utilisation() -> None:
    model = {
        "hidden_size": 1000, "num_attention_heads": 10, "num_hidden_layers": 10, "parameters": 1_100_000_000, "lookup": 100_000_000,
    }  # fmt: skip
    attention = 6 * 10 * 1000 * 500
    assert figures.flops_per_token(model, 1_000_000_000, 500) == 6e9 + attention
    assert figures.flops_per_token(model, 0, 0) == 4e9
    assert figures.flops_per_token({**model, "head_dim": 200}, 0, 500) == 4e9 + 2 * attention
    assert figures.utilisation(50_000, 6e9, 1, 1000) == pytest.approx(0.3)
    assert figures.utilisation(50_000, 6e9, 2, 1000) == pytest.approx(0.15)
    assert figures.utilisation(None, 6e9, 1, 1000) is None and figures.utilisation(1, 6e9, 0, None) is None


def rank(number: int, uuid: str) -> dict[str, Any]:
    return {
        "rank": number,
        "host": "node",
        "uuid": uuid,
        "name": "NVIDIA H100",
        "total": 80 << 30,
        "allocated": 8 << 30,
        "reserved": 9 << 30,
    }


def run(**changed: Any) -> dict[str, Any]:
    good = {
        "phase": "Succeeded", "message": "done", "dense": False, "losses": [11.9, 10.0], "ranks": [rank(0, "a"), rank(1, "b")],
        "kernels": "varlen attention, Liger kernels", "estimated": 11 << 30, "measured": 10 << 30, "tokens_per_second": 1000.0,
        "trl": {"tokens_per_second": 800.0, "attention": "sdpa"},
    }  # fmt: skip
    return {**good, **changed}


def verdicts(found: dict[str, Any], **given: Any) -> dict[str, bool | None]:
    options = {"gpus": 2, "half": True, "liger": True, **given}
    return {check.what: check.ok for check in figures.check_run("lora", found, **options)}


def test_a_good_run_passes() -> None:
    found = verdicts(run())
    assert len(found) == 6 and all(ok is True for ok in found.values())


@pytest.mark.parametrize(
    ("what", "changed", "given"),
    [
        ("all stages succeed", {"phase": "Failed"}, {}),
        ("the loss falls", {"losses": [10.0, 11.0]}, {}),
        ("the loss falls", {"losses": [10.0, float("nan")]}, {}),
        ("each rank has its own GPU", {"ranks": [rank(0, "a"), rank(1, "a")]}, {}),
        ("each rank has its own GPU", {"ranks": [rank(0, "a")]}, {}),
        ("each rank has its own GPU", {"ranks": []}, {}),  # it trained on the CPU
        ("padding-free attention and Liger", {"kernels": "sdpa attention, Liger kernels"}, {}),
        ("padding-free attention and Liger", {"kernels": "varlen attention"}, {}),
        ("estimated against measured memory", {"estimated": 8 << 30}, {}),
        ("estimated against measured memory", {"estimated": 30 << 30}, {}),
        ("tokens per second beside trl sft", {"tokens_per_second": 500.0}, {}),
    ],
)
def test_what_does_not_hold_is_said(what: str, changed: dict[str, Any], given: dict[str, Any]) -> None:
    assert verdicts(run(**changed), **given)[what] is False


def test_what_could_not_be_looked_at_is_no_pass() -> None:
    here = verdicts(run(ranks=[], measured=None, kernels="sdpa attention"), gpus=0)
    assert here["all stages succeed"] is True and here["the loss falls"] is True
    assert [ok for what, ok in here.items() if what not in ("all stages succeed", "the loss falls")] == [None] * 4
    assert verdicts(run(trl=None))["tokens per second beside trl sft"] is None
    assert verdicts(run(trl={"error": "no"}))["tokens per second beside trl sft"] is None
    assert verdicts(run(kernels="sdpa attention"), half=False)["padding-free attention and Liger"] is None
    assert verdicts(run(kernels="varlen attention"), liger=False)["padding-free attention and Liger"] is True


def test_losses_of_a_dense_mask() -> None:
    assert figures.check_same_losses("lora", [10.0, 9.0], [10.1, 9.1]).ok
    assert not figures.check_same_losses("lora", [10.0, 9.0], [10.0, 8.0]).ok
    assert not figures.check_same_losses("lora", [], []).ok


def test_the_table() -> None:
    text = figures.table({"lora": run(mfu=0.41), "full": {"phase": "Failed", "message": "out of memory"}})
    head, lora, full = text.splitlines()
    assert "MFU" in head and "1,000" in lora and "41.0%" in lora and "10.0" in lora and "11.90 -> 10.00" in lora
    assert full.split() == ["full", "Failed", *["-"] * 8]


def bare(**changed: Any) -> Machine:
    return Machine(**{"python": "3.12.3", "versions": {"torch": "2.13.0"}, "missing": [], "optional_missing": [], "devices": 0, **changed})


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu.json").read_text())  # type: ignore[no-any-return]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "look", bare)
    assert command.main(["--out", str(tmp_path / "gpu.json")]) == 0
    words = capsys.readouterr().out
    assert "no NVIDIA GPU here: nothing was run" in words and all(line in words for line in command.UNCHECKED)
    assert document(tmp_path)["verdict"] == "no GPU" and document(tmp_path)["not_checked"] == list(command.UNCHECKED)


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ({"missing": ["trl", "duckdb"]}, "missing: trl, duckdb; install them, or fetch them with `python3 -m tests.gpu.carry"),
        ({}, "1 GPU(s) are here, but torch 2.13.0 sees none: it is a build for CPUs"),
        ({"cuda_build": "13.0"}, "sees none: it is built for CUDA 13.0; look at nvidia-smi"),
    ],
)
def test_an_environment_that_lacks_something(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], here: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(command, "look", lambda: bare(devices=1, **here))
    assert command.main(["--out", str(tmp_path / "gpu.json")]) == 2
    assert said in capsys.readouterr().out and document(tmp_path)["verdict"] == "environment"


def test_a_missing_package_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "REQUIRED", {"no-such-distribution": "no_such"})
    monkeypatch.setattr(machine, "_PROBE", 'print(\'{"build": null, "gpus": []}\')')
    found = machine.look()
    assert found.missing == ["no-such-distribution"] and found.gpus == []


def test_wheels_come_from_the_lock_and_are_pruned(tmp_path: Path) -> None:
    lock = "trl==1.16.0 \\\n    --hash=sha256:00\nDuckDB==2.0.0 ; python_version >= '3'\n"
    assert carry.locked(["trl", "duckdb"], lock) == ["trl==1.16.0", "duckdb==2.0.0"]
    assert carry.locked(list(carry.NAMES), carry.LOCK.read_text())
    wheel = tmp_path / "bitsandbytes-1.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for kind in ("cpu", "cuda118", "cuda130", "rocm70"):
            archive.writestr(f"bitsandbytes/libbitsandbytes_{kind}.so", "x")
        archive.writestr("bitsandbytes/__init__.py", "")
    carry.prune(wheel, "130")
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(archive.namelist()) == [
            "bitsandbytes/__init__.py", "bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/libbitsandbytes_cuda130.so",
        ]  # fmt: skip


def test_wheels_are_put_beside_what_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with pytest.raises(SystemExit, match="no wheels"):
        command._add_paths(tmp_path, wheels)
    with zipfile.ZipFile(wheels / "brought-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("brought_along.py", "VALUE = 7")
    path: list[str] = []
    monkeypatch.setattr(command.sys, "path", path)
    command._add_paths(tmp_path, wheels)
    assert (tmp_path / "site-packages" / "brought_along.py").exists() and path[-1] == str(tmp_path / "site-packages")
