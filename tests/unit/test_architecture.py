"""How far one has to go to follow one key from the watch to its write (docs/architecture.md)."""

from __future__ import annotations

import ast
import asyncio
import re
import sys
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import kopf

from finetune_operator import handlers
from finetune_operator.cache.progress import ProgressBoard
from finetune_operator.cache.store import Store
from finetune_operator.controllers.manager import Manager
from finetune_operator.settings import Settings
from tests.factory import job
from tests.unit.test_controllers import KEY, SETTINGS, Cluster

ROOMS = Path(handlers.__file__).parent
LEAVES = ("reconcile", "queueing", "resources", "cache")
"""Rooms that do no I/O, as an import contract holds: one stop each, for nothing happens in them that one has to follow further."""
BESIDE = ("model", "settings", "metrics", "tracing", "logs")
"""What all rooms speak in, and of"""


class Trail:
    """The modules in the order in which calls first lead there, and those that one has come back to, to be led to the next from there."""

    def __init__(self) -> None:
        self.stops: list[str] = []
        self.returns: list[str] = []

    @staticmethod
    def place(frame: FrameType | None) -> str:
        """The module of a frame, or its room where that is a leaf; empty outside the operator."""
        name = frame.f_globals.get("__name__", "") if frame is not None else ""
        if not name.startswith("finetune_operator."):
            return ""
        room, _, _ = name.removeprefix("finetune_operator.").partition(".")
        return "" if room in BESIDE else room if room in LEAVES else name.removeprefix("finetune_operator.")

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        place, caller = self.place(frame), self.place(frame.f_back)
        if event != "call" or not place or place in self.stops or caller in LEAVES:
            return
        if caller and caller != self.stops[-1]:
            self.returns.append(caller)
        self.stops.append(place)


def test_every_module_says_what_it_does_not_know() -> None:
    """What one need not look for there, so that following a key does not end in reading everything."""
    modules = [path for path in ROOMS.rglob("*.py") if not path.name.startswith("__")]
    said = {path: ast.get_docstring(ast.parse(path.read_text())) or "" for path in modules}
    words = re.compile("[Kk]nows? (nothing|no |neither)|Decides nothing|Nothing is decided")
    silent = [str(path.relative_to(ROOMS)) for path in modules if not words.search(said[path])]
    assert not silent and len(modules) > 50


async def test_one_key_from_the_watch_to_its_write() -> None:
    cluster = Cluster()
    operator = Manager(cluster, Store(), ProgressBoard(), SETTINGS)  # type: ignore[arg-type]
    await operator.resync.once()
    operator.acting = True
    registry = kopf.OperatorRegistry()
    handlers.register(registry, operator, Settings(), SimpleNamespace(serves=lambda kind: False))  # type: ignore[arg-type]
    on_job = next(h.fn for h in registry._watching._handlers if h.id == "on_FineTuneJob")
    raw = cluster.put("FineTuneJob", job())
    working = asyncio.create_task(operator.jobs.run(1))
    await asyncio.sleep(0)
    trail, written = Trail(), asyncio.Event()

    async def replace_status(changed: Any, *, urgent: bool = True) -> Any:
        sys.setprofile(None)
        written.set()
        return changed

    cluster.replace_status = replace_status  # type: ignore[method-assign]
    sys.setprofile(trail)
    await on_job(event={"type": "ADDED", "object": raw})
    await asyncio.wait_for(written.wait(), 5)
    sys.setprofile(None)
    working.cancel()
    print(trail.stops, trail.returns)
    assert trail.stops[0] == "handlers" and "reconcile" in trail.stops and "controllers.writer" in trail.stops, trail.stops
    assert operator.store.job(KEY) is not None
    assert len(trail.stops) <= 12 and len(trail.returns) <= 4, f"{trail.stops}\n{trail.returns}"
