"""Prometheus metrics of the operator. Labels are bounded: names of jobs only on the gauges of those that train now.

No label is a word that a tenant can choose: what is not of a closed set is `Other`.
Knows nothing of what is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from prometheus_client import Counter, Gauge, Histogram

from finetune_api.reasons import OTHER
from finetune_api.status import Phase

LEADER = Gauge("finetune_leader", "1 on the operator that acts, 0 on one that stands by")

RECONCILE_SECONDS = Histogram(
    "finetune_reconcile_duration_seconds", "Time of one reconcile pass, writes included", buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2, 10)
)
RECONCILE_ERRORS = Counter("finetune_reconcile_errors_total", "Reconcile passes that failed and were put back", ["reason"])
EVENTS_DROPPED = Counter("finetune_events_dropped_total", "Kubernetes Events that were not posted", ["reason"])
ASSUMPTIONS_EXPIRED = Counter(
    "finetune_assumptions_expired_total", "Admissions and evictions that did not come on record and were given up", ["action"]
)
API_REQUESTS = Gauge("finetune_api_requests", "Requests to the API server since start", ["verb", "kind"])
QUEUE_DEPTH = Gauge("finetune_workqueue_depth", "Objects of a kind waiting for or in a reconcile pass", ["kind"])
JOBS = Gauge("finetune_jobs", "FineTuneJobs by phase, also of phases that no job is in", ["phase"])
SUSPECT_NODES = Gauge("finetune_suspect_node", "Nodes that jobs kept failing on lately and that new gangs rather avoid", ["node"])
PROGRESS_REPORTS = Counter("finetune_progress_reports_total", "Progress reports by outcome", ["code"])
STORAGE_UNREADY = Gauge("finetune_models_storage_unready", "FineTunedModels whose storage cannot be read or written")
CATALOG_REPORTS = Counter("finetune_catalog_reports_total", "Reports of what FineTunedModels keep, by outcome", ["code"])
ADMISSION_REVIEWS = Counter("finetune_admission_reviews_total", "Requests to the admission webhooks", ["webhook", "allowed"])
SCHEDULING_SECONDS = Histogram(
    "finetune_scheduling_duration_seconds", "Time of one scheduling pass over all jobs", buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2, 10)
)
_WAITS = (1, 10, 60, 300, 1800, 7200, 43_200, 172_800)
ADMISSION_WAIT = Histogram("finetune_admission_wait_seconds", "Time that an admitted job waited for its GPUs", ["queue"], buckets=_WAITS)
FINISHED = Counter("finetune_jobs_finished_total", "Jobs that ended", ["result", "reason"])
RESTARTS = Counter("finetune_restarts_total", "Attempts that ended and are followed by another", ["cause"])
GPU_SECONDS = Counter("finetune_gpu_seconds_total", "GPU time that ended attempts held", ["namespace", "queue"])
LOST_SECONDS = Counter("finetune_lost_seconds_total", "Training since the last checkpoint that ended attempts lost", ["namespace"])
QUEUED_SECONDS = Counter("finetune_queued_seconds_total", "Time that jobs waited for their GPUs", ["namespace", "queue"])
COST = Counter("finetune_cost_total", "Price of the GPU time, where its flavor has one", ["namespace", "queue"])
_JOB = ["namespace", "name"]
TRAINING_STEP = Gauge("finetune_training_step", "Optimizer steps done, of jobs that train now", _JOB)
TRAINING_TOTAL_STEPS = Gauge("finetune_training_total_steps", "Optimizer steps in all, of jobs that train now", _JOB)
TRAINING_LOSS = Gauge("finetune_training_loss", "Loss of the last step, of jobs that train now", _JOB)
TOKENS_PER_SECOND = Gauge("finetune_training_tokens_per_second", "Tokens per second over all workers, of jobs that train now", _JOB)
REPORTED_AT = Gauge("finetune_training_reported_timestamp_seconds", "When rank 0 was last heard of, of jobs that train now", _JOB)
PENDING = Gauge("finetune_queue_pending_jobs", "Jobs that wait in a queue, and endpoints that wait for replicas", ["queue"])
QUEUE_USED = Gauge("finetune_queue_used", "Units of a flavor that a queue's jobs and endpoints hold", ["queue", "flavor"])
UNREADABLE = Counter("finetune_unreadable_objects_total", "Objects that were passed by since they cannot be read", ["kind"])
ENDPOINT_READY = Gauge("finetune_endpoint_ready_replicas", "Replicas of a FineTuneEndpoint that answer", _JOB)
ENDPOINT_UNVERIFIED = Gauge(
    "finetune_endpoint_unverified", "Versions on replicas that do not answer as they were evaluated, or were not let in", _JOB
)
ENDPOINT_ROLLED_BACK = Gauge("finetune_endpoint_rolled_back", "Models whose new champion went back, and is not tried again", _JOB)
OF_ENDPOINTS = (ENDPOINT_READY, ENDPOINT_UNVERIFIED, ENDPOINT_ROLLED_BACK)
OF_TRAINING = (TRAINING_STEP, TRAINING_TOTAL_STEPS, TRAINING_LOSS, TOKENS_PER_SECOND, REPORTED_AT)
_OF_THE_LEADER = (JOBS, SUSPECT_NODES, *OF_TRAINING, *OF_ENDPOINTS, PENDING, QUEUE_USED)
_API_REASONS = frozenset(
    # metav1.StatusReason, and the operator's own
    [
        "Unauthorized",
        "Forbidden",
        "NotFound",
        "AlreadyExists",
        "Conflict",
        "Gone",
        "Invalid",
        "ServerTimeout",
        "StoreReadError",
        "Timeout",
        "TooManyRequests",
        "BadRequest",
        "MethodNotAllowed",
        "NotAcceptable",
        "RequestEntityTooLarge",
        "UnsupportedMediaType",
        "InternalError",
        "Expired",
        "ServiceUnavailable",
        "Unreachable",
        "BrokenAnswer",
        "NameTaken",
        "Error",
    ]
)


def export(*, acts: bool, phases: Mapping[str, int], storage_unready: int = 0) -> None:
    """Before a scrape: who acts, and how many jobs are in each phase. The others say nothing of jobs: they would count double."""
    LEADER.set(int(acts))
    STORAGE_UNREADY.set(storage_unready if acts else 0)
    if not acts:
        for gauge in _OF_THE_LEADER:
            gauge.clear()
        return
    counts = dict.fromkeys(get_args(Phase), 0)
    for phase, count in phases.items():
        label = phase if phase in counts else OTHER
        counts[label] = counts.get(label, 0) + count
    JOBS.clear()
    for phase, count in counts.items():
        JOBS.labels(phase=phase).set(count)


def api_reason(reason: str) -> str:
    """The label of an answer's reason: a webhook of somebody else's may answer with any word."""
    return reason if reason in _API_REASONS else OTHER
