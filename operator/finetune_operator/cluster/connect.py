"""How the API server is found: by the pod's service account, or by a kubeconfig outside a cluster. Knows nothing of what is asked of it."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.request import getproxies

from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config

from .limits import RateLimit
from .transport import DEFAULT_BURST, DEFAULT_QPS, KubernetesCluster

_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


def _in_cluster() -> bool:
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and _TOKEN.exists()


async def connect(
    qps: float = DEFAULT_QPS, burst: int = DEFAULT_BURST, *, kubeconfig: str | None = None, context: str | None = None
) -> KubernetesCluster:
    """Connect with the pod's service account, or with the kubeconfig outside a cluster."""
    configuration = kubernetes_client.Configuration()
    configuration.disable_strict_ssl_verification = True  # see login.py
    if _in_cluster() and kubeconfig is None:
        kubernetes_config.load_incluster_config(client_configuration=configuration)
    else:
        await kubernetes_config.load_kube_config(kubeconfig, context=context, client_configuration=configuration)
    # else every request looks for ~/.netrc, in a thread
    configuration.client_session_kwargs = {"trust_env": bool(getproxies())}
    return KubernetesCluster(kubernetes_client.ApiClient(configuration), RateLimit(qps, burst))
