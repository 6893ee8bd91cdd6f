"""Prometheus metrics of the gateway, in a registry of their own: what it imports of the operator's says nothing here.

Labels are names that the status of endpoints holds, ids of keys, and closed sets. Knows nothing of what is measured.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
_MODEL = ["namespace", "endpoint", "model", "version"]
"""version is empty for a base."""
REQUESTS = Counter(
    "finetune_gateway_requests_total",
    "Requests for a model, by the status answered (499: the client hung up) and API key",
    [*_MODEL, "key", "code"],
    registry=REGISTRY,
)
FAILURES = Counter("finetune_gateway_failures_total", "Tries that failed by the replica's fault", [*_MODEL, "reason"], registry=REGISTRY)
TOKENS = Counter(
    "finetune_gateway_tokens_total",
    "Tokens by API key (empty: Kubernetes tokens); source usage is the replica's word, estimate where it gave none",
    [*_MODEL, "key", "kind", "source"],
    registry=REGISTRY,
)
FIRST_TOKEN = Histogram(
    "finetune_gateway_first_token_seconds",
    "Time from a request's arrival to the first byte of its answer's body",
    _MODEL,
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
    registry=REGISTRY,
)
REFUSED = Counter("finetune_gateway_refused_total", "Requests that were given to no replica, by code", ["code"], registry=REGISTRY)
STORE_FAILURES = Counter(
    "finetune_gateway_store_failures_total", "Times that the store took nothing of what was to be written", registry=REGISTRY
)
USAGE_PENDING = Gauge("finetune_gateway_usage_pending_requests", "Requests whose use is not in the store yet", registry=REGISTRY)
USAGE_LOST = Counter("finetune_gateway_usage_lost_requests_total", "Requests whose use the store will never have", registry=REGISTRY)
RUNNING = Gauge("finetune_gateway_running_requests", "Requests that are being answered", registry=REGISTRY)
WAITING = Gauge(
    "finetune_gateway_waiting_requests",
    "Requests of an endpoint's replicas that have got no byte of an answer yet",
    ["namespace", "endpoint"],
    registry=REGISTRY,
)
PAUSED = Gauge("finetune_gateway_paused_replicas", "Replicas that are left alone since they failed", registry=REGISTRY)
REPLICAS = Gauge(
    "finetune_gateway_replicas", "Replicas that answer, by the status of their endpoint", ["namespace", "endpoint"], registry=REGISTRY
)
