"""FineTuneQueue: how many GPUs of which kind a team may use, and who goes first. Cluster-scoped."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import APIModel, Rule
from .scalars import Count, DecimalText, DNSLabel, Duration, LabelMap, Name, QualifiedName, Quantity, Timestamp, Told, quantity
from .spec.run import Toleration
from .status import Condition

QUEUE_KIND, QUEUE_PLURAL = "FineTuneQueue", "finetunequeues"
DEFAULT_QUEUE = "default"
"""Queue of jobs that name none, where their namespace names none either."""
ANNOTATION_QUEUE = "finetune.dev/queue"
"""On a namespace: the queue of its jobs that name none."""
Amount = Annotated[int, Field(ge=0, le=1_000_000)]


def _more_than_none(field: str) -> str:
    """CEL: a quantity has no minus sign, and is more than 0 where a digit before its suffix is."""
    return f"string({field}).matches('^[+]?[0-9.]*[1-9]')"


class Flavor(APIModel):
    """One kind of GPU. Queues of a cohort share what bears the same name."""

    name: DNSLabel
    """Name of the flavor, for example h100."""
    resource_name: QualifiedName = "nvidia.com/gpu"
    """Extended resource that it counts: GPUs, MIG slices or shared GPUs by their own names; cpu counts the cores of jobs without GPUs."""
    node_labels: LabelMap = Field(default_factory=dict)
    """Labels of the nodes that have it; the worker pods select them."""
    tolerations: Annotated[list[Toleration], Field(max_length=16)] = []
    """Taints of those nodes; the worker pods tolerate them."""
    nominal_quota: Amount
    """How many belong to this queue."""
    borrowing_limit: Amount | None = None
    """How many more it may use while others of its cohort leave theirs idle. Unset: all of them."""
    lending_limit: Amount | None = None
    """How many of its own it lends. Unset: all of them."""
    nodes: Literal["Existing", "Autoscaled"] = "Existing"
    """`Existing`: a gang is admitted when it fits on the nodes that are there. `Autoscaled`: within quota at once, nodes come when pods wait."""
    price_per_hour: Quantity | None = None
    """Price of one for an hour, in any currency, for example "2.50"; gives `status.usage.cost` of the jobs."""
    teraflops: Quantity | None = None
    """Dense 16-bit TFLOP/s of one by its data sheet (989 for an H100, 312 for an A100); gives an estimate of time and cost at admission, at 35 % of it."""

    RULES = (
        Rule(
            cel=f"!has(self.teraflops) || {_more_than_none('self.teraflops')}",
            message="flavors[].teraflops must be more than 0; remove it where it is not known",
            holds=lambda m: m.teraflops is None or quantity(m.teraflops) > 0,
        ),
    )


class LabelRequirement(APIModel):
    """A requirement on a label, as in metav1.LabelSelector."""

    key: QualifiedName
    """Label key."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    """`In`, `NotIn`, `Exists` or `DoesNotExist`."""
    values: Annotated[list[Annotated[str, Field(max_length=63)]], Field(max_length=64)] = []
    """Values for `In` and `NotIn`."""


class NamespaceSelector(APIModel):
    """Namespaces by their labels. All of it must hold; an empty one selects every namespace."""

    match_labels: LabelMap = Field(default_factory=dict)
    """Labels that a namespace must have."""
    match_expressions: Annotated[list[LabelRequirement], Field(max_length=16)] = []
    """Requirements on its labels."""

    def selects(self, labels: dict[str, str]) -> bool:
        """Whether a namespace with these labels is selected."""
        if any(labels.get(key) != value for key, value in self.match_labels.items()):
            return False
        for rule in self.match_expressions:
            there = rule.key in labels
            holds = {
                "In": there and labels.get(rule.key) in rule.values,
                "NotIn": not there or labels.get(rule.key) not in rule.values,
                "Exists": there,
                "DoesNotExist": not there,
            }[rule.operator]
            if not holds:
                return False
        return True


class QueuePreemption(APIModel):
    """When running jobs are asked to save and give way. They keep their place and go on from their checkpoint."""

    within_queue: Literal["Never", "LowerPriority"] = "LowerPriority"
    """Whether a job may displace jobs of lower priority in this queue."""
    reclaim_within_cohort: Literal["Never", "LowerPriority", "Any"] = "Any"
    """Which jobs of queues that have borrowed are displaced when this queue wants its own quota back."""
    fair_sharing: bool = False
    """Whether this queue may also borrow what queues with a larger share have borrowed, down to an equal share."""
    minimum_run_time: Duration = "10m"
    """Jobs of this queue are not displaced before they had their GPUs so long."""


class QueueLimits(APIModel):
    """What one namespace, and one user, may have of the queue."""

    max_gpus_per_namespace: Amount | None = None
    """Most units of all flavors that one namespace's jobs and endpoints hold at a time."""
    max_jobs_per_namespace: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Most jobs of one namespace that hold GPUs at a time."""
    max_gpus_per_user: Amount | None = None
    """Most units of all flavors that one user's jobs hold at a time. Users are those that created the jobs, as the operator's webhook notes them."""
    max_jobs_per_user: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Most jobs of one user that hold GPUs at a time."""
    max_priority: Annotated[int, Field(ge=-2_147_483_648, le=2_000_000_000)] | None = None
    """Highest priority that counts here; jobs of higher classes wait and run with this one."""


class FineTuneQueueSpec(APIModel):
    """Quota, order and rights of a queue."""

    cohort: DNSLabel | None = None
    """Queues of one cohort lend each other what they do not use. Unset: nothing is lent or borrowed."""
    weight: Quantity = "1"
    """Share of the cohort's idle GPUs that this queue gets, relative to the others, for example 2 or "0.5"."""
    flavors: Annotated[
        list[Flavor],
        Field(min_length=1, max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}),
    ]
    """Kinds of GPUs; a job takes the first that has its resource name, its node labels and room."""
    namespace_selector: NamespaceSelector | None = None
    """Whose jobs may wait here. Unset: jobs of every namespace."""
    ordering: Literal["StrictFIFO", "BestEffortFIFO"] = "BestEffortFIFO"
    """`BestEffortFIFO` lets later jobs go first while the first has no room, `StrictFIFO` never."""
    backfill_for: Duration = "30m"
    """How long others may pass a job that waits; then what becomes free is kept for it."""
    preemption: QueuePreemption = Field(default_factory=QueuePreemption)
    """Who gives way to whom."""
    limits: QueueLimits = Field(default_factory=QueueLimits)
    """What one namespace, and one user, may have."""
    usage_half_life: Duration = "24h"
    """How fast past use is forgotten when shares are compared."""
    stop_policy: Literal["None", "Hold", "HoldAndDrain"] = "None"
    """`Hold` admits nothing more, `HoldAndDrain` also lets running jobs save and wait."""

    RULES = (
        Rule(
            cel=_more_than_none("self.weight"),
            message="weight must be more than 0; set stopPolicy to Hold for a queue that is to get nothing",
            holds=lambda m: quantity(m.weight) > 0,
        ),
        Rule(
            cel="self.flavors.all(f, !has(f.borrowingLimit) || has(self.cohort))",
            message="flavors[].borrowingLimit needs a cohort to borrow from: set cohort, or remove borrowingLimit",
            holds=lambda m: m.cohort is not None or all(f.borrowing_limit is None for f in m.flavors),
        ),
        Rule(
            cel="self.flavors.all(f, !has(f.lendingLimit) || has(self.cohort))",
            message="flavors[].lendingLimit needs a cohort to lend to: set cohort, or remove lendingLimit",
            holds=lambda m: m.cohort is not None or all(f.lending_limit is None for f in m.flavors),
        ),
    )


class FlavorUsage(APIModel):
    """What is used of a flavor."""

    name: Name
    """Name of the flavor."""
    nominal: Count = 0
    """The queue's own."""
    used: Count = 0
    """Held by its jobs and endpoints."""
    borrowed: Count = 0
    """Of those, what belongs to others of the cohort."""
    serving: Count = 0
    """Of those, what endpoints hold: they give way to nobody."""


class NamespaceUsage(APIModel):
    """Past use of one namespace."""

    name: Name
    """Namespace."""
    gpu_seconds: DecimalText = 0
    """GPU-seconds, those long ago counting less."""


class UsageHistory(APIModel):
    """Past use, by which shares are compared. Decays by half in every `usageHalfLife`."""

    gpu_seconds: DecimalText = 0
    """GPU-seconds of the queue, those long ago counting less."""
    namespaces: Annotated[list[NamespaceUsage], Field(max_length=256)] = []
    """By namespace, the largest first."""
    updated_at: Timestamp | None = None
    """When it was last counted."""


class Oldest(APIModel):
    """The job that waits longest."""

    job: Annotated[str, Told(512)]
    """namespace/name."""
    since: Timestamp
    """Since when."""


class FineTuneQueueStatus(APIModel):
    """Who has the GPUs, and who waits."""

    conditions: Annotated[
        list[Condition],
        Field(max_length=8, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
    ] = []
    """Active: whether jobs are admitted."""
    pending: Count = 0
    """Jobs that wait, and endpoints that wait for replicas."""
    admitted: Count = 0
    """Jobs and endpoints that hold GPUs."""
    flavors: Annotated[list[FlavorUsage], Field(max_length=16)] = []
    """Use of each flavor."""
    used: Count = 0
    """Units of all flavors in use."""
    nominal: Count = 0
    """Units of all flavors that belong to the queue."""
    borrowed: Count = 0
    """Units borrowed from others of the cohort."""
    serving: Count = 0
    """Units of those in use that endpoints hold."""
    share: DecimalText = 0
    """Weighted dominant share of the cohort, past use included; who has less goes first."""
    oldest_waiting: Oldest | None = None
    """The job that waits longest."""
    history: UsageHistory = Field(default_factory=UsageHistory)
    """Past use."""
