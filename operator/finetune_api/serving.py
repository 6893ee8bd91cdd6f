"""What the operator, a replica's agent and the gateway say to each other. Pure.

The operator sends each replica what it is to serve, and reads back what it serves; from each gateway it reads what a new champion
answered beside the old one. Neither keeps anything: the truth is in the FineTuneEndpoint's status and in the models' storage.
"""

from __future__ import annotations

import json
import math
from typing import Annotated

from pydantic import Field

from .base import APIModel
from .contract import Mounts
from .endpoint import MOST_MODELS, MOST_REPLICAS, EndpointBase, ModelName, ReplicaModel
from .scalars import Count, Name, Timestamp, Told, Word
from .versions import VersionNumber

AGENT_PORT, USER_PORT = 8443, 8080
"""Of a replica: the operator's, by mutual TLS, and the users'."""
ENGINE_LOCAL_PORT, AGENT_LOCAL_PORT = 8000, 8001
"""Of a replica, on its loopback alone: what the proxy stands in front of."""
MODELS_PATH = "/models"
"""At AGENT_PORT. PUT: a ReplicaOrder, answered with a ReplicaReport at once; GET: the report."""
CANARY_PATH = "/canary"
"""At the gateway's metrics port. GET: a list of CanaryTraffic."""


class ReplicaPaths:
    """Where things are in a replica's containers."""

    FILE = f"{Mounts.JOB}/replica.json"
    """ReplicaFile."""
    MODELS = "/models"
    """Written by the agent and its init container, read by the engine."""
    BASE = f"{MODELS}/base"
    """The base that is served: a link to its folder, which is in the same place for all of them."""
    PROXY = "/etc/finetune/proxy/nginx.conf"
    """The proxy's settings."""
    TLS = "/etc/finetune/tls"
    """The proxy's certificate (tls.crt, tls.key), and the authority of the operator's (ca.crt)."""


class ReplicaFile(APIModel):
    """replica.json: what a replica's agent and its init container know, mounted read-only."""

    name: str
    """FineTuneEndpoint: the name under which its base answers."""
    namespace: str
    uid: str
    base: EndpointBase
    """What is served, as the spec names it. Which version of a FineTunedModel, `fetch` is told by an OrderedModel."""
    max_lora_rank: Annotated[int, Field(ge=1)] = 64
    """Largest rank of an adapter that is let in."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Folder of each claim that the base and the models lie in, by `pvc://name`."""
    secrets: dict[str, str] = Field(default_factory=dict)
    """Folder of each Secret: the base's as `model`, those of FineTunedModels as `model-NAME`."""

    def dumps(self) -> str:
        """Deterministic JSON."""
        return json.dumps(self.to_wire(), sort_keys=True)


class OrderedModel(APIModel):
    """A version that a replica is to serve: an adapter by an order, a whole model from its engine's start."""

    name: ModelName
    """NAME@VERSION, under which it answers."""
    aliases: list[ModelName] = []
    """Other names that it answers under: NAME, where it is the champion."""
    model: Name
    """FineTunedModel."""
    number: VersionNumber
    """Its version."""
    storage: Annotated[str, Told(1024)]
    """`spec.storage` of the FineTunedModel; finetune_api/versions.py says what lies below."""
    s3_endpoint: str | None = None
    """Address of an S3-compatible server."""
    folder: Word = ""
    """Of a whole model: where below the version's folder its files are; empty: right there."""
    digest: Word
    """sha256 over its files' names and contents."""
    rank: Count | None = None
    """Largest rank of a LoRA adapter."""
    base_fingerprint: Word = ""
    """Of the base that it was tuned from; empty: not known."""


class ExternalEngines(APIModel):
    """Engines that somebody else runs: one agent, in a pod of its own, loads and asks them all."""

    addresses: Annotated[list[Name], Field(max_length=MOST_REPLICAS)] = []
    """HOST:PORT of each. One that is not in it any more is left as it is."""
    adapters_path: Annotated[str, Told(512)] = ""
    """Folder in which they see the versions, by NAMESPACE/MODEL/VERSION."""
    not_told_apart: Annotated[str, Told(512)] = ""
    """Why whoever answers there may be another one each time: versions are loaded once, and nobody is asked."""


class ReplicaOrder(APIModel):
    """Everything that a replica is to serve: what is not in it is unloaded."""

    generation: Count = 0
    """metadata.generation of the FineTuneEndpoint."""
    models: Annotated[list[OrderedModel], Field(max_length=MOST_MODELS)] = []
    """In the order in which they are to be loaded."""
    verify_before: Timestamp | None = None
    """What was last asked its probes before this is asked again."""
    external: ExternalEngines | None = None
    """Who is to serve it, where it is not the engine beside the agent."""


class EngineReport(APIModel):
    """What an external engine serves."""

    address: Name
    """HOST:PORT, as ordered."""
    ready: bool = False
    """Whether it answers."""
    engine: Word = ""
    """Its name and version."""
    message: Annotated[str, Told(1024)] = ""
    """Why it is not ready."""
    models: Annotated[list[ReplicaModel], Field(max_length=MOST_MODELS)] = []
    """Of those that were ordered, the ones of which something was found; and those that are still loaded."""


class ReplicaReport(APIModel):
    """What a replica serves."""

    generation: Count = 0
    """Of the order that it follows."""
    ready: bool = False
    """Whether the engine answers."""
    engine: Word = ""
    """Its name and version."""
    base_fingerprint: Word = ""
    """Of the base that it serves."""
    message: Annotated[str, Told(1024)] = ""
    """Why it is not ready."""
    models: Annotated[list[ReplicaModel], Field(max_length=MOST_MODELS)] = []
    """The whole model that is its base; every version that was ordered, and those that are still loaded."""
    engines: Annotated[list[EngineReport], Field(max_length=MOST_REPLICAS)] = []
    """Of external engines: each that was asked since the agent began."""


class ArmTraffic(APIModel):
    """What one version answered. Numbers of several gateways add up."""

    requests: Count = 0
    """Answered or failed."""
    errors: Count = 0
    """Failed by the replica's fault: 5xx, a broken connection, a time-out."""
    log_seconds: float = 0.0
    """Sum of the natural logarithms of the seconds until the first token."""
    log_seconds_squared: float = 0.0
    """Sum of their squares."""

    def with_request(self, seconds: float, *, failed: bool) -> ArmTraffic:
        """One request more. `seconds`: until the first token; of a failed one it does not count."""
        logarithm = math.log(max(seconds, 1e-6))
        return ArmTraffic(
            requests=self.requests + 1,
            errors=self.errors + int(failed),
            log_seconds=self.log_seconds + (0.0 if failed else logarithm),
            log_seconds_squared=self.log_seconds_squared + (0.0 if failed else logarithm**2),
        )

    def plus(self, other: ArmTraffic) -> ArmTraffic:
        """Both together."""
        return ArmTraffic(
            requests=self.requests + other.requests,
            errors=self.errors + other.errors,
            log_seconds=self.log_seconds + other.log_seconds,
            log_seconds_squared=self.log_seconds_squared + other.log_seconds_squared,
        )


class CanaryTraffic(APIModel):
    """What was answered since a canary's step began, as one gateway counted it; a gateway that starts anew begins at zero."""

    namespace: Name
    """Of the FineTuneEndpoint."""
    endpoint: Name
    """The FineTuneEndpoint."""
    model: Name
    """The FineTunedModel."""
    version: VersionNumber
    """The new one."""
    since: Timestamp
    """`since` of its canary in the status: counts of another step are another's."""
    old: ArmTraffic = Field(default_factory=ArmTraffic)
    """What the present champion answered."""
    new: ArmTraffic = Field(default_factory=ArmTraffic)
    """What the new one answered."""
