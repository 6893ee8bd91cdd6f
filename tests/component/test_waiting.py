"""A hub that is down, on a real API server; the test plays kubelet, and the pod says what a trainer's pod says."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api import names
from finetune_api.contract import ExitCode, StageResult, Unavailable
from tests.component.conftest import Api, Kubelet, Operator, until
from tests.factory import MINIMAL, ended

pytestmark = pytest.mark.operator(FINETUNE_STAGE_RETRIES="0", FINETUNE_BACKOFF_LIMIT_SECONDS="1")
HUB = "huggingface.co"
BUSY = StageResult(
    reason="WaitingForSource",
    message=f"{HUB} answers 429 Too Many Requests",
    result=Unavailable(host=HUB, retry_after_seconds=2.0).to_wire(),
)


def test_a_hub_that_is_down_is_waited_for_across_restarts_of_pod_and_operator(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    """Without any retry left for other failures: more tries than those, none counted, and the wait goes on whoever dies."""
    down = True

    def play(pod: Any) -> dict[str, Any] | None:
        stage = pod.metadata.labels[names.LABEL_STAGE]
        if stage != "prepare" or pod.status.phase != "Running" or not down:
            return None
        return ended(int(ExitCode.SOURCE_UNAVAILABLE), BUSY.dumps())

    kubelet.override = play
    api.create_job({**MINIMAL, "runPolicy": {"stageTimeout": "1h"}})

    def waits(tries: int) -> dict[str, Any] | None:
        stage = api.status().get("stages", {}).get("prepare", {})
        return stage if stage.get("waits", 0) >= tries else None

    first = until("it waits", lambda: waits(1))
    condition = api.condition("DataReady")
    assert (condition["status"], condition["reason"]) == ("False", "WaitingForSource")
    since = first["waiting"]["since"]
    assert f"prepare waits for {HUB} since {since}; next try at {api.status()['retryAfter']}, until " in condition["message"]
    assert f"{HUB} answers 429 Too Many Requests" in condition["message"]
    until("it is told", lambda: "WaitingForSource" in api.events())
    operator.kill()
    operator.start(**operator.usual)
    later = until("it goes on waiting", lambda: waits(3))
    assert later["waiting"] == first["waiting"] and later["retries"] == 0, "across both"
    until("old tries go", lambda: len([name for name in api.owned() if name.startswith("Job/")]) <= 2)
    assert api.events().count("WaitingForSource") == 1
    down = False
    until("the hub is back", lambda: api.status().get("phase") == "Succeeded")
    stage = api.status()["stages"]["prepare"]
    assert "waiting" not in stage and stage["retries"] == 0


def test_a_hub_that_stays_away_fails_the_job_when_the_stage_has_had_its_time(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    kubelet.override = lambda pod: ended(int(ExitCode.SOURCE_UNAVAILABLE), BUSY.dumps()) if pod.status.phase == "Running" else None
    api.create_job({**MINIMAL, "runPolicy": {"stageTimeout": "5s"}})
    until("it fails", lambda: api.status().get("phase") == "Failed")
    assert f"{HUB} has not answered for 5s (runPolicy.stageTimeout)" in api.condition("Failed")["message"]
    assert api.condition("DataReady")["reason"] == "SourceUnavailable"
