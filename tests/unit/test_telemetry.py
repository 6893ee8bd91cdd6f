"""Metrics of transitions: each counts once, and jobs that end leave no gauge behind."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from typing import Any, get_args

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from prometheus_client import REGISTRY

from finetune_api.status import AdmissionStatus, Condition, FineTuneJobStatus, Phase, Progress, Restart, Usage
from finetune_operator import logs, metrics, tracing
from finetune_operator.controllers import telemetry
from finetune_operator.controllers.telemetry import Telemetry
from tests.factory import job

WHEN = "2026-11-21T12:00:00Z"


def value(metric: str, /, **labels: str) -> float:
    return REGISTRY.get_sample_value(metric, labels) or 0.0


def condition(type_: Any, reason: str = "Completed") -> Condition:
    return Condition(type=type_, status="True", reason=reason, message="", last_transition_time=WHEN, observed_generation=1)


def test_transitions_are_counted_once() -> None:
    raw, told = job(name="counted", namespace="tele", uid="u-counted"), Telemetry()
    waits = FineTuneJobStatus(phase="Queued")
    admission = AdmissionStatus(queue="research", nodes=1, admitted_at=WHEN)
    runs = FineTuneJobStatus(
        phase="Training",
        conditions=[condition("Admitted")],
        admission=admission,
        usage=Usage(queued_seconds=90),
        progress=Progress(step=5, total_steps=10, loss=1.5, tokens_per_second=100.0, reported_at=WHEN),
    )
    restart = Restart(attempt=0, cause="Hang", reason="Hang", message="", time=WHEN)
    restarted = runs.model_copy(update={"restarts": [restart], "usage": Usage(queued_seconds=90, gpu_seconds=60, lost_seconds=7, cost=0.5)})
    ended = restarted.model_copy(update={"phase": "Succeeded", "conditions": [condition("Admitted"), condition("Succeeded")]})
    hangs, finished = value("finetune_restarts_total", cause="Hang"), {"result": "Succeeded", "reason": "Completed"}
    before = value("finetune_jobs_finished_total", **finished)
    told.wrote(raw, waits, runs)
    labels = {"namespace": "tele", "name": "counted"}
    assert value("finetune_training_step", **labels) == 5 and value("finetune_training_loss", **labels) == 1.5
    told.wrote(raw, runs, restarted)
    told.wrote(raw, restarted, restarted)
    told.wrote(raw, restarted, ended)
    told.wrote(raw, ended, ended)
    assert value("finetune_restarts_total", cause="Hang") == hangs + 1
    assert value("finetune_jobs_finished_total", **finished) == before + 1
    assert value("finetune_gpu_seconds_total", namespace="tele", queue="research") == 60
    assert value("finetune_lost_seconds_total", namespace="tele") == 7
    assert value("finetune_cost_total", namespace="tele", queue="research") == 0.5
    assert value("finetune_queued_seconds_total", namespace="tele", queue="research") == 90
    assert value("finetune_admission_wait_seconds_count", queue="research") == 1
    assert REGISTRY.get_sample_value("finetune_training_step", labels) is None, "it does not train any more"


def test_a16_the_number_of_jobs_with_gauges_is_bounded(monkeypatch: Any) -> None:
    monkeypatch.setattr(telemetry, "MOST_JOBS", 3)
    told, trains = Telemetry(), FineTuneJobStatus(phase="Training", progress=Progress(step=1, total_steps=2))
    for n in range(5):
        told.wrote(job(name=f"many-{n}", namespace="tele", uid=f"u-{n}"), FineTuneJobStatus(), trains)
    shown = [n for n in range(5) if value("finetune_training_total_steps", namespace="tele", name=f"many-{n}")]
    assert shown == [0, 1, 2]
    told.forget("u-0")
    told.wrote(job(name="many-4", namespace="tele", uid="u-4"), FineTuneJobStatus(), trains)
    assert value("finetune_training_total_steps", namespace="tele", name="many-4") == 2
    for n in range(5):
        told.forget(f"u-{n}")


def test_a16_what_a_pod_says_last_is_no_label() -> None:
    """Labels are of closed sets: a thousand jobs with a thousand last words make one series."""
    told, runs = Telemetry(), FineTuneJobStatus(phase="Training")
    before = _series()
    others = value("finetune_jobs_finished_total", result="Failed", reason="Other")
    for n in range(50):
        admission = AdmissionStatus(queue="research", nodes=1, admitted_at=WHEN)
        ended = FineTuneJobStatus(phase="Failed", conditions=[condition("Failed", f"Word{n}")], admission=admission)
        told.wrote(job(name=f"ends-{n}", namespace="tele", uid=f"u-e{n}"), runs, ended)
        metrics.RECONCILE_ERRORS.labels(reason=metrics.api_reason(f"AWebhooksWord{n}")).inc()
    assert value("finetune_jobs_finished_total", result="Failed", reason="Other") == others + 50
    made = {labels for name, labels in _series() - before if name.endswith("_total")}
    assert not [labels for labels in made if "Word" in str(labels)], made
    told.wrote(job(uid="u-known"), runs, FineTuneJobStatus(phase="Failed", conditions=[condition("Failed", "NonFiniteLoss")]))
    assert value("finetune_jobs_finished_total", result="Failed", reason="NonFiniteLoss") >= 1, "what docs/errors.md explains is told"


def test_a16_the_number_of_queues_with_counters_is_bounded(monkeypatch: Any) -> None:
    monkeypatch.setattr(telemetry, "MOST_QUEUES", 2)
    told = Telemetry()
    for n in range(4):
        admission = AdmissionStatus(queue=f"made-up-{n}", nodes=1, admitted_at=WHEN)
        used = FineTuneJobStatus(admission=admission, usage=Usage(gpu_seconds=5))
        told.wrote(job(uid=f"u-q{n}"), FineTuneJobStatus(), used)
    labels = {dict(labels)["queue"] for name, labels in _series() if name == "finetune_gpu_seconds_total"}
    assert {"made-up-0", "made-up-1", "Other"} <= labels and not {"made-up-2", "made-up-3"} & labels


def _series() -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    return {(s.name, tuple(sorted(s.labels.items()))) for family in REGISTRY.collect() for s in family.samples}


def test_only_the_one_that_acts_tells_of_jobs_and_it_does_of_none() -> None:
    """Gauges of jobs: nothing from one that stands by (it would count double), a zero for each phase from one that acts."""
    told = Telemetry()
    trains = FineTuneJobStatus(
        phase="Training", progress=Progress(step=1, total_steps=2, loss=1.0, tokens_per_second=1.0, reported_at=WHEN)
    )
    told.wrote(job(name="gauged", namespace="tele", uid="u-gauged"), FineTuneJobStatus(), trains)
    for gauge, labels in (
        (metrics.PENDING, {"queue": "q"}),
        (metrics.QUEUE_USED, {"queue": "q", "flavor": "f"}),
        (metrics.SUSPECT_NODES, {"node": "n"}),
    ):
        gauge.labels(**labels).set(1)
    of_jobs = {"finetune_jobs", "finetune_suspect_node", "finetune_queue_pending_jobs", "finetune_queue_used"}
    of_jobs |= {gauge._name for gauge in metrics.OF_TRAINING}
    metrics.export(acts=True, phases={"Training": 2, "<script>": 1, "Forged": 1})
    assert value("finetune_leader") == 1 and of_jobs <= {name for name, _ in _series()}
    assert value("finetune_jobs", phase="Training") == 2 and value("finetune_jobs", phase="Other") == 2
    metrics.export(acts=False, phases={"Training": 2})
    assert value("finetune_leader") == 0 and not of_jobs & {name for name, _ in _series()}
    metrics.export(acts=True, phases={})
    shown = {dict(labels)["phase"]: value(name, **dict(labels)) for name, labels in _series() if name == "finetune_jobs"}
    assert shown == dict.fromkeys(get_args(Phase), 0), "an empty cluster has jobs: none of each phase"
    told.forget("u-gauged")


def test_json_logs_name_the_job(capsys: Any) -> None:
    logs.configure("INFO", "json")
    try:
        token = logs.JOB.set("team-a/support")
        logging.getLogger("finetune.test").info("attempt %d", 2)
        logs.JOB.reset(token)
        try:
            raise ValueError("broken\nline")
        except ValueError:
            logging.getLogger("finetune.test").exception("failed")
    finally:
        logging.basicConfig(force=True)
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["job"], first["message"], first["level"]) == ("team-a/support", "attempt 2", "INFO")
    assert "job" not in second and "ValueError: broken" in second["exception"]
    with pytest.raises(ValueError, match="write text or json"):
        logs.configure("INFO", "xml")


async def test_traces_reach_a_collector() -> None:
    """A span per pass, with the request inside, by OTLP; nothing is sent without an endpoint."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    received: list[bytes] = []

    async def collect(request: web.Request) -> web.Response:
        received.append(await request.read())
        return web.Response(body=b"")

    app = web.Application()
    app.router.add_post("/v1/traces", collect)
    async with TestServer(app) as server:
        tracing.configure(str(server.make_url("/v1/traces")), "test")
        with pytest.raises(ValueError, match="broken"), tracing.span("reconcile", namespace="team-a", job="support"):
            with tracing.span("get Pod"):
                pass
            raise ValueError("broken")
        provider = tracing._tracer.span_processor
        await asyncio.to_thread(provider.force_flush)
        tracing.configure("", "test")
        with tracing.span("unseen"):
            pass
    requests = [ExportTraceServiceRequest.FromString(gzip.decompress(b) if b[:2] == b"\x1f\x8b" else b) for b in received]
    spans = {s.name: s for r in requests for rs in r.resource_spans for ss in rs.scope_spans for s in ss.spans}
    assert set(spans) == {"reconcile", "get Pod"}
    assert spans["get Pod"].parent_span_id == spans["reconcile"].span_id
    assert {a.key: a.value.string_value for a in spans["reconcile"].attributes} == {
        "finetune.namespace": "team-a",
        "finetune.job": "support",
    }
    assert any(e.name == "exception" for e in spans["reconcile"].events)
