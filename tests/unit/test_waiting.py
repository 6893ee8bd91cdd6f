"""A hub or server that does not answer is infrastructure: the stage waits for it within runPolicy.stageTimeout, and says so."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.contract import ExitCode, StageResult, Unavailable
from finetune_operator.model.times import parse_time
from tests.factory import CHECKED, COMPARED, MINIMAL, NOW, PREPARED, PUBLISHED, TRAINED, after, merged
from tests.unit.test_reconcile import EVALUATED, World

HOST = "huggingface.co"


def away(what: str = "answers 503 Service Unavailable", retry_after: float | None = None) -> str:
    found = Unavailable(host=HOST, retry_after_seconds=retry_after).to_wire()
    return StageResult(reason="WaitingForSource", message=f"{HOST} {what}", result=found).dumps()


def fail(world: World, stage: str = "prepare", words: str | None = None) -> None:
    world.settle()
    world.fail(stage, ExitCode.SOURCE_UNAVAILABLE, away() if words is None else words)
    world.settle()


def until_next_try(world: World) -> float:
    """Seconds to the next try; then it is that time."""
    told = parse_time(world.status.retry_after)
    assert told is not None
    wait = (told - after(world.time)).total_seconds()
    world.time = (told - NOW).total_seconds()
    return wait


def condition(world: World, type_: Any = "DataReady") -> tuple[str, str, str]:
    found = world.status.condition(type_)
    assert found is not None
    return found.status, found.reason, found.message


def test_it_is_waited_for_with_back_off_and_not_counted_as_a_retry() -> None:
    world = World()
    waits = []
    for _ in range(8):
        fail(world)
        status, reason, message = condition(world)
        assert (status, reason) == ("False", "WaitingForSource")
        assert f"prepare waits for {HOST} since 2026-11-21T12:00:00Z; next try at {world.status.retry_after}" in message
        assert "until 2026-11-22T00:00:00Z (runPolicy.stageTimeout): huggingface.co answers 503" in message
        assert not [p for p in world.pods.values() if p.phase == "Pending"], "nothing waits in a pod"
        waits.append(until_next_try(world))
    assert waits == [10, 20, 40, 80, 160, 320, 360, 360]
    world.settle()
    assert (world.status.stages["prepare"].retries, world.status.stages["prepare"].waits) == (0, 8)
    assert list(world.jobs) == ["support-prepare-8"], "a long wait leaves no heap of ended Jobs"
    assert world.events.count("WaitingForSource") == 1
    world.succeed("prepare", PREPARED)
    world.settle()
    assert world.status.is_true("DataReady") and world.status.stages["prepare"].waiting is None


def test_the_wait_ends_with_the_stage_timeout() -> None:
    world = World(merged(MINIMAL, runPolicy={"stageTimeout": "1m"}))
    waits = []
    while world.status.phase != "Failed":
        fail(world)
        if world.status.phase != "Failed":
            waits.append(until_next_try(world))
    assert waits == [10, 20, 30], "and one last try when it is over"
    failed = world.status.condition("Failed")
    assert failed is not None and failed.reason == "PrepareFailed"
    assert condition(world)[1] == "SourceUnavailable"
    assert f"{HOST} has not answered for 1m (runPolicy.stageTimeout): {HOST} answers 503" in failed.message


@pytest.mark.parametrize(("asked", "waits"), [(3.0, 10), (77.0, 77), (1e9, 3600)])
def test_the_patience_that_the_server_asks_for(asked: float, waits: float) -> None:
    world = World()
    fail(world, words=away("answers 429 Too Many Requests", asked))
    world.time += waits - 1
    world.settle()
    assert "support-prepare-1" not in world.jobs, "not before it is over, and not for ever"
    world.time += 1
    world.settle()
    assert "support-prepare-1" in world.jobs


def test_a_pod_that_dies_while_it_waits_goes_on_waiting() -> None:
    world = World()
    fail(world)
    until_next_try(world)
    world.settle()
    world.fail("prepare", 137)  # evicted: a failure of the infrastructure, with retries of its own
    world.settle()
    stage = world.status.stages["prepare"]
    assert (stage.retries, stage.waits) == (1, 1) and stage.waiting is not None and stage.waiting.since == "2026-11-21T12:00:00Z"
    fail(world)
    assert "since 2026-11-21T12:00:00Z" in condition(world)[2]


def test_a_try_that_runs_has_the_condition_until_it_has_got_an_answer() -> None:
    world = World()
    fail(world)
    until_next_try(world)
    world.settle()
    pod = next(p for p in world.pods.values() if p.phase == "Pending")
    world.set(pod, phase="Running", running=True, started=after(world.time))
    world.settle()
    assert condition(world)[1] == "WaitingForSource"
    world.time += 181
    world.settle()
    assert condition(world)[:2] == ("Unknown", "Running"), "it downloads"


@pytest.mark.parametrize("words", ["", "Traceback", '{"reason": "WaitingForSource", "result": {"host": 7, "retryAfterSeconds": "soon"}}'])
def test_words_of_a_pod_that_say_nothing(words: str) -> None:
    world = World()
    fail(world, words=words)
    assert "prepare waits for its source since" in condition(world)[2]


def test_a_suspended_job_does_not_use_its_time_up() -> None:
    world = World(merged(MINIMAL, runPolicy={"stageTimeout": "1m"}))
    fail(world)
    world.job["spec"]["runPolicy"]["suspend"] = True
    world.settle()
    world.time += 86_400
    world.job["spec"]["runPolicy"]["suspend"] = False
    world.settle()
    fail(world)
    assert world.status.phase == "Preparing" and "since 2026-11-22T12:00:00Z" in condition(world)[2]


def test_f31_a_clock_that_was_set_back() -> None:
    world = World()
    world.time = 86_400
    fail(world)
    world.time = 0
    fail(world)
    assert "since 2026-11-21T12:00:00Z" in condition(world)[2]


def test_check_evaluate_and_publish_wait_without_a_pod_too() -> None:
    world = World(EVALUATED)
    world.settle()
    world.succeed("prepare", PREPARED)
    for stage, type_, result in (
        ("check", "TargetsReady", CHECKED),
        ("evaluate", "Evaluated", COMPARED),
        ("publish", "Published", PUBLISHED),
    ):
        if stage == "evaluate":
            world.succeed("worker", TRAINED)
        fail(world, stage)
        assert condition(world, type_)[:2] == ("False", "WaitingForSource")
        assert all(p.phase in ("Succeeded", "Failed") for p in world.pods.values()), "no GPU is taken or held"
        until_next_try(world)
        world.settle()
        world.succeed(f"{stage}-1", result)
        world.settle()
    assert world.status.phase == "Succeeded"
