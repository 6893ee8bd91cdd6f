"""Makes what an engine serves equal to what was ordered, and finds out what each of its names answers as.

Everything is in memory: after a restart the operator's next order, what the engine says it serves and the digests of the folders here
lead to the same end. What must not be loaded is refused and told; what was serving goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from finetune_api.endpoint import ReplicaModel, Verification
from finetune_api.probing import Probe, Probes, judge
from finetune_api.serving import OrderedModel, ReplicaFile, ReplicaOrder, ReplicaReport

from ..job.context import Context
from ..process.errors import StageError
from .checks import Base, check_adapter, check_base
from .engine import Engine, EngineAway, EngineRefused, Served
from .storage import Refused, fetch_version, probes_of, storage_of

log = logging.getLogger("finetune")

POLL_SECONDS = 2.0
_BASE_ASKED_SECONDS = 60.0
"""How often the base is asked for a few tokens: an engine whose answers are dead says that it is healthy."""
_LONGEST_PAUSE = 60.0
NOT_ASKED = "the engine was not asked yet"
_ANSWERS: tuple[Verification, ...] = ("Verified", "Unverifiable")
"""States in which a version may answer under its model's name."""


@dataclass
class Held:
    """An ordered version, and how far it has come."""

    order: OrderedModel
    state: Verification = "Pending"
    distance: float | None = None
    message: str = ""
    looked_at: datetime | None = None
    folder: Path | None = None
    """Where its files are; they were let in."""
    fetching: bool = False
    tries: int = 0
    not_before: float = 0.0
    known: bool = False
    """Whether anything was found of it since the agent began."""

    def become(self, state: Verification, message: str, distance: float | None = None) -> None:
        """What was found, now."""
        self.state, self.message, self.distance, self.known = state, message, distance, True
        self.looked_at, self.tries = datetime.now(UTC), 0
        log.info("%s: %s: %s", self.order.name, state, message)

    def later(self, message: str) -> None:
        """Tried again, each time after twice the pause."""
        self.message, self.known = message, True
        self.not_before = time.monotonic() + min(_LONGEST_PAUSE, 2.0**self.tries)
        self.tries += 1
        log.warning("%s: %s", self.order.name, message)

    def again(self, message: str = "") -> None:
        """From the beginning; what is fetched stays."""
        self.state, self.message, self.distance, self.tries, self.not_before = "Pending", message, None, 0, 0.0
        self.known = self.known or bool(message)

    def is_due(self, before: datetime | None) -> bool:
        """Whether it is to be asked: it never was, or not since the time that the operator names."""
        if time.monotonic() < self.not_before:
            return False
        return self.state in ("Pending", "Loaded") or (before is not None and self.looked_at is not None and self.looked_at < before)

    def told(self) -> ReplicaModel:
        """For the report."""
        at = self.looked_at.isoformat(timespec="milliseconds").replace("+00:00", "Z") if self.looked_at else None
        distance = None if self.distance is None else round(self.distance, 4)
        return ReplicaModel(name=self.order.name, state=self.state, distance=distance, message=self.message, verified_at=at)


class Agent:
    """One replica's."""

    def __init__(
        self, file: ReplicaFile, context: Context, base: Base, engine: Engine, models: Path, version: OrderedModel | None = None
    ) -> None:
        """`version`: the whole model that the base is."""
        self.file, self.context, self.base, self.engine = file, context, base, engine
        self.whole = Held(version) if version is not None else None
        self.adapters = models / "adapters"
        self.adapters.mkdir(parents=True, exist_ok=True)
        self.order: ReplicaOrder | None = None
        self.verify_before: datetime | None = None
        self.held: dict[str, Held] = {}
        self.served: dict[str, Served] = {}
        self.ready, self.message, self.engine_name = False, NOT_ASKED, ""
        self._doubted = False
        self._wake, self._one_fetch = asyncio.Event(), asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def serves(self) -> bool:
        """Whether users may be sent here: the engine answers, and a whole model was not found to be another one."""
        return self.ready and (self.whole is None or self.whole.state in _ANSWERS)

    def accept(self, order: ReplicaOrder) -> ReplicaReport:
        """Follow an order from now on. Raises ValueError where it contradicts itself, or its time is none."""
        names = [name for model in order.models for name in (model.name, *model.aliases)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"models: {twice} is ordered twice; order each name once")
        before = _time(order.verify_before)
        held: dict[str, Held] = {}
        for model in order.models:
            known = self.held.get(model.name)
            if known is not None and _same(known.order, model):
                known.order = model
            held[model.name] = known if known is not None and _same(known.order, model) else Held(model)
        self.order, self.verify_before, self.held = order, before, held
        self._wake.set()
        return self.report()

    def report(self) -> ReplicaReport:
        """What is so now."""
        models = [*(held.told() for held in self._all()), *(ReplicaModel(name=name, state="Loaded") for name in self._left())]
        awaited = f"{self.whole.order.name}: {self.whole.state}: {self.whole.message}" if self.whole is not None else ""
        return ReplicaReport(
            generation=self.order.generation if self.order else 0,
            ready=self.serves,
            engine=self.engine_name,
            base_fingerprint=self.base.fingerprint,
            message=self.message or ("" if self.serves else awaited.rstrip(": ")),
            models=models[:64],
        )

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch())
                group.create_task(self._work())
        finally:
            await self.engine.close()

    async def _watch(self) -> None:
        """Whether the engine answers. A restart of it, seen by its silence, makes everything be loaded and asked again."""
        asked = -_BASE_ASKED_SECONDS
        while not _told_to_end():
            try:
                await self.engine.alive()
                if not self.ready or self._doubted or time.monotonic() - asked > _BASE_ASKED_SECONDS:
                    self._doubted = False
                    if not (await self.engine.speaks() or await self.engine.speaks()):
                        raise EngineAway("the engine answers with values that are no numbers: it has to be restarted")
                    asked = time.monotonic()
                    self.engine_name = await self.engine.version()
                    self._becomes(ready=True, message="")
            except EngineAway as away:
                self._becomes(ready=False, message=str(away))
            await asyncio.sleep(POLL_SECONDS)

    def _becomes(self, *, ready: bool, message: str) -> None:
        self.message = message
        if ready == self.ready:
            return
        self.ready = ready
        log.info("engine %s", "answers" if ready else f"does not: {message}")
        for held in self._all():
            if held.state == "Pending" or (not ready and held.state != "Refused"):
                held.again("" if ready else "the engine does not answer")
        self._wake.set()

    async def _work(self) -> None:
        while not _told_to_end():
            self._wake.clear()
            if self.ready:
                try:
                    await self._equalise(self.order)
                except EngineAway as away:
                    self._doubted = True
                    log.warning("%s", away)
                except Exception:  # nothing of an order may end the agent
                    log.exception("unexpected")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wake.wait()

    async def _equalise(self, order: ReplicaOrder | None) -> None:
        """One pass: fetch, load, ask; names of champions; unload. Of a whole model nobody has to order anything."""
        if order is None and self.whole is None:
            return
        await self._look()
        for held in self._all():
            if self.order is not order:
                return  # another one came: from the beginning
            try:
                await (self._ask_whole(held) if held is self.whole else self._bring(held))
            except EngineAway as away:  # of this one, perhaps: others go on
                self._doubted = True
                held.later(str(away))
        for held in list(self.held.values()):
            await self._name(held)
        if order is not None:
            await self._drop()

    async def _bring(self, held: Held) -> None:
        """An adapter, a step nearer to being served and known."""
        order = held.order
        if held.state == "Refused" and held.is_due(self.verify_before):
            held.folder = None
            held.again()
        if held.folder is None:
            if held.state != "Refused" and not held.fetching and held.is_due(None):
                held.fetching = True
                task = asyncio.create_task(self._fetch(held))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            return
        if not self._serves(order.name, held):
            if time.monotonic() < held.not_before:
                return
            try:
                await self._load(order.name, held)
            except EngineRefused as refused:
                self._not_taken(held, refused)
                return
            held.again("loaded")
        if held.state == "Pending":
            held.state = "Loaded"
        if held.is_due(self.verify_before):
            await self._verify(held, [order.name, *(alias for alias in order.aliases if self._serves(alias, held))])

    async def _ask_whole(self, held: Held) -> None:
        """A whole model is its replica's base: its files were let in before the engine started."""
        if not held.is_due(self.verify_before):
            return
        name, served = held.order.name, self.served.get(held.order.name)
        if served is None or served.adapter:
            held.become("Refused", f"the engine does not serve its base as {name}: it was started for another one")
            return
        if held.state == "Pending":
            held.state = "Loaded"
        await self._verify(held, [name])

    def _all(self) -> list[Held]:
        """The whole model first: everything else depends on it."""
        return [*([self.whole] if self.whole is not None else []), *self.held.values()]

    async def _fetch(self, held: Held) -> None:
        """One after the other, beside everything else: a large file holds up no other model's probes."""
        try:
            async with self._one_fetch:
                held.folder = await asyncio.to_thread(self._let_in, held.order)
        except Refused as refused:
            held.become("Refused", str(refused))
        except StageError as failure:
            held.later(failure.message)
        except ValueError as failure:
            held.become("Refused", f"the order cannot be followed: {failure}")
        except Exception as failure:
            log.exception("unexpected")
            held.later(f"unexpected: {type(failure).__name__}")
        held.fetching = False
        self._wake.set()

    def _let_in(self, order: OrderedModel) -> Path:
        """The folder of what may be loaded. Raises Refused."""
        check_base(order, self.base)
        if order.rank is not None and order.rank > self.file.max_lora_rank:
            raise Refused(f"rank {order.rank}, this endpoint takes {self.file.max_lora_rank}: raise its spec.maxLoraRank")
        folder = fetch_version(storage_of(self.context, order), order, self.adapters)
        check_adapter(folder, self.base, self.file.max_lora_rank)
        return folder

    async def _verify(self, held: Held, names: list[str]) -> None:
        """Ask every name that the version answers under for its probes: the worst of them is what it is."""
        try:
            raw = await asyncio.to_thread(lambda: probes_of(storage_of(self.context, held.order), held.order))
        except Refused as refused:
            return held.become("Unverifiable", str(refused))
        except StageError as failure:
            return held.later(failure.message)
        probes = _readable(raw, held.order, "" if held is self.whole else self.base.fingerprint)
        if isinstance(probes, str):
            return held.become("Unverifiable", probes)
        most = next((served.most_tokens for served in self.served.values() if served.most_tokens), None)
        asked = [probe for probe in probes if most is None or _length(probe) < most]
        if not asked and probes:
            return held.become("Unverifiable", f"none of {len(probes)} probes fits into the {most} tokens that are served")
        known = judge(asked, [[answer.tuned for answer in probe.answers] for probe in asked])
        if known.state == "Unverifiable":  # whoever would answer
            return held.become("Unverifiable", known.message, known.distance)
        narrowed = [probe.narrowed() for probe in asked]
        for name in names:
            verdict = judge(narrowed, await self.engine.log_probabilities(name, asked))
            if verdict.state != "Verified":
                break
        self._doubted = verdict.state == "Mismatch"
        told = f"nearer to the tuned model than to its base on {verdict.nearer} of {verdict.asked} probes ({known.distance:.3g} nats a token apart)"
        told = verdict.message if verdict.state == "Unverifiable" else told
        alike = await self.engine.rendered_alike(held.order.name, asked)
        if alike < len(asked):
            whose = "its" if held is self.whole else "the base's"
            told += f"; {whose} chat template makes other tokens of {len(asked) - alike} of them than were evaluated"
        held.become(verdict.state, told if name == held.order.name or verdict.state == "Verified" else f"as {name}: {told}", known.distance)

    async def _name(self, held: Held) -> None:
        """Give the model's own name to its champion, in place: the one before goes on answering until then. A mismatch has no name."""
        if held.folder is None:
            return
        for alias in held.order.aliases:
            serves = self._serves(alias, held)
            if held.state in _ANSWERS and not serves:
                try:
                    await self._load(alias, held)
                except EngineRefused as refused:
                    held.become("Mismatch", f"the engine refuses it as {alias}: {refused}")
                    continue
                await self._verify(held, [alias])
            if held.state == "Mismatch" and self._serves(alias, held):
                await self._unload(alias)

    async def _drop(self) -> None:
        """Unload what is not ordered, and remove the files that nothing needs."""
        for name in self._left():
            await self._unload(name)
        await self._tidy()

    def _left(self) -> list[str]:
        """Names of adapters that the engine has and nobody ordered; none before there is an order."""
        wanted = {name for held in self.held.values() for name in (held.order.name, *held.order.aliases)}
        return [name for name, served in self.served.items() if self._owns(served) and name not in wanted] if self.order else []

    # of an engine that somebody else runs these are others (external.py)

    async def _look(self) -> None:
        self.served = await self.engine.served()

    def _owns(self, served: Served) -> bool:
        """Whether it may be unloaded."""
        return served.adapter

    def _root(self, held: Held) -> str:
        """Where the engine finds the files of a version that was let in."""
        return str(held.folder)

    def _not_taken(self, held: Held, why: EngineRefused) -> None:
        held.folder = None
        held.become("Refused", f"the engine refuses it: {why}")

    async def _tidy(self) -> None:
        used = {held.folder for held in self.held.values()} | {Path(served.root) for served in self.served.values()}
        if not any(held.fetching for held in self.held.values()):
            for folder in self.adapters.iterdir():
                if folder not in used:
                    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _serves(self, name: str, held: Held) -> bool:
        served = self.served.get(name)
        return served is not None and served.root == self._root(held)

    async def _load(self, name: str, held: Held) -> None:
        root = self._root(held)
        await self.engine.load(name, root)
        self.served[name] = Served(root, adapter=True)
        log.info("%s: loaded from %s", name, root)

    async def _unload(self, name: str) -> None:
        await self.engine.unload(name)
        self.served.pop(name, None)
        log.info("%s: unloaded", name)


def _told_to_end() -> bool:
    """Whether this task was cancelled: what it waited for may have failed at the same moment, and that is all that it was told then."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _same(one: OrderedModel, other: OrderedModel) -> bool:
    """Whether they are one version of one content; which names it has besides does not count."""
    return one.model_copy(update={"aliases": []}) == other.model_copy(update={"aliases": []})


def _time(text: str | None) -> datetime | None:
    """Not later than now: what is asked would be asked for ever."""
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"verifyBefore: {text!r} is no time; write for example 2026-11-29T07:00:00Z") from None
    return min(found if found.tzinfo else found.replace(tzinfo=UTC), datetime.now(UTC))


def _readable(raw: bytes | None, order: OrderedModel, fingerprint: str) -> list[Probe] | str:
    """The probes, or why they say nothing. `fingerprint`: of the base beside which an adapter is asked; empty for a whole model."""
    if raw is None:
        return f"probes/{order.number}.json is not there: the job's evaluation was off, or made none"
    try:
        probes = Probes.model_validate_json(raw)
    except ValueError:
        return f"probes/{order.number}.json cannot be read: publish the version again"
    if probes.fingerprint and fingerprint and probes.fingerprint != fingerprint:
        return f"probes/{order.number}.json was made with a base of fingerprint {probes.fingerprint}, this replica serves {fingerprint}"
    for answer in (answer for probe in probes.probes for answer in probe.answers):
        if not len(answer.token_ids) == len(answer.tuned) == len(answer.base):
            return f"probes/{order.number}.json contradicts itself: publish the version again"
    return list(probes.probes)


def _length(probe: Probe) -> int:
    return len(probe.prompt_ids) + max(len(answer.token_ids) for answer in probe.answers)
