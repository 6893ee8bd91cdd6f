"""The agent's own HTTP server, on the pod's loopback; the proxy beside it lets the operator in, by mutual TLS."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

from aiohttp import web
from pydantic import ValidationError

from finetune_api.serving import AGENT_LOCAL_PORT, ENGINE_LOCAL_PORT, MODELS_PATH, ReplicaOrder, ReplicaPaths, ReplicaReport

from .agent import Agent
from .checks import Base
from .engine import Engine
from .external import Fleet
from .replica import BASE, REFERENCE, context_of, read_replica, served_version

_MOST_BODY = 1 << 20


class Follows(Protocol):
    """An agent, of one engine or of many."""

    @property
    def serves(self) -> bool:
        """Whether users may be sent here."""

    def accept(self, order: ReplicaOrder) -> ReplicaReport:
        """Follow an order from now on."""

    def report(self) -> ReplicaReport:
        """What is so now."""

    async def run(self) -> None:
        """Work until cancelled."""


_AGENT: web.AppKey[Follows] = web.AppKey("agent")


async def _models(request: web.Request) -> web.Response:
    return _report(request.app[_AGENT].report())


async def _order(request: web.Request) -> web.Response:
    """Taken over at once; carried out in the background."""
    try:
        order = ReplicaOrder.model_validate_json(await request.read())
        return _report(request.app[_AGENT].accept(order))
    except ValidationError as failure:
        first = failure.errors(include_input=False, include_url=False)[0]
        raise web.HTTPBadRequest(text=f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as failure:
        raise web.HTTPBadRequest(text=str(failure)) from None


async def _health(request: web.Request) -> web.Response:
    """The engine's: one whose answers are dead is not well, whatever it says; nor is one whose base is not the version that it should be."""
    serves = request.app[_AGENT].serves
    return web.Response(text="ok\n" if serves else "not ready\n", status=200 if serves else 503)


def _report(report: ReplicaReport) -> web.Response:
    return web.json_response(report.to_wire())


def application(agent: Follows) -> web.Application:
    """Its routes, and the agent's work behind them."""
    app = web.Application(client_max_size=_MOST_BODY)
    app[_AGENT] = agent
    app.add_routes([web.get(MODELS_PATH, _models), web.put(MODELS_PATH, _order), web.get("/health", _health)])

    async def work(_: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(agent.run())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    app.cleanup_ctx.append(work)
    return app


def arguments() -> argparse.ArgumentParser:
    """What the agent is started with."""
    parser = argparse.ArgumentParser(prog="finetune_trainer agent")
    parser.add_argument("--replica", default=ReplicaPaths.FILE)
    parser.add_argument("--models", default=ReplicaPaths.MODELS)
    parser.add_argument("--port", type=int, default=AGENT_LOCAL_PORT)
    parser.add_argument("--engine", default=f"http://127.0.0.1:{ENGINE_LOCAL_PORT}")
    parser.add_argument("--external", action="store_true", help="engines that somebody else runs, as orders name them")
    return parser


def serve(words: list[str]) -> None:
    """Serve until SIGTERM."""
    told = arguments().parse_args(words)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    file = read_replica(told.replica)
    models = Path(told.models)
    reference = json.loads((models / REFERENCE).read_text())
    base = Base((models / BASE).resolve(), reference["fingerprint"])

    async def made() -> web.Application:  # within the loop that it works in
        context = context_of(file, told.models)
        if told.external:
            return application(Fleet(file, context, base, models))
        return application(Agent(file, context, base, Engine(told.engine, file.name), models, served_version(reference)))

    web.run_app(made(), host="127.0.0.1", port=told.port, print=None)
