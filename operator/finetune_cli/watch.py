"""`finetune watch`: follow a job in a cluster."""

from __future__ import annotations

import time

from kubernetes import client, config
from rich.console import Console

from finetune_api import GROUP, PLURAL, VERSION
from finetune_api.lenient import read_status
from finetune_api.status import FineTuneJobStatus

from .cluster import namespace_of
from .view import JobView


def watch(name: str, namespace: str | None, kubeconfig: str | None, context: str | None, console: Console) -> int:
    """Draw until the job has ended. Returns the exit code: 0 succeeded, 1 failed, 2 not found."""
    config.load_kube_config(kubeconfig, context=context)
    namespace = namespace_of(kubeconfig, context, namespace)
    api = client.CustomObjectsApi()
    misses = 0

    def read() -> FineTuneJobStatus | None:
        nonlocal misses
        try:
            raw = api.get_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, name, _request_timeout=10)
            misses = 0
        except client.ApiException as failure:
            if failure.status == 404:
                return None
            raise
        return read_status(raw.get("status"))

    outcome = JobView(console, f"{namespace}/{name}").follow(read, lambda: time.sleep(1))
    if outcome == "Gone":
        console.print(f"FineTuneJob {namespace}/{name} is not there", style="bold red")
    return {"Succeeded": 0, "Failed": 1, "Gone": 2}[outcome]
