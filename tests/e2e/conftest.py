"""A local Kubernetes with real kubelets, the operator installed in it from its chart, and claims with a tiny model."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api import names
from tests.cluster import helm, images, loader
from tests.cluster.__main__ import cluster as any_cluster
from tests.cluster.kind import KindCluster
from tests.cluster.local import LocalCluster
from tests.cluster.shell import REPO, CommandFailed
from tests.serving.engine import make_base

COLOURS = REPO / "examples" / "data" / "colours.jsonl"


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster | KindCluster]:
    """Brought up when it is not; then also taken down again."""
    target = any_cluster()
    ours = not target.is_up()
    target.up(load=images.both())
    helm.install(target.kubeconfig)
    yield target
    if ours:
        target.down()


class User:
    """A user with kubectl, in a namespace."""

    def __init__(self, cluster: LocalCluster | KindCluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace

    def kubectl(self, *words: str, input: str | None = None, check: bool = True) -> str:
        return self.cluster.kubectl("-n", self.namespace, *words, input=input, check=check)

    def apply(self, *documents: dict[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(documents))

    def job(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.kubectl("get", "finetunejob", name, "-o", "json"))
        return found

    def status(self, name: str) -> dict[str, Any]:
        return dict(self.job(name).get("status") or {})

    def pods(self, job: str) -> list[dict[str, Any]]:
        return list(json.loads(self.kubectl("get", "pods", "-l", f"{names.LABEL_JOB}={job}", "-o", "json"))["items"])

    def until(self, what: str, check: Callable[[], Any], seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(CommandFailed, KeyError):
                if value := check():
                    return value
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds:.0f} s: {what}\n{self.story()}")
            time.sleep(0.5)

    def ended(self, name: str, seconds: float = 300) -> dict[str, Any]:
        """The status once the job has ended."""
        self.until(f"{name} ends", lambda: self.status(name).get("phase") in ("Succeeded", "Failed"), seconds)
        return self.status(name)

    def story(self) -> str:
        """What a user would look at when something is wrong."""
        parts = [self.kubectl("get", "finetunejobs,pods,pvc", "-o", "wide", check=False)]
        parts.append(self.kubectl("get", "events", "--sort-by=.metadata.creationTimestamp", check=False)[-6000:])
        for pod in self.kubectl("get", "pods", "-l", names.LABEL_JOB, "-o", "name").split():
            parts.append(f"--- {pod}\n" + self.kubectl("logs", pod, "--tail=25", check=False))
        return "\n".join(parts)


@pytest.fixture(scope="session")
def prepared(cluster: LocalCluster | KindCluster, tiny_model: Path) -> Iterator[User]:
    """A namespace with the claims of the examples, the tiny model in one of them."""
    name = f"e2e-{uuid.uuid4().hex[:6]}"
    user = User(cluster, name)
    cluster.kubectl("create", "namespace", name)
    user.kubectl("apply", "-f", str(REPO / "examples" / "volumes.yaml"))
    user.kubectl("create", "configmap", "colours", f"--from-file={COLOURS}")
    loader.put(user.cluster, name, "models", tiny_model)
    yield user
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def served_base(prepared: User, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a base that vLLM's kernels for CPUs can serve."""
    folder = tmp_path_factory.mktemp("bases") / "served"
    make_base(folder, tiny_model)
    loader.put(prepared.cluster, prepared.namespace, "models", folder)
    return f"pvc://models/{folder.name}"


@pytest.fixture
def user(prepared: User, request: pytest.FixtureRequest) -> Iterator[User]:
    yield prepared
    if request.node.stash.get(FAILED, False):
        print(prepared.story())
    prepared.kubectl("delete", "finetunejobs", "--all", "--wait=false", check=False)  # no test takes another's name


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report
