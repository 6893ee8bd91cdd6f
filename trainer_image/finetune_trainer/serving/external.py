"""Engines that somebody else runs, served from one pod: an agent for each of them, over the same files.

The files are checked here, from the models' storage; the engines read them where they see that storage. Other adapters that they
have are others' business.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from finetune_api.endpoint import ReplicaModel
from finetune_api.serving import EngineReport, ExternalEngines, OrderedModel, ReplicaFile, ReplicaOrder, ReplicaReport

from ..job.context import Context
from .agent import NOT_ASKED, Agent, Held
from .checks import Base, check_base
from .engine import Engine, EngineAway, EngineRefused, Served
from .storage import copy_name

_TIDY_SECONDS = 10.0


class _Engine(Engine):
    async def speaks(self) -> bool:
        if self.base not in (names := await self.served()):
            has = ", ".join(sorted(name for name, served in names.items() if not served.adapter)[:3]) or "nothing"
            raise EngineAway(f"the base is not served as {self.base}, but as {has}: start it with --served-model-name ... {self.base}")
        return await super().speaks()


class _Agent(Agent):
    """Of one engine. `let_in`: folders whose files were checked, of all agents; `one_fetch`: whoever adds to them."""

    def __init__(
        self, file: ReplicaFile, context: Context, base: Base, engine: Engine, models: Path, let_in: set[Path], one_fetch: asyncio.Lock
    ) -> None:
        super().__init__(file, context, base, engine, models)
        self.external, self._let_in_before, self._one_fetch = ExternalEngines(), let_in, one_fetch
        self._looked = False

    def told(self, address: str) -> EngineReport | None:
        """What is so now; None before the engine was asked.

        A version of which nothing was found yet is left out: what an agent before this one found is still so.
        """
        if self.message == NOT_ASKED:
            return None
        models = [held.told() for held in self.held.values() if held.known]
        models += [ReplicaModel(name=name, state="Loaded") for name in self._left()]
        return EngineReport(address=address, ready=self.ready, engine=self.engine_name, message=self.message, models=models[:64])

    def _becomes(self, *, ready: bool, message: str) -> None:
        self._looked = self._looked and ready
        super()._becomes(ready=ready, message=message)

    async def _look(self) -> None:
        """Where another engine may answer each time, what it has says nothing of what was loaded."""
        if not (self.external.not_told_apart and self._looked):
            await super()._look()
            self._looked = True

    def _owns(self, served: Served) -> bool:
        return served.adapter and served.root.startswith(f"{self.external.adapters_path}/{self.file.namespace}/")

    def _root(self, held: Held) -> str:
        return f"{self.external.adapters_path}/{self.file.namespace}/{held.order.model}/{held.order.number}"

    def _let_in(self, order: OrderedModel) -> Path:
        folder = self.adapters / copy_name(order)
        if folder in self._let_in_before:
            check_base(order, self.base)
            return folder
        folder = super()._let_in(order)
        self._let_in_before.add(folder)
        return folder

    def _not_taken(self, held: Held, why: EngineRefused) -> None:
        if not why.missing:
            return super()._not_taken(held, why)
        held.state = "Pending"
        held.later(f"the engine sees no files at {self._root(held)}: mount or copy there what {held.order.storage} has below versions/")

    async def _verify(self, held: Held, names: list[str]) -> None:
        if why := self.external.not_told_apart:
            return held.become("Unverifiable", why)
        await super()._verify(held, names)

    async def _tidy(self) -> None:
        """Files are all agents'."""


class Fleet:
    """All engines of an endpoint, as the operator's orders name them."""

    serves = True
    """The agents' pod, whatever the engines say."""

    def __init__(self, file: ReplicaFile, context: Context, base: Base, models: Path) -> None:
        self.file, self.context, self.base, self.models = file, context, base, models
        self.order = ReplicaOrder()
        self._agents: dict[str, tuple[_Agent, asyncio.Task[None]]] = {}
        self._let_in: set[Path] = set()
        self._one_fetch = asyncio.Lock()

    def accept(self, order: ReplicaOrder) -> ReplicaReport:
        """Follow an order from now on. Raises ValueError where it contradicts itself, or names no engines."""
        if order.external is None:
            raise ValueError("external: no engines are named; this agent is the one of engines that somebody else runs")
        self.order = order
        for gone in self._agents.keys() - set(order.external.addresses):
            self._agents.pop(gone)[1].cancel()
        for address in order.external.addresses:
            if address not in self._agents or self._agents[address][1].done():
                engine = _Engine(f"http://{address}", self.file.name)
                agent = _Agent(self.file, self.context, self.base, engine, self.models, self._let_in, self._one_fetch)
                self._agents[address] = agent, asyncio.create_task(agent.run())
        for agent, _ in self._agents.values():
            agent.external = order.external
            agent.accept(order)
        return self.report()

    def report(self) -> ReplicaReport:
        """What is so now."""
        told = (agent.told(address) for address, (agent, _) in self._agents.items())
        engines = [report for report in told if report is not None]
        return ReplicaReport(
            generation=self.order.generation,
            ready=any(engine.ready for engine in engines),
            base_fingerprint=self.base.fingerprint,
            engines=engines,
        )

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await asyncio.sleep(_TIDY_SECONDS)
                await self._tidy()
        finally:
            tasks = [task for _, task in self._agents.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _tidy(self) -> None:
        """Remove files that no agent needs."""
        if self._one_fetch.locked():
            return
        async with self._one_fetch:
            used = {held.folder for agent, _ in self._agents.values() for held in agent.held.values()}
            for folder in (self.models / "adapters").glob("*"):
                if folder not in used:
                    self._let_in.discard(folder)
                    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
