"""OpenTelemetry traces of the passes over jobs and of their requests, where an endpoint is set (chart value tracing.endpoint).

Knows nothing of what is traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

_tracer: Any = None


def configure(endpoint: str, instance: str) -> None:
    """Send spans to a collector by OTLP over HTTP, for example http://otel-collector.monitoring:4318/v1/traces. Empty sends none."""
    global _tracer
    if not endpoint:
        _tracer = None
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "finetune-operator", "service.instance.id": instance}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    _tracer = provider.get_tracer("finetune_operator")


@contextlib.contextmanager
def span(name: str, **attributes: str | int) -> Iterator[None]:
    """A span around what is done inside; an exception is recorded in it. Nothing without an endpoint."""
    if _tracer is None:
        yield
        return
    with _tracer.start_as_current_span(name, attributes={f"finetune.{key}": value for key, value in attributes.items()}):
        yield
