"""Replicas that somebody else runs: where they are, what is decided about them, and the agent that loads and asks them all.

The agent's engines are played: servers that answer as vLLM does for what they have loaded. tests/serving has a real one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from safetensors.numpy import save_file

from finetune_api.contract import SUMS
from finetune_api.endpoint import EndpointBase
from finetune_api.probing import Probe, ProbeAnswer, Probes
from finetune_api.serving import EngineReport, ExternalEngines, OrderedModel, ReplicaFile, ReplicaOrder, ReplicaReport
from finetune_api.validation import InvalidDocument, parse_endpoint
from finetune_api.versions import VersionPaths
from finetune_gateway.catalog import read_endpoint
from finetune_operator.cache.store import Store
from finetune_operator.cluster.authority import new_authority
from finetune_operator.cluster.errors import APIError
from finetune_operator.controllers.endpoints import Endpoints
from finetune_operator.model.endpoint import ReplicaPod
from finetune_operator.model.external import ExternalReplicas, as_pods, as_reports, external_replicas
from finetune_operator.reconcile.endpoint import order
from finetune_operator.reconcile.plan import Apply
from finetune_trainer.export.bundle import digests
from finetune_trainer.models.weights import ADAPTER, ADAPTER_CONFIG
from finetune_trainer.serving import agent as agents
from finetune_trainer.serving.checks import Base
from finetune_trainer.serving.external import Fleet
from finetune_trainer.serving.replica import context_of
from tests.factory import NOW

from .test_endpoint import SPEC, Scene, line

EXTERNAL = parse_endpoint({"spec": {**SPEC, "engine": "external", "external": {"service": "vllm"}}}).external
assert EXTERNAL is not None


def service(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "vllm", "namespace": "team-a"}, "spec": {"selector": {"app": "vllm"}, **spec}}


def endpoints(*addresses: str, family: str = "IPv4", ready: bool | None = True) -> dict[str, Any]:
    found = [{"addresses": [address, "10.9.9.9"], "conditions": {"ready": ready}} for address in addresses]
    return {"addressType": family, "endpoints": found}


@pytest.mark.parametrize(
    ("slices", "addresses"),
    [
        ([endpoints("10.0.0.2", "10.0.0.1"), endpoints("10.0.0.1", ready=None)], ("10.0.0.1:8000", "10.0.0.2:8000")),
        ([endpoints("10.0.0.1"), endpoints("fd00::1", family="IPv6")], ("10.0.0.1:8000",)),
        ([endpoints("fd00::1", family="IPv6")], ("[fd00::1]:8000",)),
        ([endpoints("10.0.0.1", ready=False), {"addressType": "IPv4", "endpoints": None}], ()),
        ([], ()),
        ([{"addressType": "IPv4", "endpoints": [None, {"addresses": []}]}], ()),
    ],
)
def test_ready_addresses_of_one_family_are_the_replicas(slices: list[dict[str, Any]], addresses: tuple[str, ...]) -> None:
    assert external_replicas(EXTERNAL, service(), slices) == ExternalReplicas(addresses=addresses)


@pytest.mark.parametrize(
    ("raw", "slices", "why"),
    [
        (service(type="ExternalName", selector=None, externalName="vllm.example.com"), [], "ExternalName"),
        (service(selector=None), [endpoints("vllm.example.com", family="FQDN")], "no selector"),
        (service(selector=None), [endpoints("10.0.0.1")], ""),
    ],
)
def test_a_service_whose_replicas_have_no_addresses_is_one_address(raw: dict[str, Any], slices: list[dict[str, Any]], why: str) -> None:
    found = external_replicas(EXTERNAL, raw, slices)
    assert (why in found.not_told_apart) if why else not found.not_told_apart
    assert found.addresses == (("vllm.team-a.svc:8000",) if why else ("10.0.0.1:8000",))


def test_what_the_agent_says_is_each_replicas_report() -> None:
    engine = EngineReport(address="10.0.0.1:8000", ready=True, engine="vllm 1")
    gone = EngineReport(address="10.0.0.9:8000", ready=True)
    told = {"agent": ReplicaReport(engines=[engine, gone]), "older": "no answer within 4 s"}
    reports, silent = as_reports(told, ["agent", "older"], ["10.0.0.1:8000", "10.0.0.2:8000"])
    assert {name: report.engine for name, report in reports.items()} == {"10.0.0.1:8000": "vllm 1"} and silent == {}
    assert as_reports({"agent": "no answer"}, ["agent"], ["a:1"]) == ({}, {"a:1": "its agent no answer"})
    assert as_reports({"agent": "no answer"}, [], ["a:1"]) == ({}, {}), "it is still starting"


# decisions


class Others(Scene):
    """An endpoint of two addresses, by the words of an agent."""

    def __init__(self, *, not_told_apart: str = "", **changes: Any) -> None:
        super().__init__({**SPEC, "engine": "external", "external": {"service": "vllm"}, **changes}, pods=0)
        addresses = ("vllm.team-a.svc:8000",) if not_told_apart else ("10.0.0.1:8000", "10.0.0.2:8000")
        self.pods = list(as_pods(ExternalReplicas(addresses=addresses), []))
        self.found = {pod.uid: {} for pod in self.pods}
        self.more = {"not_told_apart": not_told_apart}


def test_replicas_of_others_are_served_as_ones_own_are() -> None:
    scene = Others()
    scene.goes(3)
    assert scene.model.version == 1 and scene.condition("Verified")[:2] == ("True", "Verified")
    assert [(pod.name, pod.address) for pod in scene.status.pods] == [(one, one) for one in ("10.0.0.1:8000", "10.0.0.2:8000")]
    assert (scene.status.replicas, scene.status.models_verified) == (2, "1/1")
    assert scene.condition("Ready")[2] == "2 of 2 replicas answer", "whatever spec.replicas says"
    observed = scene.observed
    assert observed.spec is not None
    assert order(observed, observed.spec).external == ExternalEngines(
        addresses=["10.0.0.1:8000", "10.0.0.2:8000"], adapters_path="/adapters", not_told_apart=""
    )
    kinds = [action.manifest["kind"] for action in scene.plan.actions if isinstance(action, Apply)]
    assert kinds == ["ConfigMap", "Deployment"]
    gateway = read_endpoint(json.dumps({"metadata": scene.meta, "status": scene.status.to_wire()}).encode())
    assert gateway.models["support"].versions == {1: ("10.0.0.1:8000", "10.0.0.2:8000")} and len(gateway.base) == 2
    assert scene.plan.requeue_at is not None and (scene.plan.requeue_at - scene.now).total_seconds() > 10, "nothing is awaited"


def test_an_agent_that_began_anew_takes_no_replica_from_its_users() -> None:
    """It says nothing of what it has not looked at yet; what it finds then counts."""
    scene = Others()
    scene.goes(3)
    address = scene.pods[0].uid
    reports = {**scene.observed.reports, address: ReplicaReport(ready=True)}
    scene.more = {"reports": reports}
    scene.goes()
    assert scene.model.verified == 2
    scene.more = {"reports": {**reports, address: ReplicaReport(ready=True, models=[{"name": "support@1", "state": "Mismatch"}])}}  # type: ignore[list-item]
    scene.goes()
    assert scene.model.verified == 1 and scene.condition("Verified")[:2] == ("False", "Mismatch")
    scene.more, scene.lines = {"reports": reports}, {}
    scene.goes()
    assert scene.status.pods[0].models == [], "what is not ordered any more is not kept"


def test_one_address_for_all_is_told_as_unverifiable() -> None:
    scene = Others(not_told_apart="Service vllm is of type ExternalName: ...")
    scene.found = {uid: {"support@1": "Unverifiable", "support@2": "Unverifiable"} for uid in scene.found}
    scene.goes(3)
    assert scene.model.version == 1 and scene.condition("Verified")[:2] == ("Unknown", "Unverifiable")
    assert scene.status.models_verified == "0/1"
    assert scene.status.pods[0].address == "vllm.team-a.svc:8000"
    gateway = read_endpoint(json.dumps({"metadata": scene.meta, "status": scene.status.to_wire()}).encode())
    assert gateway.base == () and list(gateway.names()) == [], "a name may lead anywhere"
    scene.lines = {"support": line(2)}
    scene.goes(2)
    assert scene.model.version == 2, "a gateway gives nobody there a share"


@pytest.mark.parametrize("pods", [False, True])
def test_what_is_not_there_is_told(pods: bool) -> None:
    scene = Others()
    if pods:
        agent = ReplicaPod(name="chat-endpoint-1", uid="u", problem="ImagePullBackOff: no such image")
        scene.pods = list(as_pods(ExternalReplicas(addresses=("10.0.0.1:8000",)), [agent]))
        scene.more = {"reports": {}}
    else:
        scene.pods = []
    scene.goes()
    status, reason, message = scene.condition("Ready")
    assert (status, reason) == ("False", "NoReplicaReady")
    assert ("its agent chat-endpoint-1: ImagePullBackOff" if pods else "Service vllm has no address that is ready") in message


def test_a_path_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidDocument, match="is not an absolute path"):
        parse_endpoint({"spec": {**SPEC, "engine": "external", "external": {"service": "vllm", "adaptersPath": "/adapters/../etc"}}})


class Cluster:
    """Answers for a Service and its EndpointSlices."""

    def __init__(self, status: int = 0) -> None:
        self.status = status

    async def get(self, *_: str) -> dict[str, Any]:
        if self.status:
            raise APIError(self.status, "Reason", "no")
        return service()

    async def list(self, *asked: str) -> AsyncIterator[dict[str, Any]]:
        assert asked == ("EndpointSlice", "team-a", "kubernetes.io/service-name=vllm")
        yield endpoints("10.0.0.1")

    def now(self) -> datetime:
        return NOW


@pytest.mark.parametrize(
    ("status", "other", "reason"),
    [
        (404, "", "ServiceNotFound"),
        (403, "", "RightsMissing"),
        (0, "2020-01-01T00:00:00Z", "ServiceTaken"),
        (0, "2999-01-01T00:00:00Z", ""),
    ],
)
async def test_what_stands_against_asking_them_is_told(status: int, other: str, reason: str) -> None:
    scene, store = Others(), Store()
    raw = {**scene.observed.endpoint, "spec": scene.spec}
    store.endpoints.put(raw)
    if other:
        meta = {"name": "other", "namespace": "team-a", "uid": "uid-other", "creationTimestamp": other, "resourceVersion": "1"}
        store.endpoints.put({**raw, "metadata": meta})
    kind = Endpoints(Cluster(status), store, scene.settings)  # type: ignore[arg-type]
    kind._authority = new_authority(NOW)
    observed = dataclasses.replace(scene.observed, pods=(), reports={})
    assert observed.spec is not None
    found = await kind._others(observed, observed.spec, kind._authority)
    assert (found.no_replicas[0] if found.no_replicas else "") == reason
    assert [pod.address for pod in found.pods] == ([] if reason else ["10.0.0.1:8000"])
    scene.more = {"no_replicas": found.no_replicas}
    scene.goes()
    assert (scene.condition("Ready")[1] == reason and scene.plan.actions == ()) if reason else scene.plan.actions


# the agent

MODEL, BASE = "support", "chat"
MODULE = "model.layers.0.self_attn.q_proj"


class Vllm:
    """Answers as an engine does for the names that it has. `tuned`: of the folders in which it sees adapters, those that it really loads."""

    def __init__(self, probes: Probes, folders: set[str], *, deaf: bool = False, names: tuple[str, ...] = (BASE,)) -> None:
        self.folders, self.deaf, self.names = folders, deaf, names
        self.adapters: dict[str, str] = {}
        self.loads: list[tuple[str, str]] = []
        self.known = {
            (*probe.prompt_ids, *answer.token_ids[:at]): (answer.tuned[at], answer.base[at])
            for probe in probes.probes
            for answer in probe.answers
            for at in range(len(answer.token_ids))
        }
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", lambda _: self._answer({})),
                web.get("/version", lambda _: self._answer({"version": "0"})),
                web.get("/v1/models", lambda _: self._answer({"data": self._cards()})),
                web.post("/v1/load_lora_adapter", self._load),
                web.post("/v1/unload_lora_adapter", self._unload),
                web.post("/v1/completions", self._complete),
                web.post("/tokenize", lambda _: self._answer({"tokens": []})),
            ]
        )
        self.server = TestServer(app)

    @property
    def address(self) -> str:
        return f"{self.server.host}:{self.server.port}"

    async def _answer(self, body: Any) -> web.Response:
        return web.json_response(body)

    def _cards(self) -> list[dict[str, Any]]:
        bases = [{"id": name, "root": "/base", "parent": None, "max_model_len": 256} for name in self.names]
        return bases + [{"id": name, "root": root, "parent": BASE} for name, root in self.adapters.items()]

    async def _load(self, request: web.Request) -> web.Response:
        asked = await request.json()
        if asked["lora_path"] not in self.folders:
            return web.json_response({"error": {"message": f"No adapter found for {asked['lora_path']}"}}, status=404)
        self.adapters[asked["lora_name"]] = asked["lora_path"]
        self.loads.append((asked["lora_name"], asked["lora_path"]))
        return web.Response()

    async def _unload(self, request: web.Request) -> web.Response:
        found = self.adapters.pop((await request.json())["lora_name"], None)
        return web.json_response({}, status=404 if found is None else 200)

    async def _complete(self, request: web.Request) -> web.Response:
        asked = await request.json()
        if asked["model"] not in (*self.names, *self.adapters):
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        tuned, base = self.known.get(tuple(asked["prompt"]), (-1.0, -1.0))
        number = tuned if asked["model"] in self.adapters and not self.deaf else base
        return web.json_response({"choices": [{"logprobs": {"token_logprobs": [number]}}]})


class Shelf:
    """A model's storage on a volume, with versions of a tiny adapter, and the agent that is started over it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fleets = folder, list[asyncio.Task[None]]()
        base = folder / "base"
        base.mkdir()
        save_file({f"{MODULE}.weight": np.ones((8, 8), np.float32)}, base / "model.safetensors")
        (base / "config.json").write_text("{}")
        self.base = Base(base, "sha256:base")
        answers = [ProbeAnswer(text="", token_ids=[7, 8], tuned=[-0.1, -0.2], base=[-2.0, -3.0])]
        self.probes = Probes(probes=[Probe(prompt="", prompt_ids=[n, 50], answers=answers) for n in range(8)])

    def version(self, number: int, *aliases: str) -> OrderedModel:
        folder = self.folder / "claim" / MODEL / VersionPaths.artifact(number)
        if not folder.exists():
            folder.mkdir(parents=True)
            name = f"base_model.model.{MODULE}.lora_"
            save_file(
                {f"{name}A.weight": np.full((2, 8), number, np.float32), f"{name}B.weight": np.ones((8, 2), np.float32)}, folder / ADAPTER
            )
            (folder / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}))
            (folder / SUMS).write_text(digests(folder))
            probes = self.folder / "claim" / MODEL / VersionPaths.probes(number)
            probes.parent.mkdir(exist_ok=True)
            probes.write_text(self.probes.model_dump_json(by_alias=True))
        digest = f"sha256:{hashlib.sha256((folder / SUMS).read_bytes()).hexdigest()}"
        named = {"name": f"{MODEL}@{number}", "aliases": list(aliases), "model": MODEL, "number": number}
        return OrderedModel(**named, storage=f"pvc://claim/{MODEL}", digest=digest, rank=2)  # type: ignore[arg-type]

    def fleet(self) -> Fleet:
        file = ReplicaFile(
            name=BASE,
            namespace="team-a",
            uid="u",
            base=EndpointBase(uri="pvc://claim/base"),
            sources={"pvc://claim": str(self.folder / "claim")},
        )
        fleet = Fleet(file, context_of(file, str(self.folder)), self.base, self.folder / "models")
        self.fleets.append(asyncio.create_task(fleet.run()))
        return fleet

    def vllm(self, *numbers: int, **more: Any) -> Vllm:
        return Vllm(self.probes, {f"/adapters/team-a/{MODEL}/{number}" for number in numbers}, **more)

    async def end(self) -> None:
        for fleet in self.fleets:
            fleet.cancel()
        async with asyncio.timeout(20):
            await asyncio.gather(*self.fleets, return_exceptions=True)


@pytest.fixture
async def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shelf]:
    monkeypatch.setattr(agents, "POLL_SECONDS", 0.02)
    found = Shelf(tmp_path)
    yield found
    await found.end()


def ordered(engines: list[Vllm], *models: OrderedModel, not_told_apart: str = "") -> ReplicaOrder:
    external = ExternalEngines(addresses=[engine.address for engine in engines], adapters_path="/adapters", not_told_apart=not_told_apart)
    return ReplicaOrder(generation=1, models=list(models), external=external)


async def until(fleet: Fleet, wanted: Callable[[dict[str, EngineReport]], bool]) -> dict[str, EngineReport]:
    async with asyncio.timeout(20):
        while True:
            found = {engine.address: engine for engine in fleet.report().engines}
            if wanted(found):
                return found
            await asyncio.sleep(0.01)


def states(report: EngineReport | None) -> dict[str, str]:
    return {model.name: model.state for model in report.models} if report is not None else {}


async def test_every_engine_is_loaded_and_asked_by_its_own_address(shelf: Shelf) -> None:
    good, deaf, blind, other = shelf.vllm(1, 2), shelf.vllm(1, deaf=True), shelf.vllm(), shelf.vllm(1, names=("org/base",))
    good.adapters = {"theirs": "/elsewhere/theirs", "support@9": f"/adapters/team-a/{MODEL}/9"}
    async with good.server, deaf.server, blind.server, other.server:
        engines = [good, deaf, blind, other]
        fleet = shelf.fleet()
        assert fleet.accept(ordered(engines, shelf.version(1, MODEL))).engines == [], "nothing is said before they were asked"
        found = await until(
            fleet,
            lambda r: (
                states(r.get(good.address)) == {"support@1": "Verified"}
                and states(r.get(deaf.address)) == {"support@1": "Mismatch"}
                and bool(states(r.get(blind.address)))
                and other.address in r
                and MODEL in good.adapters
            ),
        )
        path = f"/adapters/team-a/{MODEL}/1"
        assert good.adapters == {"theirs": "/elsewhere/theirs", "support@1": path, MODEL: path}, "what others loaded is theirs"
        assert deaf.adapters == {"support@1": path}, "no name of its own for what it is not"
        [waits] = found[blind.address].models
        assert waits.state == "Pending" and f"sees no files at {path}" in waits.message and "pvc://claim/support" in waits.message
        assert not found[other.address].ready and "--served-model-name ... chat" in found[other.address].message
        blind.folders.add(path)
        await until(fleet, lambda r: states(r[blind.address]) == {"support@1": "Verified"})

        again = shelf.fleet()
        assert good.loads.count(("support@1", path)) == 1
        again.accept(ordered([good], shelf.version(1, MODEL), shelf.version(2)))
        seen = []
        await until(
            again,
            lambda r: (
                good.address in r
                and bool(seen.append(states(r[good.address])) or seen[-1] == {"support@1": "Verified", "support@2": "Verified"})
            ),
        )
        assert {found["support@1"] for found in seen if "support@1" in found} == {"Verified"}, "of what is there nothing else is said"
        assert good.loads.count(("support@1", path)) == 1, "what an engine has is not loaded again"
        again.accept(ordered([good]))
        await until(again, lambda r: not states(r[good.address]) and good.adapters == {"theirs": "/elsewhere/theirs"})


async def test_where_one_address_is_many_replicas_each_version_is_loaded_once(shelf: Shelf) -> None:
    engine = shelf.vllm(1)
    async with engine.server:
        fleet = shelf.fleet()
        fleet.accept(ordered([engine], shelf.version(1, MODEL), not_told_apart="Service vllm is of type ExternalName"))
        found = await until(fleet, lambda r: states(r.get(engine.address)) == {"support@1": "Unverifiable"} and len(engine.loads) == 2)
        assert "ExternalName" in found[engine.address].models[0].message
        engine.adapters.clear()  # another one answers
        await asyncio.sleep(0.3)
        assert [name for name, _ in engine.loads] == ["support@1", MODEL]


async def test_an_order_without_engines_is_refused(shelf: Shelf) -> None:
    with pytest.raises(ValueError, match="external: no engines are named"):
        shelf.fleet().accept(ReplicaOrder())
