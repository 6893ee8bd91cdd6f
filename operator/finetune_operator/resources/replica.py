"""The containers of a replica: vLLM on the pod's loopback, its agent beside it, and nginx, by which alone both are reached. Pure.

Knows nothing of what is mounted where.
"""

from __future__ import annotations

from finetune_api.endpoint import MOST_MODELS, FineTuneEndpointSpec
from finetune_api.serving import AGENT_PORT, ENGINE_LOCAL_PORT, USER_PORT, OrderedModel, ReplicaPaths

from ..settings import Settings
from .common import Manifest

_RANKS = (8, 16, 32, 64, 128, 256, 512)
"""Sizes for which vLLM reserves."""
_ACTIVE_ADAPTERS = 4
"""That one batch may have; more are loaded, and swapped."""
_ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Else vLLM wants nine tenths of the node's memory for its cache (a GiB here), and its cores for itself."""
_START_SECONDS = 3600
"""That an engine may take to load its base."""


def lora_rank(wanted: int) -> int:
    """The next size that the engine has."""
    return next(size for size in _RANKS if size >= wanted)


def engine(names: list[str], spec: FineTuneEndpointSpec, settings: Settings, resources: Manifest, mounts: list[Manifest]) -> Manifest:
    """vLLM, whose base has these names. Its own doors stay shut: it listens on the pod's loopback."""
    base = ["--model", ReplicaPaths.BASE, "--served-model-name", *names]
    arguments = {
        "--host": "127.0.0.1",
        "--port": str(ENGINE_LOCAL_PORT),
        "--max-loras": str(_ACTIVE_ADAPTERS),
        "--max-cpu-loras": str(2 * MOST_MODELS),  # a champion is there twice, by its own name and by its model's
        "--max-lora-rank": str(lora_rank(spec.max_lora_rank)),
        **({"--max-model-len": str(spec.max_model_length)} if spec.max_model_length is not None else {}),
        **({"--tensor-parallel-size": str(spec.gpus_per_replica)} if spec.gpus_per_replica > 1 else {}),
    }
    flags = ["--enable-lora", *(["--trust-remote-code"] if spec.base.trust_remote_code else []), *settings.serving_args]
    env = {
        "HOME": "/tmp",
        "VLLM_CACHE_ROOT": "/tmp/vllm",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **(_ON_CPU if spec.gpus_per_replica == 0 else {}),
        **dict(entry.split("=", 1) for entry in settings.serving_env),
    }
    # the agent's word on the engine, through the proxy: nothing else reaches either
    health = {"httpGet": {"path": "/health", "port": USER_PORT, "scheme": "HTTP"}}
    return {
        "name": "vllm",
        "image": settings.serving_image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["python3", "-m", "vllm.entrypoints.openai.api_server"],
        "args": [*base, *(text for pair in arguments.items() for text in pair), *flags],
        "env": _env(env),
        "resources": resources,
        "startupProbe": {**health, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": _START_SECONDS // 5},
        "livenessProbe": {**health, "periodSeconds": 20, "timeoutSeconds": 10, "failureThreshold": 6},
        "readinessProbe": {**health, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 2},
        "volumeMounts": mounts,
    }


def _trainer(name: str, stage: str, settings: Settings, env: dict[str, str], mounts: list[Manifest], requests: Manifest) -> Manifest:
    return {
        "name": name,
        "image": settings.trainer_image,
        "imagePullPolicy": settings.image_pull_policy,
        "args": [stage],
        "env": _env(env),
        "resources": {"requests": requests},
        "volumeMounts": mounts,
    }


def fetch(settings: Settings, env: dict[str, str], mounts: list[Manifest], version: OrderedModel | None = None) -> Manifest:
    """Puts the base where the engine looks for it: fetched, or a link into its claim. `version`: the whole model that it is.

    Told here and not in replica.json, which all replicas share: one that starts anew while others are replaced has its own version.
    """
    container = _trainer("base", "fetch", settings, env, mounts, {"cpu": "500m", "memory": "1Gi"})
    if version is None:
        return container
    return {**container, "args": ["fetch", "--version", version.model_dump_json(by_alias=True, exclude_defaults=True)]}


def agent(settings: Settings, env: dict[str, str], mounts: list[Manifest], *, external: bool = False) -> Manifest:
    """Fetches and checks what is to be served, has the engine load it, and asks it its probes. `external`: many engines, of others."""
    container = _trainer("agent", "agent", settings, env, mounts, {"cpu": "100m", "memory": "1Gi"})
    return {**container, "args": ["agent", "--external"]} if external else container


def proxy(settings: Settings, mounts: list[Manifest], *, users: bool = True) -> Manifest:
    """Lets the users' paths through, where there are users, and the operator, by mutual TLS, to the agent."""
    http = [{"name": "http", "containerPort": USER_PORT, "protocol": "TCP"}] if users else []
    return {
        "name": "proxy",
        "image": settings.serving_proxy_image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["nginx", "-c", ReplicaPaths.PROXY, "-e", "stderr"],
        "ports": [*http, {"name": "agent", "containerPort": AGENT_PORT, "protocol": "TCP"}],
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}},
        "livenessProbe": {"tcpSocket": {"port": USER_PORT if users else AGENT_PORT}, "periodSeconds": 20, "timeoutSeconds": 5},
        "volumeMounts": mounts,
    }


def _env(env: dict[str, str]) -> list[Manifest]:
    return [{"name": name, "value": value} for name, value in sorted(env.items())]
