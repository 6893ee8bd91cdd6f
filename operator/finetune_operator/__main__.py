"""`python -m finetune_operator`: start-up, servers, kopf; runs inside a cluster and outside alike."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Awaitable, Callable

import kopf
import uvloop
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from . import handlers, logs, metrics, tracing
from .cache.progress import ProgressBoard
from .cache.store import Store
from .cluster.connect import connect
from .cluster.kinds import Kinds, StartOver
from .cluster.lease import Lease
from .cluster.seal_key import ensure_seal_key
from .cluster.transport import KubernetesCluster
from .controllers.manager import Manager
from .handlers import Insights
from .servers import certificate
from .servers.bundle import Bundle
from .servers.certificate import Certificate, Identity
from .servers.progress import ProgressServer
from .servers.webhooks import AdmissionServer
from .settings import Settings, from_environment

log = logging.getLogger("finetune")


async def _serve(app: web.Application, port: int, **kwargs: object) -> web.AppRunner:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port, **kwargs).start()  # type: ignore[arg-type]
    return runner


def _probes(manager: Manager, cluster: KubernetesCluster, settings: Settings, kinds: Kinds, insights: Insights) -> web.Application:
    def not_ready() -> str:
        if kinds.missing:
            return f"the API server does not serve {', '.join(kinds.missing)}: install the CustomResourceDefinitions"
        if not manager.synced.is_set():
            return "not in sync yet"
        unwatched = set(kinds.watched) - handlers.watching(insights, kinds)
        return f"not watched yet: {', '.join(sorted(r.plural for r in unwatched))}" if unwatched else ""

    async def healthz(_: web.Request) -> web.Response:
        silent = time.monotonic() - manager.resync.last
        if manager.synced.is_set() and silent > 4 * settings.resync_seconds:
            return web.Response(status=503, text=f"no resync for {silent:.0f} s")
        return web.Response(text="ok")

    async def readyz(_: web.Request) -> web.Response:
        why = not_ready()
        return web.Response(status=503 if why else 200, text=why or "ok")

    async def scrape(_: web.Request) -> web.Response:
        for (verb, kind), count in cluster.calls.items():
            metrics.API_REQUESTS.labels(verb=verb, kind=kind).set(count)
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", scrape)
    return app


def _trust(manager: Manager, cluster: KubernetesCluster, settings: Settings) -> Callable[[Certificate], Awaitable[None]]:
    """What must know a certificate before it is served: the API server, and the jobs' pods, which also get an administrator's authorities."""
    bundle = Bundle(cluster, settings.webhook_configuration) if settings.webhook_configuration else None

    async def look(new: Certificate) -> None:
        if bundle is not None:
            await bundle.put(new.authorities)
        own = manager.settings.authorities
        if settings.authorities_file:
            try:
                own = certificate.read_authorities(settings.authorities_file)
            except ValueError as failure:  # the ones before are kept
                log.warning("%s", failure)
        manager.trust(new.authorities, own)

    return look


async def _until_jobs_are_served(kinds: Kinds) -> bool:
    """Wait for the job's kind. False when the process is to end instead: kopf, which sees to signals, does not run yet."""
    waiting = asyncio.create_task(kinds.found())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, waiting.cancel)
    await asyncio.wait([waiting])
    if waiting.cancelled():
        return False
    waiting.result()
    return True


async def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Ends with an exception when any part of it ends: crash-only.

    Raises StartOver when a kind that it needs has come or gone.
    """
    cluster = await connect(settings.api_qps, settings.api_burst)
    identity = Identity(cluster, settings, await certificate.ensure(cluster, settings))
    settings = dataclasses.replace(settings, ca_bundle=identity.certificate.authorities, seal_key=await ensure_seal_key(cluster, settings))
    store, board = Store(), ProgressBoard()
    holder = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    tracing.configure(settings.tracing_endpoint, holder)
    lease = Lease(cluster, settings.namespace, settings.lease, holder, seconds=settings.lease_seconds) if settings.lease else None
    manager = Manager(cluster, store, board, settings, lease)
    kinds, insights = Kinds(cluster, settings), handlers.Insights()
    server = ProgressServer(cluster, store, board, manager.wake, lambda: manager.acting)
    endpoints = server.application()
    lookups = await connect(settings.api_qps, settings.api_burst)  # who applies a job does not wait behind a thousand of them
    endpoints.add_routes(AdmissionServer(lookups, settings).routes())
    runners = [
        await _serve(_probes(manager, cluster, settings, kinds, insights), settings.probe_port),
        await _serve(endpoints, settings.progress_port, ssl_context=identity.context),
    ]
    failed: list[tuple[str, BaseException]] = []
    try:
        if await _until_jobs_are_served(kinds):
            failed = await _work(settings, manager, identity, cluster, kinds, insights)
    finally:
        if lease is not None:
            await lease.release()  # nothing acts any more
        for runner in runners:
            await runner.cleanup()
        await cluster.close()
        await lookups.close()
    for name, error in failed:
        # a watch of what is not served any more ends with 404
        if isinstance(error, StartOver) or (name == "kopf" and getattr(error, "status", None) == 404):
            raise StartOver(str(error) if isinstance(error, StartOver) else f"a kind that is watched is gone: {error}") from error
        raise RuntimeError(f"{name} ended: {error}") from error


async def _work(
    settings: Settings, manager: Manager, identity: Identity, cluster: KubernetesCluster, kinds: Kinds, insights: Insights
) -> list[tuple[str, BaseException]]:
    """Watch and act until any part of it ends; the parts that failed."""
    registry = kopf.OperatorRegistry()
    handlers.register(registry, manager, settings, kinds)
    stop = asyncio.Event()
    watches = kopf.operator(
        registry=registry,
        settings=handlers.kopf_settings(),
        insights=insights,
        standalone=True,
        clusterwide=not settings.watch_namespaces,
        namespaces=settings.watch_namespaces,
        stop_flag=stop,
    )
    tasks = [
        asyncio.create_task(watches, name="kopf"),
        asyncio.create_task(manager.run(), name="manager"),
        asyncio.create_task(identity.keep(_trust(manager, cluster, settings)), name="certificate"),
        asyncio.create_task(kinds.keep(lambda: handlers.watching(insights, kinds)), name="kinds"),
    ]
    # kopf handles SIGTERM and SIGINT: it ends without an error, and takes younger tasks with it
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    stop.set()
    for task in tasks[1:]:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)  # the first that ended may have been taken along by one that failed
    return [
        (task.get_name(), end)
        for task, end in zip(tasks, ends, strict=True)
        if isinstance(end, BaseException) and not isinstance(end, asyncio.CancelledError)
    ]


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
        if settings.authorities_file:
            settings = dataclasses.replace(settings, authorities=certificate.read_authorities(settings.authorities_file))
    except ValueError as failure:
        sys.exit(f"finetune-operator: {failure}")
    while True:
        try:
            uvloop.run(run(settings))  # a twelfth less work per job than asyncio's own loop, of which most goes into TLS and HTTP
            return
        except StartOver as change:
            log.warning("starting over: %s", change)


if __name__ == "__main__":
    main()
