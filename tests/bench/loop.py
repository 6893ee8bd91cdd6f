"""How long the operator's event loop stands at ten thousand jobs: the longest wait of a heartbeat while the admission loop goes.

Beside it, in the same run, the same with everything done on the loop itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any
from unittest import mock

from finetune_operator.__main__ import share_the_processor, spare_the_collector
from finetune_operator.cache.assumptions import Assumptions
from finetune_operator.cache.store import Store
from finetune_operator.controllers import admission
from finetune_operator.controllers.admission import AdmissionLoop
from finetune_operator.settings import Settings
from tests.factory import MINIMAL, NOW, job, merged, stamp
from tests.listing import InMemory

GPU = "nvidia.com/gpu"
_BEAT = 0.002


class Cluster(InMemory):
    """An API server with some queues, nodes and a few thousand pods of others; it takes every status."""

    def __init__(self, nodes: int, queues: int) -> None:
        flavor = {"name": "any", "resourceName": GPU, "nominalQuota": max(8, nodes * 8 // queues)}
        status = {
            "conditions": [{"type": "Ready", "status": "True"}],
            "allocatable": {GPU: "8", "cpu": "128", "memory": "1Ti", "pods": "110"},
        }
        self.objects: dict[str, list[dict[str, Any]]] = {
            "FineTuneQueue": [
                {"kind": "FineTuneQueue", "metadata": {"name": f"q{n}"}, "spec": {"flavors": [flavor]}} for n in range(queues)
            ],
            "Namespace": [{"metadata": {"name": "team-a"}}],
            "Node": [{"metadata": {"name": f"n{n}", "labels": {"zone": f"z{n % 3}"}}, "status": status} for n in range(nodes)],
            "Pod": [
                {
                    "metadata": {"name": f"p{n}", "namespace": "other", "uid": f"p{n}"},
                    "spec": {"nodeName": f"n{n % nodes}", "containers": [{"resources": {"requests": {"cpu": "1"}}}]},
                }
                for n in range(4 * nodes)
            ],
        }

    async def list(self, kind: str, *_: str) -> AsyncIterator[dict[str, Any]]:
        for number, raw in enumerate(self.objects.get(kind, [])):
            if number % 500 == 499:
                await asyncio.sleep(0)  # a page
            yield raw

    async def replace_status(self, raw: dict[str, Any], *, urgent: bool = True) -> dict[str, Any]:
        return raw

    def now(self) -> datetime:
        return NOW


def jobs(count: int, queues: int) -> Store:
    """So many jobs that wait, in turn in each queue."""
    store = Store()
    for n in range(count):
        spec = merged(MINIMAL, distribution={"gpusPerNode": 1 + n % 8}, scheduling={"queue": f"q{n % queues}"})
        conditions = [{"type": "DataReady", "status": "True"}, {"type": "Admitted", "status": "False"}]
        status = {"observedGeneration": 1, "queue": {"since": stamp(NOW)}, "conditions": conditions}
        store.put_job(job(spec, status, name=f"job-{n:05}", uid=f"uid-{n:05}", resourceVersion=str(n + 1)))
    return store


async def stretches(count: int, nodes: int, queues: int, passes: int = 3) -> dict[str, float]:
    """Seconds: the longest waits of a heartbeat during some passes over all jobs, and how long a pass takes."""
    store = jobs(count, queues)
    loop = AdmissionLoop(Cluster(nodes, queues), store, Assumptions(), Settings(), lambda key: None)  # type: ignore[arg-type]
    gc.collect()
    gc.freeze()  # as the operator does once it is in sync
    late: list[float] = []

    async def beat() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(_BEAT)
            late.append(time.perf_counter() - began - _BEAT)

    watch = asyncio.create_task(loop.watch.run())
    await asyncio.sleep(0)
    heart = asyncio.create_task(beat())
    await asyncio.sleep(0.05)
    took = []
    for _ in range(passes):
        began = time.perf_counter()
        await loop.once()
        took.append(time.perf_counter() - began)
        for key in store.job_keys()[:500]:
            store.touch(store.job(key)["metadata"]["uid"])  # type: ignore[index]
    heart.cancel()
    watch.cancel()
    late.sort()
    return {
        "longest": round(late[-1], 3),
        "tenth": round(late[-10], 3),
        "median": round(statistics.median(late), 4),
        "pass": round(max(took), 2),
    }


async def _on_the_loop(decide: Any, *args: Any) -> Any:
    return decide(*args)


def bench(count: int = 10_000, nodes: int = 1000, queues: int = 20) -> dict[str, Any]:
    """As it is, and with the decision made on the loop."""
    spare_the_collector()
    share_the_processor()
    found = {"jobs": count, "nodes": nodes, "now": asyncio.run(stretches(count, nodes, queues))}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(admission.asyncio, "to_thread", _on_the_loop))
        found["on the loop"] = asyncio.run(stretches(count, nodes, queues))
    return found


if __name__ == "__main__":
    print(json.dumps(bench(*map(int, sys.argv[1:])), indent=1))
