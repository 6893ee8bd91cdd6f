"""An operator that dies after every single write between a job's publishing and its version's record at the storage."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web
from kubernetes.aio import client as aio_client
from kubernetes.aio import config as aio_config

from finetune_api import names
from finetune_api.contract import CatalogFile, ModelStorage
from finetune_api.versions import VersionState
from finetune_operator.cache.progress import ProgressBoard
from finetune_operator.cache.store import Store
from finetune_operator.cluster.transport import KubernetesCluster
from finetune_operator.controllers.manager import Manager
from finetune_operator.servers.catalog import CatalogServer
from finetune_operator.settings import Settings
from tests.cluster.control_plane import free_port
from tests.component.conftest import Api, Kubelet, until
from tests.component.models import STORAGE, Models, Storage, publishing
from tests.component.test_crash import Mortal


async def _live(api: Api, life: int | None, name: str, port: int, number: int) -> int:
    """Run an operator that takes reports until it dies, or job and model rest. Returns the number of its writes."""
    configuration = aio_client.Configuration()
    await aio_config.load_kube_config(str(api.cluster.kubeconfig), client_configuration=configuration)
    cluster = Mortal(KubernetesCluster(aio_client.ApiClient(configuration)), life)
    settings = Settings(
        progress_url=f"http://127.0.0.1:{port}",
        watch_namespaces=(api.namespace,),
        resync_seconds=0.1,
        status_interval_seconds=0.0,
        backoff_base_seconds=0.1,
        workers=2,
    )
    store = Store()
    manager = Manager(cluster, store, ProgressBoard(), settings)  # type: ignore[arg-type]
    app = web.Application()
    app.add_routes(CatalogServer(cluster, store, manager.catalogs, manager.wake, lambda: manager.acting).routes())  # type: ignore[arg-type]
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
    task = asyncio.create_task(manager.run())
    try:
        for _ in range(1200):
            await asyncio.sleep(0.05)
            job, model = store.job((api.namespace, name)), store.models.get((api.namespace, "bot"))
            ended = job is not None and (job.get("status") or {}).get("phase") in ("Succeeded", "Failed")
            if cluster.dead.is_set() or task.done() or (ended and model is not None and _rests(model, number)):
                break
        else:
            raise AssertionError(f"no end: {store.job((api.namespace, name))}, {store.models.get((api.namespace, 'bot'))}")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await runner.cleanup()
        await cluster._real.close()
    return cluster.written


def _rests(model: dict[str, Any], number: int) -> bool:
    """Whether the version is the champion, alone, and the storage says so."""
    status = model.get("status") or {}
    states: dict[int, VersionState] = {number: "Champion"}
    wanted = CatalogFile(name="bot", namespace="", uid="", storage=ModelStorage(storage=STORAGE), states=states).digest
    return [v["number"] for v in status.get("versions") or []] == [number] and status["storage"].get("written") == wanted


async def test_killed_after_every_single_write(api: Api, kubelet: Kubelet) -> None:
    """From the end of publishing on, each operator makes one write and dies: the version is the champion, and what it replaced is gone."""
    models, storage = Models(api), Storage(api)
    models.create(promotion="Always", retention={"versions": 1})
    port, publishes = free_port(), lambda pod: pod.metadata.labels[names.LABEL_STAGE] == "publish"
    kubelet.override = lambda pod: None if kubelet.hold and publishes(pod) else storage(pod)
    for number in (1, 2):
        name, storage.verdicts, kubelet.hold = f"job-{number}", ["Passed"], {"publish"}
        api.create_job(publishing(), name=name)
        calm = asyncio.create_task(_live(api, None, name, port, number))
        await asyncio.to_thread(until, "it publishes", lambda name=name: api.status(name).get("phase") == "Publishing", 60)
        calm.cancel()
        await asyncio.gather(calm, return_exceptions=True)
        kubelet.hold, lives = set(), 0
        while await _live(api, 1, name, port, number):
            lives += 1
            assert lives < 50, "it comes to no rest"
        assert models.states() == {number: "Champion"} and api.status(name)["phase"] == "Succeeded"
        assert {n: r.state for n, r in storage.records.items() if not r.removed_at} == {number: "Champion"}
        assert lives >= 4, "published, added, its job told, the storage in line"
