"""Prometheus metrics of the operator. Labels are bounded: no object names."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

RECONCILE_SECONDS = Histogram(
    "finetune_reconcile_duration_seconds", "Time of one reconcile pass, writes included", buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2, 10)
)
RECONCILE_ERRORS = Counter("finetune_reconcile_errors_total", "Reconcile passes that failed and were put back", ["reason"])
API_REQUESTS = Gauge("finetune_api_requests", "Requests to the API server since start", ["verb", "kind"])
QUEUE_DEPTH = Gauge("finetune_workqueue_depth", "Jobs waiting for or in a reconcile pass")
JOBS = Gauge("finetune_jobs", "FineTuneJobs by phase", ["phase"])
SUSPECT_NODES = Gauge("finetune_suspect_node", "Nodes that jobs kept failing on lately and that new gangs rather avoid", ["node"])
PROGRESS_REPORTS = Counter("finetune_progress_reports_total", "Progress reports by outcome", ["code"])
ADMISSION_REVIEWS = Counter("finetune_admission_reviews_total", "Requests to the admission webhooks", ["webhook", "allowed"])
SCHEDULING_SECONDS = Histogram(
    "finetune_scheduling_duration_seconds", "Time of one scheduling pass over all jobs", buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2, 10)
)
PENDING = Gauge("finetune_queue_pending_jobs", "Jobs that wait in a queue", ["queue"])
QUEUE_USED = Gauge("finetune_queue_used", "Units of a flavour that a queue's jobs hold", ["queue", "flavour"])
