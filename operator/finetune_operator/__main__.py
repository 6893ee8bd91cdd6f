"""`python -m finetune_operator`: start-up, servers, kopf; runs inside a cluster and outside alike."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Awaitable, Callable

import kopf
import uvloop
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from . import certificate, handlers, logs, metrics, tracing
from .certificate import Certificate, Identity
from .cluster.client import KubernetesCluster, connect
from .cluster.lease import Lease
from .cluster.store import Store
from .controller import Controller
from .progress.board import ProgressBoard
from .progress.server import ProgressServer
from .settings import Settings, from_environment
from .webhooks import AdmissionServer, Bundle

log = logging.getLogger("finetune")


async def _serve(app: web.Application, port: int, **kwargs: object) -> web.AppRunner:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port, **kwargs).start()  # type: ignore[arg-type]
    return runner


def _probes(controller: Controller, cluster: KubernetesCluster, settings: Settings) -> web.Application:
    async def healthz(_: web.Request) -> web.Response:
        silent = time.monotonic() - controller.last_resync
        if controller.synced.is_set() and silent > 4 * settings.resync_seconds:
            return web.Response(status=503, text=f"no resync for {silent:.0f} s")
        return web.Response(text="ok")

    async def readyz(_: web.Request) -> web.Response:
        ready = controller.synced.is_set()
        return web.Response(status=200 if ready else 503, text="ok" if ready else "not in sync yet")

    async def scrape(_: web.Request) -> web.Response:
        for (verb, kind), count in cluster.calls.items():
            metrics.API_REQUESTS.labels(verb=verb, kind=kind).set(count)
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", scrape)
    return app


def _trust(controller: Controller, cluster: KubernetesCluster, settings: Settings) -> Callable[[Certificate], Awaitable[None]]:
    """What must know a certificate before it is served: the API server, and the pods that report progress."""
    bundle = Bundle(cluster, settings.webhook_configuration) if settings.webhook_configuration else None

    async def look(new: Certificate) -> None:
        if bundle is not None:
            await bundle.put(new.authorities)
        controller.trust(new.authorities)

    return look


async def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Ends with an exception when any part of it ends: crash-only."""
    cluster = await connect(settings.api_qps, settings.api_burst)
    identity = Identity(cluster, settings, await certificate.ensure(cluster, settings))
    settings = dataclasses.replace(settings, ca_bundle=identity.certificate.authorities)
    store, board = Store(), ProgressBoard()
    holder = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    tracing.configure(settings.tracing_endpoint, holder)
    lease = Lease(cluster, settings.namespace, settings.lease, holder, seconds=settings.lease_seconds) if settings.lease else None
    controller = Controller(cluster, store, board, settings, lease)
    server = ProgressServer(cluster, store, board, controller.queue.add, lambda: controller.acting)
    endpoints = server.application()
    lookups = await connect(settings.api_qps, settings.api_burst)  # who applies a job does not wait behind a thousand of them
    endpoints.add_routes(AdmissionServer(lookups, settings).routes())
    runners = [
        await _serve(_probes(controller, cluster, settings), settings.probe_port),
        await _serve(endpoints, settings.progress_port, ssl_context=identity.context),
    ]
    registry = kopf.OperatorRegistry()
    handlers.register(registry, controller, settings)
    stop = asyncio.Event()
    watches = kopf.operator(
        registry=registry,
        settings=handlers.kopf_settings(),
        standalone=True,
        clusterwide=not settings.watch_namespaces,
        namespaces=settings.watch_namespaces,
        stop_flag=stop,
    )
    tasks = [
        asyncio.create_task(watches, name="kopf"),
        asyncio.create_task(controller.run(), name="controller"),
        asyncio.create_task(identity.keep(_trust(controller, cluster, settings)), name="certificate"),
    ]
    # kopf handles SIGTERM and SIGINT: it ends without an error, and takes younger tasks with it
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    failed = [(task.get_name(), error) for task in done if not task.cancelled() and (error := task.exception()) is not None]
    stop.set()
    for task in tasks[1:]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if lease is not None:
        await lease.release()  # nothing acts any more
    for runner in runners:
        await runner.cleanup()
    await cluster.close()
    await lookups.close()
    for name, error in failed:
        raise RuntimeError(f"{name} ended: {error}") from error


def spare_the_collector() -> None:
    """What is remembered of ten thousand jobs is walked through by Python's cyclic collector again and again: a quarter of the time.

    Nearly all garbage goes by reference counts; the youngest generation is looked at every 20,000 objects instead of 700.
    """
    gc.set_threshold(20_000, 20, 50)


def main() -> None:
    """Entry point."""
    spare_the_collector()
    try:
        logs.configure(os.environ.get("FINETUNE_LOG_LEVEL", "INFO"), os.environ.get("FINETUNE_LOG_FORMAT", "text"))
        settings = from_environment(os.environ)
    except ValueError as failure:
        sys.exit(f"finetune-operator: {failure}")
    uvloop.run(run(settings))  # a twelfth less work per job than asyncio's own loop, of which most goes into TLS and HTTP


if __name__ == "__main__":
    main()
