"""Faults around the operator, on a real API server. Numbers as in docs/faults.md; the test plays kubelet."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from pathlib import Path
from typing import Any

from kubernetes import client

from tests.cluster.local import LocalCluster
from tests.component.conftest import Api, Kubelet, Operator, until
from tests.factory import MINIMAL, merged

TWO = merged(MINIMAL, distribution={"nodes": 2, "gpusPerNode": 0})


def ends(api: Api, name: str = "support", seconds: float = 60) -> dict[str, Any]:
    until(f"{name} ends", lambda: api.status(name).get("phase") in ("Succeeded", "Failed"), seconds)
    return api.status(name)


def test_f3_the_api_server_goes_away_and_comes_back(api: Api, kubelet: Kubelet, operator: Operator, cluster: LocalCluster) -> None:
    kubelet.hold = {"train"}
    api.create_job(TWO)
    until("it trains", lambda: api.status().get("phase") == "Training")
    for _ in range(3):
        cluster.restart("kube-apiserver")
        time.sleep(1)
    kubelet.hold = set()
    status = ends(api)
    assert (status["phase"], status["attempt"]) == ("Succeeded", 0)
    if (
        operator.process is not None and operator.process.poll() is not None
    ):  # crash-only: a broken watch may end it; the Deployment starts it anew
        operator.start()


def test_f7_another_writer_of_the_same_object(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    """Every write of the operator meets another resourceVersion: it looks again, and what others wrote stays."""
    stop = threading.Event()

    def annotate() -> None:
        count = 0
        while not stop.wait(0.01):
            count += 1
            with contextlib.suppress(client.ApiException):
                api.patch_job({"metadata": {"annotations": {"theirs": str(count)}}})

    api.create_job(TWO)
    thread = threading.Thread(target=annotate, daemon=True)
    thread.start()
    try:
        status = ends(api, seconds=120)
    finally:
        stop.set()
        thread.join()
    assert (status["phase"], status["attempt"]) == ("Succeeded", 0)
    assert int(api.job()["metadata"]["annotations"]["theirs"]) > 10


def test_f15_half_of_a_gang_is_no_gang(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    """What has started is given back after gangTimeout, and all of it is tried again later."""

    def one_never_starts(pod: Any) -> dict[str, Any] | None:
        return {"phase": "Pending"} if pod.metadata.name.endswith("worker-1") else None

    kubelet.override, kubelet.hold = one_never_starts, {"train"}
    api.create_job({**TWO, "runPolicy": {"gangTimeout": "3s"}})
    until("it gives up", lambda: api.status().get("attempt", 0) >= 1)
    status = api.status()
    assert status["restarts"][0]["reason"] == "GangTimeout" and status["restarts"][0]["counted"] is False
    kubelet.override, kubelet.hold = None, set()
    status = ends(api)
    assert status["phase"] == "Succeeded" and status["restartsCounted"] == 0


def test_f23_a_namespace_is_deleted_and_the_operator_is_gone(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    """No finalizer of ours holds anything up, with the operator there or without."""
    kubelet.hold = {"train"}
    for name in ("one", "two"):
        api.create_job(TWO, name=name)
        until(f"{name} trains", lambda name=name: api.status(name).get("phase") == "Training")  # type: ignore[misc]
    api.delete_job("one")
    until("its pods are gone", lambda: not [p for p in api.pods() if p.metadata.name.startswith("one-")])
    operator.kill()
    api.delete_job("two")
    until("its pods are gone, too", lambda: not api.pods())
    until("nothing is left", lambda: not api.owned(), 60)


def test_f32_many_jobs_at_once_are_served_in_order(api: Api, operator: Operator) -> None:
    """Two hundred jobs: none is forgotten, the last is not starved by the first, and memory stays bounded."""
    operator.kill()
    operator.start(FINETUNE_WATCH_NAMESPACES=api.namespace)
    count = 200
    for n in range(count):
        api.create_job(MINIMAL, name=f"job-{n:03}")

    def started() -> list[Any]:
        return list(api.batch.list_namespaced_job(api.namespace).items)

    until("every job's prepare was started", lambda: len(started()) == count, 120)
    order = [j.metadata.name for j in sorted(started(), key=lambda j: (j.metadata.creation_timestamp, j.metadata.name))]
    places = {name: place for place, name in enumerate(order)}
    late = max(abs(places[f"job-{n:03}-prepare-0"] - n) for n in range(count))
    assert late < count / 2, "first come, first served, but for what works side by side"
    assert operator.process is not None
    resident = int(re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{operator.process.pid}/status").read_text())[0])
    assert resident < 400 * 1024, f"{resident} KiB"
