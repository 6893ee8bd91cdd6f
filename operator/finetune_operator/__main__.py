"""`python -m finetune_operator`: start-up, servers, kopf; runs inside a cluster and outside alike."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import kopf
import uvloop
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from . import handlers, logs, metrics, tracing
from .cache.progress import ProgressBoard
from .cache.store import Store
from .cluster.connect import connect
from .cluster.errors import APIError
from .cluster.kinds import Kinds, StartOver
from .cluster.lease import Lease
from .cluster.seal_key import ensure_seal_key
from .cluster.transport import KubernetesCluster
from .controllers.manager import Manager
from .handlers import Insights
from .model.tuned_model import has_unready_storage
from .servers import certificate
from .servers.bundle import Bundle
from .servers.catalog import CatalogServer
from .servers.certificate import Certificate, Identity
from .servers.progress import ProgressServer
from .servers.webhooks import AdmissionServer
from .settings import Settings, from_environment

log = logging.getLogger("finetune")
_AGAIN_SECONDS = 2.0
_BROKEN_WATCH = (json.JSONDecodeError, UnicodeDecodeError, RecursionError)
"""What kopf ends with when a line of a watch is no object: broken off, or garbled on its way"""


async def _serve(app: web.Application, port: int, **kwargs: object) -> web.AppRunner:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port, **kwargs).start()  # type: ignore[arg-type]
    return runner


def _probes(
    manager: Manager, identity: Identity, cluster: KubernetesCluster, settings: Settings, kinds: Kinds, insights: Insights
) -> web.Application:
    def not_ready() -> str:
        if identity.waits_for:
            return identity.waits_for
        if kinds.missing:
            return f"the API server does not serve {', '.join(kinds.missing)}: install the CustomResourceDefinitions"
        if not manager.synced.is_set():
            return "not in sync yet"
        unwatched = {r for r in kinds.watched if kinds.serves(r.kind)} - handlers.watching(insights, kinds)
        return f"not watched yet: {', '.join(sorted(r.plural for r in unwatched))}" if unwatched else ""

    async def healthz(_: web.Request) -> web.Response:
        for what, silent in (("resync", time.monotonic() - manager.resync.last), ("word of nodes and queues", manager.silent_seconds)):
            if manager.synced.is_set() and silent > 4 * settings.resync_seconds:
                return web.Response(status=503, text=f"no {what} for {silent:.0f} s")
        return web.Response(text="ok")

    async def readyz(_: web.Request) -> web.Response:
        why = not_ready()
        return web.Response(status=503 if why else 200, text=why or "ok")

    async def scrape(_: web.Request) -> web.Response:
        for (verb, kind), count in cluster.calls.items():
            metrics.API_REQUESTS.labels(verb=verb, kind=kind).set(count)
        unready = sum(map(has_unready_storage, manager.store.models))
        metrics.export(acts=manager.acting, phases=manager.store.phases(), storage_unready=unready)
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
        manager.configure(ca_bundle=new.authorities, authorities=own)

    return look


async def _seal_key(cluster: KubernetesCluster, settings: Settings) -> str:
    """The key that admissions are sealed with, as soon as the API server answers."""
    while True:
        try:
            return await ensure_seal_key(cluster, settings)
        except APIError as failure:
            log.warning("the key of the seals is asked for again: %s", failure)
            await asyncio.sleep(_AGAIN_SECONDS)


async def _waited(needed: Coroutine[Any, Any, None]) -> bool:
    """Wait for what nothing can be done without. False when the process is to end instead: kopf, which sees to signals, comes later."""
    waiting = asyncio.create_task(needed)
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
    if settings.queueing_backend == "none":
        log.warning("queueing.backend is none: every job starts at once; quotas, priorities and nodes are not looked at")
    cluster = await connect(settings.api_qps, settings.api_burst)
    lookups = await connect(settings.api_qps, settings.api_burst)  # who applies a job does not wait behind a thousand of them
    identity = Identity(cluster, settings)
    store, board = Store(), ProgressBoard()
    holder = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    tracing.configure(settings.tracing_endpoint, holder)
    lease = Lease(cluster, settings.namespace, settings.lease, holder, seconds=settings.lease_seconds) if settings.lease else None
    kinds, insights = Kinds(cluster, settings), handlers.Insights()
    manager = Manager(cluster, store, board, settings, lease, kinds.serves)
    server = ProgressServer(cluster, store, board, manager.wake, lambda: manager.acting)
    endpoints = server.application()
    endpoints.add_routes(CatalogServer(cluster, store, manager.catalogs, manager.wake, lambda: manager.acting).routes())
    endpoints.add_routes(AdmissionServer(lookups, settings).routes())
    runners = [await _serve(_probes(manager, identity, cluster, settings, kinds, insights), settings.probe_port)]
    failed: list[tuple[str, BaseException]] = []

    async def needed() -> None:
        await identity.found()
        manager.configure(ca_bundle=identity.certificate.authorities, seal_key=await _seal_key(cluster, settings))
        runners.append(await _serve(endpoints, settings.progress_port, ssl_context=identity.context))
        await kinds.found()

    try:
        if await _waited(needed()):
            failed = await _work(settings, manager, identity, cluster, kinds, insights)
    finally:
        if lease is not None:
            await lease.release()  # nothing acts any more
        for runner in runners:
            await runner.cleanup()
        await cluster.close()
        await lookups.close()
    for name, error in failed:
        if isinstance(error, _BROKEN_WATCH):
            await asyncio.sleep(_AGAIN_SECONDS)
        raise _ended(name, error) from error


def _ended(name: str, error: BaseException) -> Exception:
    """What the end of a part means: a fresh start within this process, or its end."""
    if isinstance(error, StartOver):
        return error
    if name == "kopf" and getattr(error, "status", None) == 404:
        return StartOver(f"a kind that is watched is gone: {error}")
    if name == "kopf" and isinstance(error, _BROKEN_WATCH):
        return StartOver(f"a watch brought what cannot be read: {error}")
    return RuntimeError(f"{name} ended: {error}")


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

    Nearly all garbage goes by reference counts; the youngest generation is looked at every 20,000 objects instead of 700, and
    the next with five of it: with twenty, one look took 0.16 s.
    """
    gc.set_threshold(20_000, 5, 200)


def share_the_processor() -> None:
    """Passes over all jobs are made in a thread: it gives way after a millisecond, not after five, to what else there is to do."""
    sys.setswitchinterval(0.001)


def main() -> None:
    """Entry point."""
    spare_the_collector()
    share_the_processor()
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
