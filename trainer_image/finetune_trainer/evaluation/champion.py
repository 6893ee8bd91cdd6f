"""The champion of the FineTunedModel that a job publishes to, as one more arm: on held-out rows that nobody learned from.

Nothing about it makes a job fail: a champion that cannot be read, or asked beside this base, leaves the comparison inconclusive.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune_api.contract import Champion, Env
from finetune_api.spec import VIRTUAL_TOKEN_METHODS
from finetune_api.versions import VersionRecord

from ..data.prompts import unseen
from ..job.context import Context
from ..models.versions import UnreadableRecord, fetch_version, learned_prompts, parse_prompts, read_record
from ..models.weights import ADAPTER_CONFIG, check_whole
from ..process.errors import StageError, Stopped
from ..remote.storage import storage_of
from .gate import Challenged, challenge, compared_by, too_few, unclear
from .measure import Asked, Measured, Row, part_asked, part_measured
from .metrics import least_prompts

log = logging.getLogger("finetune.evaluate")


class Incomparable(Exception):
    """Why the two cannot be compared."""


@dataclass(frozen=True)
class Contender:
    """A champion that can be asked."""

    folder: str
    whole: bool
    """A model, no adapter."""
    places: list[int]
    """The held-out rows that neither learned from."""


class Challenge:
    """The champion's part of an evaluation."""

    def __init__(self, context: Context, asked: Asked) -> None:
        """`asked`: the held-out rows as the tuned model is asked them."""
        self._context, self._asked = context, asked
        self._champion: Champion | None = None
        self._contender: Contender | None = None
        self._measured: Measured | None = None
        self._unclear: Challenged | None = None
        if os.environ.get(Env.CHAMPION):
            self._guarded(self._find)

    @property
    def whole(self) -> str | None:
        """The folder of a champion that is a model, to be asked."""
        return self._contender.folder if self._contender is not None and self._contender.whole else None

    @property
    def adapter(self) -> str | None:
        """The folder of a champion that is an adapter, to be asked."""
        return self._contender.folder if self._contender is not None and not self._contender.whole else None

    def ask(self, measure: Callable[[Asked], Measured]) -> None:
        """Measure it."""

        def act() -> None:
            assert self._contender is not None
            self._measured = measure(part_asked("Champion", self._asked, self._contender.places))

        self._guarded(act)

    def against(self, tuned: Measured, judge: Callable[[Asked, Measured, Measured], None]) -> Challenged | None:
        """The comparison; None where there is no champion. `judge` adds what a judge says of the two."""

        def act() -> None:
            spec = self._context.spec.evaluation
            assert self._contender is not None and self._measured is not None and self._champion is not None and spec is not None
            places, rows = self._contender.places, self._asked.rows
            asked, same = part_asked("Champion", self._asked, places), part_measured(tuned, rows, places)
            if compared_by(spec).metric == "judge-win-rate":
                judge(asked, self._measured, same)
            seed = self._context.spec.tuning.hyperparameters.seed
            self._unclear = challenge(spec, seed, self._champion.number, self._measured, same, _groups(asked.rows))

        if self._measured is not None:
            self._guarded(act)
        return self._unclear

    def answers(self) -> dict[int, str]:
        """Its answers, by the place of their prompt."""
        if self._measured is None or self._contender is None or not self._measured.answers:
            return {}
        good = [place for place, row in enumerate(self._asked.rows) if row.get("label") is not False]
        return dict(zip((good.index(p) for p in self._contender.places if p in good), self._measured.answers, strict=True))

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Stopped:
            raise
        except Exception as failure:
            expected = isinstance(failure, StageError | Incomparable | UnreadableRecord)
            log.warning("the champion: %s", failure, exc_info=not expected)
            self._contender = self._measured = None
            number = self._champion.number if self._champion is not None else 0
            words = failure.message if isinstance(failure, StageError) else str(failure)
            told = words if expected else f"{type(failure).__name__}: {words}"
            self._unclear = unclear(number, told.splitlines()[0])

    def _find(self) -> None:
        context, spec = self._context, self._context.spec.evaluation
        assert spec is not None
        self._champion = champion = Champion.model_validate_json(os.environ[Env.CHAMPION])
        storage = storage_of(context, champion.model, context.job.sources)
        record = read_record(storage, champion.number)
        if record is None:
            raise Incomparable(f"{storage.uri} has no record of it")
        _check_comparable(context, champion, record)
        learned = [learned_prompts(storage, champion.number, champion.ancestors)]
        if context.spec.tuning.continue_from is not None:
            noted = Path(context.layout.parent_prompts)
            learned.append(parse_prompts(noted.read_bytes()) if noted.exists() else None)
        known = [prompts for prompts in learned if prompts is not None]
        if len(known) < len(learned):
            raise Incomparable(f"what {'it' if learned[0] is None else 'tuning.continueFrom'} learned from is not known")
        places = unseen([json.loads(row["row"]) for row in self._asked.rows], np.unique(np.concatenate(known)))
        good = [self._asked.rows[place] for place in places if self._asked.rows[place].get("label") is not False]
        prompts = len(set(_groups(good) or range(len(good))))
        if prompts < least_prompts(compared_by(spec).confidence):
            self._unclear = unclear(champion.number, too_few(prompts, compared_by(spec).confidence), prompts)
            return
        folder = fetch_version(storage, record, context.layout.cache)
        check_whole(folder, f"version {champion.number}", "config.json" if record.form == "Model" else ADAPTER_CONFIG)
        self._contender = Contender(str(folder), record.form == "Model", places)


def _check_comparable(context: Context, champion: Champion, record: VersionRecord) -> None:
    own = context.read_json(context.layout.reference("model"))["fingerprint"]
    tuning = context.spec.tuning
    if record.digest != champion.digest:
        raise Incomparable("its record names other files than those that are served")
    if record.base.fingerprint != own:
        raise Incomparable(f"it was tuned from another base, {record.base.uri}")
    if (record.tuning.get("objective") == "reward") != (tuning.objective == "reward"):
        raise Incomparable(f"its objective is {record.tuning.get('objective')}, this job's {tuning.objective}")
    if tuning.objective == "reward" and record.tuning.get("method") in VIRTUAL_TOKEN_METHODS:  # its head would stay on the base
        raise Incomparable(f"a reward model of method {record.tuning.get('method')} cannot be asked beside another")
    if record.tuning.get("chatTemplate") != tuning.chat_template:
        raise Incomparable("it was trained with another tuning.chatTemplate")


def _groups(rows: list[Row]) -> list[str] | None:
    good = [row for row in rows if row.get("label") is not False]
    return [row["group_id"] for row in good] if good and "group_id" in good[0] else None
