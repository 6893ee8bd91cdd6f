"""What many jobs say alike is kept once, and nobody sees a difference."""

from __future__ import annotations

import copy
import gc
import json
import tracemalloc
from typing import Any

from finetune_api.validation import parse_spec
from finetune_operator.cache.sharing import Shared
from finetune_operator.cache.store import Store
from tests.factory import FULL, job, merged
from tests.schemas import SPECS, filled, schema
from tests.unit.test_reconcile import EVALUATED, World


def as_heard(spec: dict[str, Any], number: int = 0, status: dict[str, Any] | None = None) -> dict[str, Any]:
    """A job as the API server tells it: every object of its own."""
    whole = filled(schema("FineTuneJob")["spec"], spec)
    told: dict[str, Any] = json.loads(
        json.dumps(job(whole, status, name=f"job-{number}", uid=f"uid-{number}", resourceVersion=str(number + 1)))
    )
    return told


def test_jobs_are_the_same_as_they_were_told() -> None:
    store = Store()
    for number, spec in enumerate([*SPECS["FineTuneJob"], *SPECS["FineTuneJob"]]):
        raw = as_heard(spec, number)
        key = store.put_job(copy.deepcopy(raw))
        assert store.job(key) == raw
        parsed, plain = store.spec(raw), parse_spec(raw["spec"])
        assert parsed == plain and parsed is not None
        assert parsed.to_wire() == plain.to_wire() and parsed.to_wire(exclude_unset=True) == plain.to_wire(exclude_unset=True)


def test_a_number_is_not_taken_for_another_type() -> None:
    """1, 1.0 and true are equal to Python."""
    shared = Shared()
    blocks = [shared.job({"spec": {"tuning": {"seed": value}}})["spec"]["tuning"]["seed"] for value in (1, 1.0, True, "1")]
    assert [type(value) for value in blocks] == [int, float, bool, str]


def test_what_is_alike_is_one_object() -> None:
    store = Store()
    keys = [store.put_job(as_heard(FULL, n)) for n in range(2)] + [store.put_job(as_heard(merged(FULL, output={"merged": True}), 2))]
    first, second, other = (store.job(key) or {} for key in keys)
    assert first["spec"]["tuning"] is second["spec"]["tuning"] is other["spec"]["tuning"]
    assert first["spec"]["output"] is not other["spec"]["output"] and other["spec"]["output"]["merged"] is True
    parsed = [store.spec(raw) for raw in (first, second)]
    assert parsed[0] is not None and parsed[1] is not None and parsed[0].tuning is parsed[1].tuning


def test_what_is_remembered_is_bounded() -> None:
    shared = Shared(most=3)
    for number in range(10):
        shared.job({"spec": {"model": {"uri": f"pvc://models/{number}"}, "tuning": {"seed": 1}}})
    assert len(shared._blocks) == 3
    assert any(block == {"seed": 1} for block in shared._blocks.values()), "what is asked for again stays"


def test_a_job_takes_a_third_of_its_objects() -> None:
    world = World(EVALUATED).to_training()

    def kept(alike: bool) -> int:
        store, raws = Store(), []
        gc.collect()
        tracemalloc.start()
        for number in range(300):
            spec = merged(EVALUATED, model={"uri": f"pvc://models/m{number}"})
            raw = as_heard(spec, number, world.job["status"])
            raws.append((store.put_job(raw), store.spec(raw)) if alike else (raw, parse_spec(raw["spec"])))
            del raw
        gc.collect()
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(raws) == 300
        return used

    assert kept(alike=True) < kept(alike=False) / 3
