"""What an administrator sets: read once at start-up from the environment, which the chart writes. Knows nothing of what it is for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TypeVar
from urllib.parse import urlsplit

from finetune_api.scalars import QUANTITY

BACKENDS = ("builtin", "kueue", "volcano", "none")
_QUANTITIES = ("stage_cpu", "stage_memory")
T = TypeVar("T")
_URLS = ("hub_endpoint", "s3_endpoint", "http_proxy", "https_proxy")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the operator. Every field can be set as FINETUNE_<NAME IN CAPITALS>."""

    network_policies: bool = False
    """Make a NetworkPolicy for each job: its pods are reached by each other alone, and reach no metadata service."""
    trainer_image: str = "finetune-trainer:latest"
    """Image of all stages."""
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    namespace: str = "finetune-system"
    """Namespace the operator runs in."""
    watch_namespaces: tuple[str, ...] = ()
    """Only these namespaces; none means the whole cluster."""
    service_name: str = "finetune-operator"
    """Service in front of the progress endpoint."""
    lease: str = ""
    """Lease in the operator's namespace that one of several replicas acts by; empty acts without (outside the cluster)."""
    lease_seconds: float = 15.0
    """How long a replica that vanished keeps the lease."""
    tls_secret: str = ""
    """Secret that keeps the progress endpoint's certificate; empty keeps it in memory (outside the cluster)."""
    tls_managed: bool = False
    """Somebody else (cert-manager) writes that Secret."""
    certificate_seconds: float = 60.0
    """Time between two looks at the certificate and at the webhooks' trust in it."""
    webhook_configuration: str = ""
    """Name of the webhook configurations that get the certificate authority; empty leaves them alone."""
    progress_port: int = 8443
    progress_url: str = ""
    """URL that pods report to; empty derives it from the Service; `none` switches reports off."""
    probe_port: int = 8080
    """Plain HTTP for /healthz and /metrics."""
    allow_cpu: bool = False
    """Let pods that asked for GPUs train on CPU: for clusters with pretended GPUs, never for real ones."""
    remote_code_namespaces: tuple[str, ...] = ()
    """Namespaces whose jobs may set model.trustRemoteCode; `*` means all."""
    allowed_hosts: tuple[str, ...] = ()
    """Hosts that data sets may be fetched from although their addresses are not public, such as a MinIO in the cluster."""
    hub_endpoint: str = ""
    """Mirror of the Hugging Face hub that every stage asks (HF_ENDPOINT); empty is huggingface.co."""
    s3_endpoint: str = ""
    """S3-compatible server of s3:// sources and targets that name none; empty is AWS."""
    http_proxy: str = ""
    https_proxy: str = ""
    """Proxies through which every stage reaches the net."""
    no_proxy: str = ""
    """What is reached without them, beside names of the cluster."""
    authorities_file: str = ""
    """PEM file with certificate authorities that every stage trusts beside the public ones."""
    serving_image: str = "vllm/vllm-openai:v0.32.0"
    """Image of the engine that endpoints serve with: vLLM."""
    serving_proxy_image: str = "nginxinc/nginx-unprivileged:1.29-alpine"
    """Image of the nginx in front of it."""
    serving_args: tuple[str, ...] = ()
    """More arguments of every engine."""
    serving_env: tuple[str, ...] = ()
    """More of its environment, each as NAME=VALUE."""
    serving_authority_secret: str = ""
    """Secret that keeps the authority of the certificates between the operator and replicas; empty: one of this process."""
    serving_gateways: str = ""
    """HOST:PORT at which every gateway tells what canaries answered, by all addresses of the host; empty: there is none, and a new
    champion takes over at once when it is verified."""
    operator_labels: tuple[str, ...] = ()
    """Labels of the operator's own pods, each as NAME=VALUE: who else asks a replica's agent is shut out by its NetworkPolicy."""
    gateway_labels: tuple[str, ...] = ()
    """The same of the gateway's pods, which reach the replicas from the operator's namespace."""
    stage_retries: int = 3
    """Retries of prepare, evaluate and publish after failures of the infrastructure."""
    backoff_base_seconds: float = 10.0
    """First back-off; doubles with each retry."""
    backoff_limit_seconds: float = 360.0
    queueing_backend: str = "builtin"
    """Who decides when a gang may start: `builtin`, or `kueue` or `volcano`, which then must be there; `none` starts each at once."""
    autoscaled: bool = False
    """Without any FineTuneQueue: nodes come when pods wait, so gangs are not held back until they fit on those that are there."""
    snapshot_seconds: float = 5.0
    """Time between two passes of the admission loop while jobs wait and nothing else changes than pods of others."""
    soon_seconds: float = 1.0
    """How long a status may wait for the next one, where nothing needs it on record: one write tells both."""
    status_interval_seconds: float = 5.0
    """Least time between two status writes that only carry progress."""
    tracing_endpoint: str = ""
    """URL of an OTLP collector that gets traces; empty sends none."""
    resync_seconds: float = 300.0
    """Time between two full LISTs that find what a dead watch hid."""
    api_qps: float = 50.0
    """Requests a second to the API server in the long run; what holds GPUs goes first, then status, then the rest."""
    api_burst: int = 100
    """Requests at once after a quiet time."""
    workers: int = 16
    """Jobs reconciled at the same time."""
    stage_cpu: str = "1"
    """CPU request of prepare, evaluate and publish pods."""
    stage_memory: str = "4Gi"
    """Memory request of prepare, evaluate and publish pods."""
    termination_grace_seconds: int = 120
    """Grace period of worker pods."""
    node_lost_seconds: int = 60
    """How long a node may be away before its workers are started elsewhere."""
    run_as_user: int = 1000
    ca_bundle: str = field(default="", repr=False)
    """PEM of the progress endpoint's certificate authority; filled in at start-up."""

    seal_secret: str = ""
    """Secret that keeps the key which the operator seals admissions with; empty: a key of this process (outside the cluster)."""
    seal_key: str = field(default="", repr=False)
    """Filled in at start-up from seal_secret."""
    authorities: str = field(default="", repr=False)
    """PEM of authorities_file; filled in at start-up."""

    def allows_remote_code(self, namespace: str) -> bool:
        """Whether jobs of the namespace may set model.trustRemoteCode."""
        return bool({"*", namespace} & set(self.remote_code_namespaces))

    @property
    def admits_itself(self) -> bool:
        """Whether this operator lets gangs start, not another scheduler."""
        return self.queueing_backend in ("builtin", "none")

    @property
    def counts_quota(self) -> bool:
        """Whether this operator's own queues have a say."""
        return self.queueing_backend == "builtin"

    @property
    def endpoint(self) -> str:
        """The URL that pods report progress to, or empty."""
        if self.progress_url:
            return "" if self.progress_url == "none" else self.progress_url
        return f"https://{self.service_name}.{self.namespace}.svc:{self.progress_port}"


def from_environment(environ: Mapping[str, str]) -> Settings:
    """Read FINETUNE_* variables. Raises ValueError that names the variable."""
    return read(Settings, environ, "FINETUNE_", _check)


def read(kind: type[T], environ: Mapping[str, str], prefix: str, check: Callable[[str, str], None] = lambda *_: None) -> T:
    """A dataclass of settings from the variables PREFIX<FIELD IN CAPITALS>. Raises ValueError that names the variable.

    `check(field, text)`: raises ValueError where the text is none that the field may have.
    """
    values: dict[str, object] = {}
    for item in fields(kind):  # type: ignore[arg-type]
        variable = f"{prefix}{item.name.upper()}"
        if variable not in environ:
            continue
        text = environ[variable]
        try:
            values[item.name] = _convert(text, item.default)
            check(item.name, text)
        except ValueError as failure:
            raise ValueError(f"{variable}={text!r}: {failure}") from None
    return kind(**values)


def _check(name: str, text: str) -> None:
    if name == "queueing_backend" and text not in BACKENDS:
        raise ValueError(f"write one of {', '.join(BACKENDS)}")
    if name in _QUANTITIES:
        QUANTITY.check(text)
    if name in _URLS and text and not urlsplit(text).hostname:
        raise ValueError("write an address, such as https://hub.example.com")


def _convert(text: str, default: object) -> object:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError("write true or false")
        return text.lower() == "true"
    if isinstance(default, int):
        return int(text)
    if isinstance(default, float):
        return float(text)
    if isinstance(default, tuple):
        return tuple(json.loads(text)) if text.startswith("[") else tuple(filter(None, text.split(",")))
    return text
