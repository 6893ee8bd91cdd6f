"""`python -m finetune_gateway`: start-up, watches, servers; runs inside a cluster and outside alike."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from typing import Any

import uvloop

from finetune_api.api_keys import KEYS_SECRET
from finetune_api.endpoint import ENDPOINT_KIND
from finetune_operator import logs
from finetune_operator.cluster.connect import connect
from finetune_operator.cluster.reflector import OfNamespace, Reflector
from finetune_operator.cluster.transport import KubernetesCluster

from .catalog import read_endpoint
from .gateway import Gateway
from .keys import read_keys
from .settings import Settings, from_environment


class Watches:
    """What is seen of the cluster: endpoints, and the Secret of the keys."""

    def __init__(self, cluster: KubernetesCluster, settings: Settings) -> None:
        self._cluster, self._settings = cluster, settings
        self.reflectors: list[Reflector[Any]] = []
        self.ends = False
        """It is not ready any more: no new requests come, and those that run have their time."""

    def fill(self, gateway: Gateway) -> None:
        """From now on, what is seen goes there."""
        for namespace in self._settings.watch_namespaces or ("",):
            sink = OfNamespace(gateway.catalog, namespace)
            self.reflectors.append(Reflector(self._cluster, ENDPOINT_KIND, read_endpoint, sink, namespace=namespace))
            if gateway.tuning is not None:
                self.reflectors.append(gateway.tuning.watch(self._cluster, namespace))
        only = f"metadata.name={KEYS_SECRET}"
        of_keys = Reflector(self._cluster, "Secret", read_keys, gateway.keys, namespace=self._settings.namespace, field_selector=only)
        self.reflectors.append(of_keys)

    def not_ready(self) -> str:
        """What is not known yet, or may not be looked at; empty when all is."""
        if self.ends:
            return "it ends"
        late = sorted({watch.kind for watch in self.reflectors if not watch.synced.is_set()})
        refused = [f"{watch.kind}: {watch.why}" for watch in self.reflectors if watch.state in ("not allowed", "not served")]
        return f"not listed yet: {', '.join(late)}" if late else "; ".join(refused)


async def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT; raises when any part of it ends before."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    cluster = await connect()
    watches = Watches(cluster, settings)
    try:
        gateway = Gateway(settings, cluster, watches.not_ready, cluster)
    except ValueError as mistake:
        await cluster.close()
        sys.exit(f"finetune-gateway: {mistake}")
    watches.fill(gateway)
    servers = gateway.servers()
    tasks: list[asyncio.Task[Any]] = [
        asyncio.create_task(stop.wait(), name="stop"),
        asyncio.create_task(gateway.tidy(), name="tidy"),
        *([asyncio.create_task(gateway.store.run(), name="store")] if gateway.store is not None else []),
        *([asyncio.create_task(gateway.tuning.run(), name="history")] if gateway.tuning is not None else []),
        *(asyncio.create_task(watch.run(), name=watch.kind) for watch in watches.reflectors),
    ]
    serving: list[asyncio.Task[Any]] = [asyncio.create_task(server.serve(), name=f"port {server.config.port}") for server in servers]
    try:
        await asyncio.wait([*tasks, *serving], return_when=asyncio.FIRST_COMPLETED)
        watches.ends = True
        if stop.is_set():
            await asyncio.sleep(settings.leave_seconds)  # until no Service sends anybody here
        for server in servers:
            server.should_exit = True
        await asyncio.wait(serving)
        for task in (*tasks, *serving):
            if task.done() and not task.cancelled() and (failure := task.exception()) is not None:
                raise RuntimeError(f"{task.get_name()} ended: {failure}") from failure
    finally:
        for task in tasks:
            task.cancel()
        await gateway.close()
        await cluster.close()


def prepare() -> None:
    """Before the loop: modules stay, so that nobody needs to look at them again; uvicorn says nothing of every connection."""
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    gc.collect()
    gc.freeze()


def main() -> None:
    """Entry point."""
    try:
        logs.configure(os.environ.get("FINETUNE_LOG_LEVEL", "INFO"), os.environ.get("FINETUNE_LOG_FORMAT", "text"))
        settings = from_environment(os.environ)
    except ValueError as failure:
        sys.exit(f"finetune-gateway: {failure}")
    prepare()
    uvloop.run(run(settings))


if __name__ == "__main__":
    main()
