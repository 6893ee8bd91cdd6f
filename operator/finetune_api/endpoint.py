"""FineTuneEndpoint: serves a base and any number of tuned models, and says what each replica was found to answer as."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import APIModel, Rule, Unique
from .queue import NamespaceSelector
from .scalars import ABSOLUTE_PATH, Count, DecimalText, DNSLabel, DNSSubdomain, Duration, LabelKey, Name, Timestamp, Told, Word
from .spec.model import Model
from .spec.run import Resources, Scheduling, Toleration
from .status import Condition, Status
from .uris import BaseURI
from .versions import VersionNumber

ENDPOINT_KIND, ENDPOINT_PLURAL = "FineTuneEndpoint", "finetuneendpoints"
MOST_REPLICAS = 64
MOST_MODELS = 64
"""That a status has room for, and an order."""
ModelName = Annotated[str, Told(253)]
"""A FineTunedModel's name, or NAME@VERSION."""


class ServedModel(APIModel):
    """A FineTunedModel of the endpoint's namespace."""

    name: DNSSubdomain
    """Its name, under which its champion answers."""
    versions: Annotated[list[VersionNumber], Field(max_length=8), Unique()] = []
    """Versions that answer as NAME@VERSION besides; the champion always does."""


class Rollout(APIModel):
    """How a new champion takes over: a share of the requests first, judged beside the old one."""

    steps: Annotated[list[Annotated[int, Field(ge=1, le=99)]], Field(max_length=8)] = [10, 50]
    """Percent of the requests that it gets, step by step. Empty: all at once, after verification."""
    interval: Duration = "10m"
    """Least time of a step."""
    min_requests: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    """Fewest requests that the new one has to answer in a step before the next."""


class ExternalEngine(APIModel):
    """vLLM replicas that somebody else runs."""

    service: DNSLabel
    """Service of the endpoint's namespace in front of them; the ready addresses of its EndpointSlices are the replicas."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port of the replicas, which speak plain HTTP there."""
    adapters_path: Annotated[str, Field(max_length=512), ABSOLUTE_PATH] = "/adapters"
    """Folder in which the replicas see what `spec.storage` of the models holds below `versions/`, by NAMESPACE/MODEL/VERSION."""


class EndpointBase(Model):
    """What is served under the endpoint's own name."""

    uri: BaseURI
    """Where the base model is: `hf://ORG/MODEL[@REVISION]`, `pvc://CLAIM/PATH`, `s3://BUCKET/PREFIX`, `oci://HOST/REPOSITORY[:TAG]` or `mlflow://HOST/MODEL[@ALIAS]`; or `model://FINETUNEDMODEL[@VERSION]`, a whole model of the namespace: its champion, or that version."""

    RULES = (
        *Model.RULES,
        Rule(
            cel="!has(self.secretRef) || !self.uri.startsWith('model://')",
            message="base.secretRef is not used with a model:// uri, whose FineTunedModel has its own; remove it or change base.uri",
            holds=lambda m: m.secret_ref is None or not m.uri.startswith("model://"),
        ),
    )


class FineTuneEndpointSpec(APIModel):
    """What is served, by how many replicas, on which hardware."""

    engine: Literal["vllm", "external"] = "vllm"
    """`vllm`: pods of this endpoint. `external`: replicas that are there already."""
    base: EndpointBase
    """The base model, which answers under the endpoint's own name. A whole model of a FineTunedModel answers under that one's name, too, and as NAME@VERSION."""
    models: Annotated[
        list[ServedModel],
        Field(max_length=32, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}),
    ] = []
    """FineTunedModels that it serves."""
    model_selector: NamespaceSelector | None = None
    """Also those of its namespace with these labels."""
    replicas: Annotated[int, Field(ge=0, le=MOST_REPLICAS)] = 1
    """Pods that serve. Of engine external: as many as there are."""
    gpus_per_replica: Annotated[int, Field(ge=0, le=16)] = 1
    """GPUs of each; 0 serves on CPU, where an administrator allows it."""
    max_lora_rank: Annotated[int, Field(ge=1, le=512)] = 64
    """Largest rank of an adapter that can be loaded; the engine reserves the next size that it has: 8, 16, 32, 64, 128, 256 or 512."""
    max_model_length: Annotated[int, Field(ge=16, le=10_000_000)] | None = None
    """Longest prompt and answer in tokens. Unset: the base's own."""
    resources: Resources = Field(default_factory=Resources)
    """CPU, memory and shared memory of each replica."""
    scheduling: Scheduling = Field(default_factory=Scheduling)
    """Queue, priority and node constraints."""
    rollout: Rollout = Field(default_factory=Rollout)
    """How a new champion takes over."""
    keep_loaded: Duration = "1h"
    """How long a champion stays loaded after another one took over: rolling back takes seconds."""
    verify_every: Duration = "1h"
    """How often every replica is asked its probes again."""
    external: ExternalEngine | None = None
    """Where the replicas of engine external are."""

    RULES = (
        Rule(
            cel="(self.engine == 'external') == has(self.external)",
            message="engine external and the block external belong together; set both or neither",
            holds=lambda m: (m.engine == "external") == (m.external is not None),
        ),
        Rule(
            cel="self.engine != 'external' || !self.base.uri.startsWith('model://')",
            message="base.uri: replicas that somebody else runs cannot be started with a model:// base; set engine to vllm, or name what they serve",
            holds=lambda m: m.engine != "external" or not m.base.uri.startswith("model://"),
        ),
        Rule(
            cel="!self.models.exists(m, self.base.uri == 'model://' + m.name || self.base.uri.startsWith('model://' + m.name + '@'))",
            message="models: the base is that FineTunedModel already, and answers under its name; remove it from models",
            holds=lambda m: all(m.base.uri.partition("@")[0] != f"model://{served.name}" for served in m.models),
        ),
    )


Verification = Literal["Pending", "Loaded", "Verified", "Mismatch", "Unverifiable", "Refused"]


class ReplicaModel(APIModel):
    """One version on one replica."""

    name: ModelName
    """NAME@VERSION."""
    state: Verification = "Pending"
    """Loaded: not asked yet. Refused: its files were not let in."""
    distance: DecimalText | None = None
    """Between tuned model and base over the probes, in nats a token."""
    message: Annotated[str, Told(512)] = ""
    """What was found."""
    verified_at: Timestamp | None = None
    """When it was last asked."""


class Replica(APIModel):
    """A pod, or an endpoint of the external Service."""

    name: Name
    """Name of the pod, or the address."""
    address: Word = ""
    """Where it is asked, for example 10.0.0.7:8000."""
    ready: bool = False
    """Whether it answers at all."""
    models: Annotated[list[ReplicaModel], Field(max_length=MOST_MODELS)] = []
    """What it serves."""


class Canary(APIModel):
    """A new champion on its way. Of a whole model: while replicas are replaced."""

    version: VersionNumber
    """Which."""
    step: Count = 0
    """Of spec.rollout.steps, from 0."""
    percent: Annotated[int, Field(ge=0, le=100)] = 0
    """Of the requests. Of a whole model: its share of the replicas."""
    since: Timestamp | None = None
    """When the step began."""
    requests: Count = 0
    """Answered by the new one in this step."""
    message: Annotated[str, Told(512)] = ""
    """What it waits for."""


class Retained(APIModel):
    """A version that answered under the model's name, and stays loaded for a while: rolling back takes seconds."""

    version: VersionNumber
    """Which."""
    until: Timestamp
    """When it is unloaded."""


class RollBack(APIModel):
    """A version that was on its way and went back. It is not tried again until the FineTunedModel's champion is another one."""

    version: VersionNumber
    """Which."""
    at: Timestamp
    """When."""
    message: Annotated[str, Told(512)] = ""
    """Why, with the numbers."""


class EndpointModel(APIModel):
    """A tuned model, over all replicas."""

    name: Name
    """FineTunedModel."""
    version: VersionNumber | None = None
    """Version that answers under its name."""
    digest: Word = ""
    """Of its files."""
    verified: Count = 0
    """Replicas that were found to serve it."""
    replicas: Count = 0
    """Replicas that are to."""
    verified_at: Timestamp | None = None
    """When all of them were last asked."""
    mismatch: Annotated[str, Told(512)] = ""
    """The first that is not: replica, and what was found."""
    canary: Canary | None = None
    """The version that is to take over."""
    kept: Annotated[list[VersionNumber], Field(max_length=8)] = []
    """Versions that stay loaded for a roll-back, or that spec.models names."""
    retained: Annotated[list[Retained], Field(max_length=8)] = []
    """Of those, the ones for a roll-back, and how long."""
    rolled_back: RollBack | None = None
    """The version that went back last."""


class EndpointAdmission(APIModel):
    """What its replicas may hold of a FineTuneQueue."""

    queue: Name | None = None
    """FineTuneQueue; unset without any."""
    flavor: Name | None = None
    """Its flavor, the same for all replicas."""
    replicas: Count = 0
    """Replicas that may run, and those beyond that still end."""
    gpus_per_replica: Count = 0
    """GPUs of each."""
    resource_name: Name = ""
    """What stands for a GPU."""
    node_labels: Annotated[dict[LabelKey, Word], Field(max_length=32)] = Field(default_factory=dict)
    """Labels of the flavor's nodes."""
    tolerations: Annotated[list[Toleration], Field(max_length=16)] = []
    """Taints of the flavor's nodes."""


class FineTuneEndpointStatus(Status):
    """What answers."""

    observed_generation: Count = 0
    """metadata.generation that this status was derived from."""
    conditions: Annotated[
        list[Condition],
        Field(max_length=8, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
    ] = Field(default_factory=list)
    """Ready: at least one replica answers. Admitted: the queue has room for all replicas. Verified: every replica serves what was evaluated. RolledBack: a canary went back, and why."""
    replicas: Count = 0
    """Pods."""
    ready_replicas: Count = 0
    """Those that answer."""
    selector: Annotated[str, Told(512)] = ""
    """Label selector of the pods, for the scale subresource."""
    models: Annotated[
        list[EndpointModel],
        Field(max_length=MOST_MODELS, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}),
    ] = Field(default_factory=list)
    """Each tuned model: which version, verified where."""
    pods: Annotated[
        list[Replica],
        Field(max_length=MOST_REPLICAS, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}),
    ] = Field(default_factory=list)
    """Each replica: where it is, and what it was found to serve."""
    admission: EndpointAdmission | None = None
    """What the FineTuneQueue has let it have. Unset where no queue of the operator's own is asked: on CPU, and with another scheduler."""
    models_verified: Word = ""
    """Models verified on every replica, of all: `2/3`."""
