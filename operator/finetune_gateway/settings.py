"""What an administrator sets: read once at start-up from the environment, which the chart writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from finetune_api.uris import STORAGE
from finetune_operator.settings import read

_DATABASE = re.compile(r"sqlite:///[^?]+|postgresql://[^/]*/[^/?]+(\?.*)?")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the gateway. Every field can be set as FINETUNE_GATEWAY_<NAME IN CAPITALS>."""

    namespace: str = "finetune-system"
    """Namespace the gateway runs in, with the Secret of its API keys."""
    watch_namespaces: tuple[str, ...] = ()
    """Only endpoints of these namespaces; none means the whole cluster."""
    host: str = ""
    """Address to listen at; empty: all."""
    port: int = 8080
    metrics_port: int = 9090
    audience: str = "finetune-gateway"
    """Tokens made for this audience are taken, beside those for the API server."""
    replicas: int = 1
    """Gateways that share the limits of a key: each lets its part through."""
    body_bytes: int = 4 * 2**20
    """Largest body of a request."""
    header_bytes: int = 32 * 2**10
    """Largest request line and headers."""
    header_seconds: float = 10.0
    """How long a connection may take to send them."""
    body_seconds: float = 30.0
    """How long a request may take to send its body."""
    keep_alive_seconds: float = 75.0
    """How long a connection may be idle between requests."""
    connections: int = 2000
    """Connections at once; what comes beyond is answered 503."""
    first_byte_seconds: float = 300.0
    """How long an answer may take to begin."""
    idle_seconds: float = 60.0
    """Longest silence within an answer."""
    total_seconds: float = 1800.0
    """Longest answer."""
    connect_seconds: float = 2.0
    """How long a replica may take to accept a connection."""
    tries: int = 3
    """Replicas that a request is sent to, one after the other, before its first byte."""
    leave_seconds: float = 5.0
    """How long after SIGTERM new requests are still taken, until no Service sends any."""
    drain_seconds: float = 60.0
    """How long running answers may go on then."""
    database: str = field(default="", repr=False)
    """URL of the store that keeps usage: sqlite:////FOLDER/FILE, or postgresql://USER:PASSWORD@HOST/NAME; empty: it is not kept."""
    flush_seconds: float = 5.0
    """Time between two writes of what was counted: a gateway that is killed loses so much of it."""
    usage_days: int = 400
    """How long usage is kept; 0: for ever."""

    fine_tuning_models: str = ""
    """File with the model map of the fine-tuning API (JSON or YAML); empty: there is no such API."""
    fine_tuning_storage: str = ""
    """Where its files are kept: s3://BUCKET/PREFIX. Keys come from the environment, as the AWS SDKs read them."""
    fine_tuning_s3_endpoint: str = ""
    """Address of an S3-compatible server; empty: AWS."""
    fine_tuning_secret: str = "finetune-files"
    """Secret of the jobs' namespaces with keys that may read there; empty: none, as for a bucket that anybody may read."""
    fine_tuning_file_bytes: int = 512 * 2**20
    """Largest file."""
    fine_tuning_key_account: str = "finetune-keys"
    """Service account of a namespace that its API keys act as towards Kubernetes."""
    fine_tuning_impersonate_users: bool = False
    """Whether it writes for holders of Kubernetes tokens, too: the gateway may then act as anybody."""

    def __post_init__(self) -> None:
        """Raises ValueError that names the variable."""
        for name in ("replicas", "body_bytes", "header_bytes", "connections", "tries", "fine_tuning_file_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"FINETUNE_GATEWAY_{name.upper()}={getattr(self, name)}: write 1 or more")
        for name, value in vars(self).items():
            if name.endswith("_seconds") and not 0 < value < float("inf"):
                raise ValueError(f"FINETUNE_GATEWAY_{name.upper()}={value}: write a number of seconds, more than 0")
        if self.usage_days < 0:
            raise ValueError(f"FINETUNE_GATEWAY_USAGE_DAYS={self.usage_days}: write a number of days, 0 for ever")
        if self.fine_tuning_models and not self.database:
            raise ValueError("FINETUNE_GATEWAY_FINE_TUNING_MODELS: files and events need FINETUNE_GATEWAY_DATABASE, too")
        storage = self.fine_tuning_storage
        if self.fine_tuning_models and (STORAGE.refusal(storage) is not None or not storage.startswith("s3://")):
            raise ValueError(f"FINETUNE_GATEWAY_FINE_TUNING_STORAGE={self.fine_tuning_storage}: write s3://BUCKET/PREFIX")
        if self.database and not _DATABASE.fullmatch(self.database):  # not told: it has a password
            raise ValueError("FINETUNE_GATEWAY_DATABASE: write sqlite:////FOLDER/FILE or postgresql://USER:PASSWORD@HOST/NAME")


def from_environment(environ: Mapping[str, str]) -> Settings:
    """Read FINETUNE_GATEWAY_* variables. Raises ValueError that names the variable."""
    return read(Settings, environ, "FINETUNE_GATEWAY_")
