"""FineTuneEndpoints as the generic loop sees them: how one is observed, decided about, and who wakes it.

To observe one is also to tell its replicas what is on record that they are to serve: they answer with what they do serve.
Knows nothing of how anything is written, nor of which version answers.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import logging
import ssl
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import Any

from finetune_api import names
from finetune_api.endpoint import ENDPOINT_KIND, FineTuneEndpointSpec, FineTuneEndpointStatus
from finetune_api.lenient import read
from finetune_api.serving import CanaryTraffic, ReplicaReport
from finetune_api.status import Status
from finetune_api.tuned_model import MODEL_KIND, FineTunedModelStatus
from finetune_api.validation import InvalidDocument, parse_endpoint, parse_model

from .. import metrics
from ..cache.store import Store
from ..cluster.authority import REPLICA_PERIOD, Authority, ensure_authority, host_of
from ..cluster.errors import APIError
from ..cluster.replicas import Replicas
from ..cluster.transport import Cluster
from ..model.endpoint import ModelLine, ObservedEndpoint, ReplicaPod, replica_pod
from ..model.external import SERVICE_LABEL, as_pods, as_reports, external_replicas
from ..model.objects import Key, Object, as_object, key_of
from ..model.times import parse_time
from ..model.tuned_model import base_named
from ..reconcile.endpoint import expected, order, reconcile, refused
from ..reconcile.plan import Apply, Plan
from ..resources.endpoint import EndpointRef, metadata
from ..settings import Settings
from .controller import Kind
from .endpoint_demands import EndpointDemands

log = logging.getLogger("finetune.endpoints")
_AGAIN_SECONDS, _MISSING_SECONDS = 300.0, 15.0
"""What is not watched (Deployments, their budgets, Secrets) is applied again so often; sooner where pods are missing."""
_CLIENT_SECONDS = 86400.0
_MOST_MEASURED = 1000
QueueProblem = Callable[[str, str], str]
"""(namespace, queue) -> why it may not be used, or nothing."""


class Endpoints:
    """`queue_problem`: what is wrong with the queue that an endpoint names. `demands`: what queues have said to them."""

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        settings: Settings,
        queue_problem: QueueProblem = lambda namespace, queue: "",
        demands: EndpointDemands | None = None,
    ) -> None:
        self._demands = demands
        self.cluster, self.store, self.settings, self._queue_problem = cluster, store, settings, queue_problem
        self.replicas = Replicas()
        self._authority: Authority | None = None
        self._context: tuple[ssl.SSLContext, float] | None = None
        self._applied: dict[str, dict[tuple[str, str], tuple[str, float]]] = {}
        """By UID: what was applied lately of what is not watched, and when"""
        self._measured: dict[str, tuple[str, str]] = {}
        """By UID: namespace and name, of those with gauges"""
        self._restarts: dict[str, dict[str, int]] = {}
        """By UID, and by the pod's: how often its containers had started anew when it last said what it serves"""

    def kind(self) -> Kind[ObservedEndpoint]:
        """Their row."""
        return Kind(
            ENDPOINT_KIND,
            self.observe,
            self.reconcile,
            self.refused,
            self.unreadable,
            recorded=self.recorded,
            not_recorded=self.not_recorded,
            depends_on=(MODEL_KIND,),
            touched=self.touched,
        )

    def touched(self, kind: str, raw: Object) -> Iterable[Key]:
        """Endpoints of the namespace of a FineTunedModel: whoever names it, or selects it or did so."""
        name = raw["metadata"]["name"]
        for endpoint in self.store.endpoints.of_namespace(raw["metadata"]["namespace"]):
            spec = as_object(endpoint.get("spec"))
            named = found if isinstance(found := spec.get("models"), list) else []
            base = base_named(endpoint)
            if (
                (base is not None and base[0] == name)
                or spec.get("modelSelector") is not None
                or any(as_object(model).get("name") == name for model in named)
            ):
                yield key_of(endpoint)

    async def observe(self, key: Key) -> ObservedEndpoint | None:
        """What a decision about an endpoint may depend on. Raises APIError."""
        raw = self.store.endpoints.get(key)
        if raw is None:
            return None
        observed = self._known(raw)
        if (spec := observed.spec) is None:
            return observed
        try:
            authority = await self._trusted()
            observed = await (self._asked(observed, spec, authority) if spec.external is None else self._others(observed, spec, authority))
            if not raw["metadata"].get("deletionTimestamp"):
                observed = dataclasses.replace(observed, identity=await self._identity(observed, spec, authority))
        except APIError as failure:
            if failure.transient:
                raise
            return dataclasses.replace(observed, no_identity=f"a Secret for the certificates of replicas: {failure}")
        return observed

    def reconcile(self, observed: ObservedEndpoint) -> Plan[FineTuneEndpointStatus]:
        """What to do about it."""
        plan = reconcile(observed, self.settings)
        applied = self._applied.setdefault(observed.raw["metadata"]["uid"], {})
        for action in plan.actions:  # taken back where that fails
            if isinstance(action, Apply):
                meta = action.manifest["metadata"]
                applied[action.manifest["kind"], meta["name"]] = meta["annotations"][names.ANNOTATION_HASH], time.monotonic()
        self._measure(observed.raw, plan.status or observed.status)
        return plan

    def recorded(self, raw: Object, plan: Plan[FineTuneEndpointStatus]) -> None:
        """Its status was written."""
        if self._demands is not None:
            self._demands.recorded(raw)

    def not_recorded(self, observed: ObservedEndpoint, why: str) -> None:
        """What was to be done was not, or its status not written."""
        self.forget_applied(observed.raw["metadata"]["uid"])
        if self._demands is not None:
            self._demands.not_recorded(observed.raw, why)

    def refused(self, observed: ObservedEndpoint, why: str) -> Plan[FineTuneEndpointStatus]:
        """What to say when the API server refuses what was to be done."""
        self.forget_applied(observed.raw["metadata"]["uid"])
        return refused(observed, why)

    def unreadable(self, key: Key, why: str) -> tuple[Object, Plan[FineTuneEndpointStatus]] | None:
        """What to say of one whose pass failed for no reason that is known."""
        raw = self.store.endpoints.get(key)
        return None if raw is None else (raw, refused(self._known(raw), why, "Unreadable"))

    def forget_applied(self, uid: str) -> None:
        """It is not known whether what was to be applied was."""
        self._applied.pop(uid, None)

    def forget(self, uid: str) -> None:
        """An object is gone, and its numbers with it."""
        self._restarts.pop(uid, None)
        self._applied.pop(uid, None)
        if (labels := self._measured.pop(uid, None)) is not None:
            for gauge in metrics.OF_ENDPOINTS:
                with contextlib.suppress(KeyError):  # cleared while another operator acted
                    gauge.remove(*labels)

    def _measure(self, raw: Object, status: FineTuneEndpointStatus) -> None:
        """What alerts look at."""
        meta = raw["metadata"]
        if meta["uid"] not in self._measured and len(self._measured) >= _MOST_MEASURED:
            return
        labels = self._measured.setdefault(meta["uid"], (meta["namespace"], meta["name"]))
        bad = sum(model.state in ("Mismatch", "Refused") for replica in status.pods for model in replica.models)
        metrics.ENDPOINT_READY.labels(*labels).set(status.ready_replicas)
        metrics.ENDPOINT_UNVERIFIED.labels(*labels).set(bad)
        metrics.ENDPOINT_ROLLED_BACK.labels(*labels).set(sum(model.rolled_back is not None for model in status.models))

    # what is known

    def _known(self, raw: Object) -> ObservedEndpoint:
        meta = raw["metadata"]
        uid, namespace, now = meta["uid"], meta["namespace"], self.cluster.now()
        spec, invalid = _spec(raw)
        views = [view for view in self.store.labelled_pods(uid) if view.namespace == namespace]
        pods = tuple(pod for view in views if (pod := replica_pod(view)) is not None)
        queue = spec.scheduling.queue if spec is not None else None
        asks = self._demands is not None and self.settings.counts_quota
        room = self._demands.room(raw, now) if asks and self._demands is not None else None
        observed = ObservedEndpoint(
            endpoint=raw,
            spec=spec,
            invalid=invalid,
            status=_status(FineTuneEndpointStatus, raw),
            room=room,
            lines={line.name: line for model in self.store.models.of_namespace(namespace) if (line := _line(model)) is not None},
            pods=pods,
            emptied=frozenset(pod.uid for pod in pods if pod.restarts != self._restarts.get(uid, {}).get(pod.uid, pod.restarts)),
            canaries=bool(self.settings.serving_gateways),
            queue_problem=self._queue_problem(namespace, queue) if queue is not None else "",
            now=now,
        )
        missing = spec is not None and len(pods) < expected(observed, spec)
        return dataclasses.replace(observed, applied={**self._applied_lately(uid, missing), **self.store.owned(uid).applied})

    def _applied_lately(self, uid: str, pods_missing: bool) -> dict[tuple[str, str], str]:
        lasts = _MISSING_SECONDS if pods_missing else _AGAIN_SECONDS
        known = self._applied.get(uid, {})
        return {key: digest for key, (digest, at) in known.items() if time.monotonic() - at < lasts}

    # replicas and gateways

    async def _asked(self, observed: ObservedEndpoint, spec: FineTuneEndpointSpec, authority: Authority) -> ObservedEndpoint:
        uid = observed.raw["metadata"]["uid"]
        asked = {pod.uid: pod for pod in observed.pods if pod.ip}
        context = self._client(authority)
        told = await self.replicas.order({pod.uid: pod.ip for pod in asked.values()}, order(observed, spec), context, host_of(uid))
        reports = {pod: found for pod, found in told.items() if isinstance(found, ReplicaReport)}
        self._restarts[uid] = self._heard(uid, observed.pods, reports)
        # one that is still starting has nothing to say
        silent = {pod: found for pod, found in told.items() if isinstance(found, str) and asked[pod].ready}
        return dataclasses.replace(
            observed, reports=reports, silent=silent, emptied=observed.emptied - reports.keys(), traffic=await self._traffic(observed)
        )

    async def _others(self, observed: ObservedEndpoint, spec: FineTuneEndpointSpec, authority: Authority) -> ObservedEndpoint:
        """The same of replicas that somebody else runs: the endpoint's own pods are their agents."""
        assert spec.external is not None
        meta, agents = observed.raw["metadata"], observed.pods
        if taken := self._taken(observed.raw, spec.external.service):
            return dataclasses.replace(observed, pods=(), emptied=frozenset(), no_replicas=taken)
        try:
            service = await self.cluster.get("Service", meta["namespace"], spec.external.service)
            label = f"{SERVICE_LABEL}={spec.external.service}"
            slices = [one async for one in self.cluster.list("EndpointSlice", meta["namespace"], label)]
        except APIError as failure:
            if failure.transient:
                raise
            return dataclasses.replace(observed, pods=(), emptied=frozenset(), no_replicas=_not_seen(spec.external.service, failure))
        found = external_replicas(spec.external, service, slices)
        observed = dataclasses.replace(observed, pods=as_pods(found, agents), emptied=frozenset(), not_told_apart=found.not_told_apart)
        told = await self.replicas.order(
            {agent.uid: agent.ip for agent in agents if agent.ip}, order(observed, spec), self._client(authority), host_of(meta["uid"])
        )
        reports, silent = as_reports(told, [agent.uid for agent in agents if agent.ready], found.addresses)
        return dataclasses.replace(observed, reports=reports, silent=silent, traffic=await self._traffic(observed))

    def _taken(self, raw: Object, service: str) -> tuple[str, str] | None:
        """Two agents of one Service would unload each other's adapters: the older one has it."""
        meta = raw["metadata"]
        others = [
            (other["metadata"].get("creationTimestamp") or "", other["metadata"]["name"])
            for other in self.store.endpoints.of_namespace(meta["namespace"])
            if as_object(as_object(other.get("spec")).get("external")).get("service") == service
        ]
        if not others or (first := min(others)[1]) == meta["name"]:
            return None
        message = f"the replicas of Service {service} are those of FineTuneEndpoint {first}; name its models there, or another Service here"
        return "ServiceTaken", message

    def _heard(self, uid: str, pods: tuple[ReplicaPod, ...], reports: dict[str, ReplicaReport]) -> dict[str, int]:
        before = self._restarts.get(uid, {})
        return {pod.uid: pod.restarts if pod.uid in reports else before.get(pod.uid, pod.restarts) for pod in pods}

    async def _traffic(self, observed: ObservedEndpoint) -> tuple[CanaryTraffic, ...]:
        under_way = any(model.canary is not None and model.canary.since is not None for model in observed.status.models)
        if not under_way or not self.settings.serving_gateways:
            return ()
        meta = observed.raw["metadata"]
        found = await self.replicas.traffic(self.settings.serving_gateways) or ()
        return tuple(told for told in found if (told.namespace, told.endpoint) == (meta["namespace"], meta["name"]))

    # certificates

    async def _trusted(self) -> Authority:
        if self._authority is None:
            self._authority = await ensure_authority(self.cluster, self.settings)
        return self._authority

    def _client(self, authority: Authority) -> ssl.SSLContext:
        if self._context is None or time.monotonic() - self._context[1] > _CLIENT_SECONDS:
            self._context = authority.client_context(self.cluster.now()), time.monotonic()
        return self._context[0]

    async def _identity(self, observed: ObservedEndpoint, spec: FineTuneEndpointSpec, authority: Authority) -> str:
        """Name of the Secret with the replicas' certificate, which is there.

        Made here, and not by a plan: a key comes about by chance. It is created and never read, changed or deleted: the operator needs no
        right to look at Secrets of tenants. Another authority, or another year, is another Secret, and new pods with it.
        """
        meta = observed.raw["metadata"]
        name = f"{names.endpoint_name(meta['name'])}-tls-{authority.digest()}-{_period(meta, observed.now)}"
        applied = self._applied.setdefault(meta["uid"], {})
        known = applied.get(("Secret", name))
        if known is None or time.monotonic() - known[1] > _AGAIN_SECONDS:
            files = authority.replica(meta["uid"], observed.now)
            data = {file: base64.b64encode(text.encode()).decode() for file, text in files.items()}
            ref = EndpointRef(meta["name"], meta["namespace"], meta["uid"], spec)
            manifest = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata(ref, name), "type": "kubernetes.io/tls", "data": data}
            try:
                await self.cluster.create(manifest)
            except APIError as failure:
                if not failure.conflict:
                    raise
            applied["Secret", name] = "", time.monotonic()
        return name


def _not_seen(service: str, failure: APIError) -> tuple[str, str]:
    if failure.not_found:
        return "ServiceNotFound", f"spec.external.service: there is no Service {service} in this namespace; create it, or name another"
    return "RightsMissing", f"Service {service} and its EndpointSlices: {failure.message}; the chart's rights let the operator see them"


def _period(meta: Object, now: datetime) -> int:
    """Which certificate it is, counted from the endpoint's creation."""
    return max(0, (now - (parse_time(meta.get("creationTimestamp")) or now)) // timedelta(seconds=REPLICA_PERIOD.total_seconds()))


def _spec(raw: Object) -> tuple[FineTuneEndpointSpec | None, str]:
    try:
        return parse_endpoint(raw, strict=False), ""
    except InvalidDocument as failure:
        return None, str(failure)


def _line(raw: Object) -> ModelLine | None:
    """A FineTunedModel; None where it cannot be read, or is being deleted."""
    meta = raw["metadata"]
    if meta.get("deletionTimestamp"):
        return None
    try:
        spec = parse_model(raw, strict=False)
    except InvalidDocument:
        return None
    return ModelLine(name=meta["name"], labels=meta.get("labels") or {}, spec=spec, status=_status(FineTunedModelStatus, raw))


def _status(model: type[Any], raw: Object) -> Any:
    assert issubclass(model, Status)
    return read(model, raw.get("status"))
