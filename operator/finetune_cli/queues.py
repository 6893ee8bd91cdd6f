"""`finetune queues`, `finetune why` and `finetune simulate`: who has the GPUs, who waits for what, and what would happen if."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune_api.endpoint import ENDPOINT_KIND, ENDPOINT_PLURAL
from finetune_api.lenient import read_status
from finetune_api.status import SAID_BY_OTHERS
from finetune_operator.cache.assumptions import Assumptions
from finetune_operator.cache.store import Store
from finetune_operator.cluster.connect import connect
from finetune_operator.cluster.errors import APIError
from finetune_operator.cluster.transport import KubernetesCluster
from finetune_operator.controllers.admission import AdmissionLoop
from finetune_operator.controllers.resync import SELECTOR
from finetune_operator.model.queueing import Decisions, Node, Queue, Snapshot, Workload
from finetune_operator.model.workload import request_of
from finetune_operator.queueing import decide
from finetune_operator.queueing.quota import UNLIMITED
from finetune_operator.settings import Settings

from .cluster import namespace_of
from .documents import read_jobs

_BAR = 20


class WrongInput(ValueError):
    """An argument that says nothing."""


class Reader:
    """The cluster as the operator sees it; nothing is written."""

    def __init__(self, kubeconfig: str | None, context: str | None) -> None:
        self._kubeconfig, self._context = kubeconfig, context
        self.store = Store()
        self._unseen: tuple[str, ...] = ()

    async def snapshot(self, console: Console) -> Snapshot:
        """Jobs, queues, nodes and pods; as far as the user may look, and he is told how far that is."""
        cluster = await connect(kubeconfig=self._kubeconfig, context=self._context)
        try:
            await self._fill(cluster)
            found = await AdmissionLoop(cluster, self.store, Assumptions(), Settings(), lambda _: None).look()
        finally:
            await cluster.close()
        if unseen := (*found.forbidden, *self._unseen):
            console.print(f"you may not list {', '.join(unseen)}: what follows is said without them", style="yellow")
        return dataclasses.replace(found, forbidden=())

    async def _fill(self, cluster: KubernetesCluster) -> None:
        async for raw in cluster.list("FineTuneJob"):
            self.store.put_job(raw)
        try:
            async for raw in cluster.list(ENDPOINT_KIND):
                self.store.endpoints.put(raw)
        except APIError as failure:
            if not failure.not_found and failure.status != 403:
                raise
            self._unseen = (ENDPOINT_PLURAL,) if failure.status == 403 else ()
        for kind in ("Pod", "Job"):
            async for raw in cluster.list(kind, "", SELECTOR):
                self.store.put_child(kind, raw)

    def namespace(self, given: str | None) -> str:
        """The namespace given, else that of the context."""
        return namespace_of(self._kubeconfig, self._context, given)


async def queues(reader: Reader, console: Console) -> int:
    """Use of every queue and flavor, and the jobs and endpoints that wait with what they wait for."""
    snapshot = await reader.snapshot(console)
    decisions = decide(snapshot)
    for name, report in decisions.queues.items():
        queue = next((q for q in snapshot.queues if q.name == name), None)
        title = f"queue {name}" if name else "no FineTuneQueue: one implicit queue over all nodes"
        cohort = f", cohort {queue.spec.cohort}, share {report.share:.2f}" if queue is not None and queue.spec.cohort is not None else ""
        if queue is not None and queue.unreadable:
            cohort += f", {queue.unreadable}"
        console.print(Text(f"{title}: {report.admitted} admitted, {report.pending} waiting{cohort}", style="bold"))
        for flavor in queue.spec.flavors if queue is not None else ():
            used, serving = report.used.get(flavor.name, 0), report.serving.get(flavor.name, 0)
            console.print(_usage(flavor.name, used, flavor.nominal_quota, serving), highlight=False)
        rows = [w for w in snapshot.workloads if (v := decisions.jobs.get(w.uid)) and v.action == "wait" and v.queue == name]
        for workload in sorted(rows, key=lambda w: decisions.jobs[w.uid].position or 10**9):
            decision = decisions.jobs[workload.uid]
            place = f"{decision.position}." if decision.position else " -"
            console.print(f"  {place:>4} {workload.label}: {decision.message}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _usage(name: str, used: int, nominal: int, serving: int) -> Text:
    full = min(_BAR, round(_BAR * used / nominal)) if nominal else 0
    line = Text(f"  {name:<16} ")
    line.append("█" * full, style="green" if used <= nominal else "yellow").append("░" * (_BAR - full), style="dim")
    served = f", {serving} by endpoints" if serving else ""
    return line.append(f" {used} of {nominal}" + (f", {used - nominal} borrowed" if used > nominal else "") + served)


async def why(reader: Reader, name: str, namespace: str | None, console: Console) -> int:
    """What a job waits for, or what it holds."""
    space = reader.namespace(namespace)
    snapshot = await reader.snapshot(console)
    raw = reader.store.job((space, name))
    if raw is None:
        console.print(f"FineTuneJob {space}/{name} is not there", style="bold red")
        return 2
    status = read_status(raw.get("status"))
    decision = decide(snapshot).jobs.get(raw["metadata"]["uid"])
    console.print(f"{space}/{name}: {status.phase}", style="bold", highlight=False)
    for condition in status.conditions:
        if condition.type not in SAID_BY_OTHERS and (condition.status != "True" or condition.type in ("Failed", "Admitted")):
            console.print(f"  {condition.type}={condition.status} {condition.reason}: {condition.message}", markup=False, highlight=False)
    if decision is not None and decision.action == "wait":
        place = f"position {decision.position} in " if decision.position else ""
        queue = f"queue {decision.queue}" if decision.queue else "the implicit queue"
        console.print(f"  {place}{queue}: {decision.message}", markup=False, highlight=False, style="yellow")
    elif decision is not None and decision.message:
        console.print(f"  {decision.action}: {decision.message}", markup=False, highlight=False)
    return 0


async def simulate(reader: Reader, files: list[Path], quotas: list[str], nodes: list[str], namespace: str | None, console: Console) -> int:
    """Decide with and without the jobs, quotas and nodes given, and show what would change. Raises WrongInput, InvalidDocument."""
    space = reader.namespace(namespace)
    now = await reader.snapshot(console)
    then = dataclasses.replace(
        now,
        workloads=(*now.workloads, *(w for path in files for w in _extra(path, space, now))),
        queues=_with_quotas(now.queues, quotas),
        nodes=(*now.nodes, *_machines(nodes, now)) if now.nodes is not None else None,
    )
    before, after = decide(now), decide(then)
    table = Table("job", "now", "then", box=None)
    for workload in then.workloads:
        old, new = _outcome(before, workload.uid), _outcome(after, workload.uid)
        if old != new:
            table.add_row(workload.label, old, new)
    console.print(table if table.row_count else "nothing would change")
    return 0


def _extra(path: Path, namespace: str, snapshot: Snapshot) -> Iterable[Workload]:
    for metadata, spec in read_jobs(path):
        name = str(metadata.get("name") or metadata.get("generateName"))
        yield Workload(
            uid=f"simulated-{name}",
            namespace=str(metadata.get("namespace") or namespace),
            name=f"{name} (simulated)",
            queue=spec.scheduling.queue,
            since=snapshot.now,
            waits_since=snapshot.now,
            request=request_of(spec),
            waits=True,
        )


def _with_quotas(queues: tuple[Queue, ...], changes: list[str]) -> tuple[Queue, ...]:
    found = {queue.name: queue for queue in queues}
    for change in changes:
        match = re.fullmatch(r"([^/=]+)/([^/=]+)=(\d+)", change)
        queue = found.get(match.group(1)) if match else None
        if match is None or queue is None or match.group(2) not in {f.name for f in queue.spec.flavors}:
            known = ", ".join(f"{q.name}/{f.name}" for q in queues for f in q.spec.flavors) or "none"
            raise WrongInput(f"--quota {change}: write QUEUE/FLAVOR=UNITS; there are: {known}")
        quota = min(UNLIMITED, int(match.group(3)))
        flavors = [f.model_copy(update={"nominal_quota": quota}) if f.name == match.group(2) else f for f in queue.spec.flavors]
        found[queue.name] = dataclasses.replace(queue, spec=queue.spec.model_copy(update={"flavors": flavors}))
    return tuple(found.values())


def _machines(like: list[str], snapshot: Snapshot) -> Iterable[Node]:
    known = {node.name: node for node in snapshot.nodes or ()}
    for text in like:
        name, _, count = text.partition("=")
        if name not in known or not (count or "1").isdigit():
            raise WrongInput(
                f"--node {text}: write NODE or NODE=COUNT for nodes like one that is there: {', '.join(sorted(known)) or 'none'}"
            )
        for n in range(int(count or 1)):
            yield dataclasses.replace(known[name], name=f"{name}-simulated-{n}", used={}, away="")


def _outcome(decisions: Decisions, uid: str) -> str:
    decision = decisions.jobs.get(uid)
    if decision is None:
        return "-"
    words: dict[str, Any] = {"admit": "starts", "keep": "runs on", "preempt": "gives way", "resize": "grows", "refuse": "is refused"}
    return words.get(decision.action) or f"waits: {decision.message}"
