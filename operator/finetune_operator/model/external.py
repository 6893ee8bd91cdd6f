"""Replicas that somebody else runs, as the Service in front of them tells of them. Knows nothing of what they serve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from finetune_api.base import shortened
from finetune_api.endpoint import MOST_REPLICAS, ExternalEngine
from finetune_api.scalars import printable
from finetune_api.serving import EngineReport, ReplicaReport

from .endpoint import ReplicaPod
from .objects import Object, as_object

SERVICE_LABEL = "kubernetes.io/service-name"
"""Of an EndpointSlice."""


@dataclass(frozen=True, kw_only=True)
class ExternalReplicas:
    """Where they are."""

    addresses: tuple[str, ...] = ()
    """HOST:PORT of each."""
    not_told_apart: str = ""
    """Why there is one address for all of them."""


def external_replicas(external: ExternalEngine, service: Object, slices: Iterable[Object]) -> ExternalReplicas:
    """The ready addresses behind a Service, of one family; the Service's own where those of its replicas are not known."""
    name, namespace, spec = service["metadata"]["name"], service["metadata"]["namespace"], as_object(service.get("spec"))
    found = [one for one in slices if one.get("addressType") in ("IPv4", "IPv6")]
    if not found and (why := _no_addresses(spec)):
        message = f"Service {name} {why}: replicas cannot be asked one by one, and which of them answer as a version is not known"
        return ExternalReplicas(addresses=(f"{name}.{namespace}.svc:{external.port}",), not_told_apart=message)
    family = "IPv4" if any(one["addressType"] == "IPv4" for one in found) else "IPv6"
    hosts = {host for one in found if one["addressType"] == family for endpoint in _list(one, "endpoints") if (host := _ready(endpoint))}
    form = f"[{{}}]:{external.port}" if family == "IPv6" else f"{{}}:{external.port}"
    return ExternalReplicas(addresses=tuple(sorted(form.format(host) for host in hosts))[:MOST_REPLICAS])


def _no_addresses(spec: Object) -> str:
    if spec.get("type") == "ExternalName":
        return "is of type ExternalName"
    return "" if spec.get("selector") else "has no selector, and no EndpointSlices of IP addresses"


def _ready(endpoint: object) -> str:
    """An endpoint's address; those beside it are the same one's."""
    found = as_object(endpoint)
    conditions, addresses = as_object(found.get("conditions")), _list(found, "addresses")
    return str(addresses[0]) if addresses and conditions.get("ready") is not False else ""


def _list(of: Object, field: str) -> list[object]:
    found = of.get(field)
    return found if isinstance(found, list) else []


def as_pods(found: ExternalReplicas, agents: Iterable[ReplicaPod]) -> tuple[ReplicaPod, ...]:
    """The replicas in the place of an endpoint's own pods. `agents`: the pods from which they are asked."""
    problems = [f"its agent {agent.name}: {agent.problem}" for agent in agents if agent.problem]
    problem = shortened(problems[0], 300) if problems else ""
    return tuple(ReplicaPod(name=one, uid=one, address=one, ready=True, problem=problem) for one in found.addresses)


def as_reports(
    told: Mapping[str, ReplicaReport | str], ready: Iterable[str], addresses: Iterable[str]
) -> tuple[dict[str, ReplicaReport], dict[str, str]]:
    """What each replica serves, by address, and why others say nothing. `told`: by agent. `ready`: agents that have started."""
    heard = [report for report in told.values() if isinstance(report, ReplicaReport)]
    engines: dict[str, EngineReport] = {engine.address: engine for report in heard for engine in report.engines}
    reports = {
        address: ReplicaReport(ready=engine.ready, engine=engine.engine, message=engine.message, models=engine.models)
        for address in addresses
        if (engine := engines.get(address)) is not None
    }
    if heard:
        return reports, {}
    why = next((f"its agent {printable(told[agent])}" for agent in ready if isinstance(told.get(agent), str)), "")  # type: ignore[arg-type]
    return reports, dict.fromkeys(addresses, why) if why else {}
