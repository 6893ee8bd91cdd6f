"""What the local cluster and the environments are made from: pins, machine checks, images' inputs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import binaries, environment, machine, processes
from tests.cluster.shell import REPO, run

GOOD: dict[str, Any] = {
    "root": True, "machine": "x86_64", "namespaces": True, "free": 60.0, "need": 29.0, "cache": Path("/c"), "environment": {}, "kind": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"root": False}, "needs root"),
        ({"root": False, "namespaces": False, "kind": True}, None),
        ({"namespaces": False}, "network namespaces cannot be made here"),
        ({"machine": "aarch64"}, "made for x86_64, this is aarch64"),
        ({"free": 12.3}, "29 GB of disk are needed for /c, 12 GB are free"),
        ({"free": 12.3, "kind": True}, "FINETUNE_CACHE"),
        ({"environment": {"HTTPS_PROXY": "http://proxy:3128"}}, "export NO_PROXY=localhost,127.0.0.1,172.30.0.1"),
        ({"environment": {"https_proxy": "http://proxy:3128", "no_proxy": "localhost"}}, "export NO_PROXY=localhost,127.0.0.1,172.30.0.1"),
        ({"environment": {"HTTP_PROXY": "http://p", "NO_PROXY": "localhost,127.0.0.1,172.30.0.1"}}, None),
        ({"environment": {"HTTP_PROXY": "http://p", "NO_PROXY": "*"}}, None),
    ],
)
def test_what_a_machine_lacks_is_one_line(change: dict[str, Any], says: str | None) -> None:
    found = machine.problem(**{**GOOD, **change})
    assert found is None if says is None else found is not None and says in found and "\n" not in found


def test_disk_is_asked_for_what_is_not_cached(tmp_path: Path) -> None:
    everything = machine.needed(tmp_path)
    (tmp_path / "node-images").mkdir()
    (tmp_path / "python-trainer.lock").touch()
    (tmp_path / "kubernetes-1.37-0123456789ab.partial").mkdir()
    assert everything == sum(machine.GIGABYTES.values())
    assert machine.needed(tmp_path) == everything - machine.GIGABYTES["node-images"]
    assert all(name.startswith("python-") or name == "node-images" or (binaries.MODULES / name).is_dir() for name in machine.GIGABYTES)


@pytest.mark.parametrize("lock", environment.LOCKS.values(), ids=environment.LOCKS)
def test_locks_are_whole_and_have_hashes(lock: Path) -> None:
    pins = environment.pins(lock)
    assert pins and all("--hash=sha256:" in pin for pin in pins)
    if any(environment.name_of(pin) == "torch" for pin in pins):
        assert any(environment.name_of(pin).startswith("nvidia-cudnn") for pin in pins), "torch from PyPI cannot be imported without"


def test_smaller_locks_are_parts_of_the_tests_lock() -> None:
    whole = {pin.split(" ")[0] for pin in environment.pins(environment.LOCKS["dev"])}
    for name in ("trainer", "operator"):
        assert {pin.split(" ")[0] for pin in environment.pins(environment.LOCKS[name])} <= whole, name


def test_an_index_of_cpu_builds_spares_nvidias_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []
    monkeypatch.setenv("FINETUNE_TORCH_INDEX", "https://index.example/cpu")
    monkeypatch.setattr(environment, "_uv", lambda target, words: calls.append(words))
    environment._install(tmp_path / "site-packages", environment.pins(environment.LOCKS["trainer"]))
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+\+cpu", calls[0][-1]) and "https://index.example/cpu" in calls[0]
    left = (tmp_path / "requirements.txt").read_text()
    assert not re.search(r"^(torch|triton|nvidia-|cuda-)", left, re.M) and "transformers==" in left and "--require-hashes" in calls[1]


def test_versions_are_written_in_one_place() -> None:
    """The module files; nothing else in the harness names a version of Kubernetes, and the oldest is older."""
    numbers = {name: binaries.version(name) for name in (binaries.OLDEST, binaries.NEWEST, *binaries.RUNTIME, "kueue")}
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", number) for number in numbers.values()), numbers
    for name in (binaries.OLDEST, binaries.NEWEST):
        assert numbers[name].startswith(f"v{name.removeprefix('kubernetes-')}.")
        staging = set(re.findall(r"=> k8s\.io/\S+ (v\S+)", (binaries.MODULES / name / "go.mod").read_text()))
        assert staging == {f"v0.{numbers[name].removeprefix('v1.')}"}, "the staging modules are of the same release"
        assert (binaries.MODULES / name / "go.sum").stat().st_size > 10_000
    written = [path.name for path in (REPO / "tests" / "cluster").glob("*.py") for number in numbers.values() if number in path.read_text()]
    assert not [name for name in written if name != "binaries.py"]


def test_the_build_context_is_what_the_dockerfiles_copy() -> None:
    """Nothing else can get into an image, and nothing that is copied is left out."""
    allowed = {line[1:] for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for place in ("operator", "trainer_image"):
        text = (REPO / place / "Dockerfile").read_text()
        copied |= {word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M) for word in line.split()[:-1]}
        assert "ARG BASE_IMAGE=debian:trixie-slim" in text
    assert copied == allowed, json.dumps([sorted(copied), sorted(allowed)])


def test_what_a_dead_runtime_leaves_is_found_by_its_network(tmp_path: Path) -> None:
    """A container outlives its shim, and carries no mark of the cluster."""
    network = Path("/run/netns/finetune-test")
    run(["ip", "netns", "add", network.name])
    try:
        left = subprocess.Popen(["nsenter", f"--net={network}", "sh", "-c", "trap '' TERM; sleep 600; sleep 600"])
        elsewhere = tmp_path / "cni-none"
        elsewhere.touch()  # where a namespace was mounted once
        while not processes.in_networks([network]):
            time.sleep(0.05)
        assert left.pid in processes.in_networks([network, elsewhere, tmp_path / "missing"])
        assert processes.in_networks([elsewhere, tmp_path / "missing"]) == []
        processes.end(lambda: processes.in_networks([network]), grace=0.5)
        assert left.wait(5) == -signal.SIGKILL
    finally:
        run(["ip", "netns", "delete", network.name])
