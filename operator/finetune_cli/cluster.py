"""The cluster as a user's kubeconfig shows it: objects of ours, and of FineTuneJobs their pods, logs and events."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any, get_args

from kubernetes import client, config

from finetune_api import API_VERSION, GROUP, KIND, PLURAL, VERSION, names
from finetune_api.contract import Stage
from finetune_api.endpoint import ENDPOINT_KIND, ENDPOINT_PLURAL
from finetune_api.tuned_model import MODEL_KIND, MODEL_PLURAL

Object = dict[str, Any]
_SECONDS = 30


class Refused(Exception):
    """The API server's words, for people."""

    def __init__(self, failure: client.ApiException) -> None:
        text = str(failure.body or failure.reason)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            text = str(json.loads(text)["message"])
        super().__init__(text)
        self.status = failure.status


def namespace_of(kubeconfig: str | None, context: str | None, given: str | None) -> str:
    """The namespace given, else that of the context."""
    if given is not None:
        return given
    contexts, active = config.list_kube_config_contexts(kubeconfig)
    chosen = next((c for c in contexts if c["name"] == context), active)
    return str((chosen.get("context") or {}).get("namespace") or "default")


class Objects:
    """Objects of one of our kinds, of one namespace or of all."""

    kind, plural = KIND, PLURAL

    def __init__(self, kubeconfig: str | None, context: str | None, namespace: str | None, *, everywhere: bool = False) -> None:
        connection = config.new_client_from_config(kubeconfig, context=context)
        self.namespace = namespace_of(kubeconfig, context, namespace)
        self._everywhere = everywhere
        self.core, self._custom = client.CoreV1Api(connection), client.CustomObjectsApi(connection)

    def _where(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self.namespace, self.plural

    def all(self) -> list[Object]:
        """All of them, the oldest first."""
        if self._everywhere:
            found: Object = self._custom.list_cluster_custom_object(GROUP, VERSION, self.plural, _request_timeout=_SECONDS)
        else:
            found = self._custom.list_namespaced_custom_object(*self._where(), _request_timeout=_SECONDS)
        items: list[Object] = found["items"]
        return sorted(items, key=lambda item: (item["metadata"]["creationTimestamp"], item["metadata"]["name"]))

    def get(self, name: str) -> Object:
        """One of them."""
        found: Object = self._custom.get_namespaced_custom_object(*self._where(), name, _request_timeout=_SECONDS)
        return found

    def create(self, metadata: Object, spec: Object, *, dry_run: bool = False) -> tuple[Object, list[str]]:
        """Make one: the object, and the API server's warnings."""
        body: Object = {"apiVersion": API_VERSION, "kind": self.kind, "metadata": {"namespace": self.namespace, **metadata}, "spec": spec}
        more = {"dry_run": "All"} if dry_run else {}
        where = (GROUP, VERSION, body["metadata"]["namespace"], self.plural)
        made, _, headers = self._custom.create_namespaced_custom_object_with_http_info(*where, body, _request_timeout=_SECONDS, **more)
        return made, _warnings(headers)

    def patch(self, name: str, spec: Object, *, seen: str | None = None) -> Object:
        """Change fields of its spec; with `seen` only if its resourceVersion still is that one, else it is refused with 409."""
        body: Object = {"spec": spec} if seen is None else {"metadata": {"resourceVersion": seen}, "spec": spec}
        changed: Object = self._custom.patch_namespaced_custom_object(*self._where(), name, body, _request_timeout=_SECONDS)
        return changed

    def delete(self, name: str) -> None:
        """Delete it with all that it owns."""
        self._custom.delete_namespaced_custom_object(*self._where(), name, _request_timeout=_SECONDS)


class Models(Objects):
    """FineTunedModels."""

    kind, plural = MODEL_KIND, MODEL_PLURAL


class Endpoints(Objects):
    """FineTuneEndpoints."""

    kind, plural = ENDPOINT_KIND, ENDPOINT_PLURAL


class Jobs(Objects):
    """FineTuneJobs, and what belongs to them."""

    def pods(self, job: Object) -> list[Any]:
        """Pods of a job, by stage and rank."""
        selector = f"{names.LABEL_JOB_UID}={job['metadata']['uid']}"
        found = self.core.list_namespaced_pod(self.namespace, label_selector=selector, _request_timeout=_SECONDS).items
        order = get_args(Stage)

        def place(pod: Any) -> tuple[int, int, str]:
            labels = pod.metadata.labels
            stage = labels.get(names.LABEL_STAGE, "")
            return order.index(stage) if stage in order else 9, int(labels.get(names.LABEL_RANK, 0)), pod.metadata.name

        return sorted(found, key=place)

    def events(self, job: Object) -> list[Any]:
        """What happened to it, the oldest first."""
        selector = f"involvedObject.uid={job['metadata']['uid']}"
        found = self.core.list_namespaced_event(self.namespace, field_selector=selector, _request_timeout=_SECONDS).items
        return sorted(found, key=lambda e: (e.last_timestamp or e.metadata.creation_timestamp, int(e.metadata.resource_version)))

    def log(self, pod: str, *, follow: bool = False, tail: int | None = None) -> Iterator[str]:
        """Lines of a pod's log; with `follow` until it ends."""
        more = {"tail_lines": tail} if tail is not None else {}
        answer = self.core.read_namespaced_pod_log(pod, self.namespace, follow=follow, _preload_content=False, **more)
        rest = b""
        for chunk in answer.stream(amt=None, decode_content=True):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
        if rest:
            yield rest.decode(errors="replace")


CREATED: dict[str, type[Objects]] = {kind.kind: kind for kind in (Jobs, Models, Endpoints)}
"""What users make, by kind."""


def _warnings(headers: Any) -> list[str]:
    found = headers.getlist("Warning") if hasattr(headers, "getlist") else [v for k, v in dict(headers).items() if k.lower() == "warning"]
    return [part.split('"')[1].replace('\\"', '"') if '"' in part else part for part in found]
