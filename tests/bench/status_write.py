"""What a write of a FineTuneJob's status costs the API server, and by what: rules, schema, size, owners.

Each variant is a definition of its own on one API server, written in turn; the cost is what the server and etcd used of the
processor, in milliseconds a write. `--profile FILE` keeps the server's own profile of the definition as users install it.
"""

from __future__ import annotations

import asyncio
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes import client, config

from finetune_api import GROUP, VERSION
from finetune_api.crd import crd, policy, without
from tests.bench.api_server import APIServer, api_server
from tests.factory import CHECKED, COMPARED, PREPARED, PUBLISHED, TRAINED
from tests.unit.test_reconcile import EVALUATED, World

NAME = "bench-status"
OBJECTS, WRITES, ROUNDS = 50, 400, 5
Node = dict[str, Any]


def variants() -> dict[str, Node]:
    """Schemas by what they are: the one that users install, and what it would be with or without a part."""
    installed: Node = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    ruled = copy.deepcopy(installed)
    texts = [
        json.dumps(validation).replace("oldObject", "oldSelf").replace("object.", "self.")
        for validation in policy()[0]["spec"]["validations"]
    ]
    ruled["x-kubernetes-validations"] = [{"rule": made["expression"], "message": made["message"]} for made in map(json.loads, texts)]
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "x-kubernetes-map-type": "atomic"}
    opened = {**installed, "properties": {**installed["properties"], "spec": anything, "status": anything}}
    return {
        "installed": installed,
        "rules of the policy in it": ruled,
        "without rules": without(installed, "x-kubernetes-validations"),
        "without a schema": opened,
    }


def _definition(schema: Node, number: int) -> tuple[Node, str]:
    """Under another plural, so that all are served at once."""
    found, plural = crd(), f"variant{number}s"
    found["spec"]["versions"][0]["schema"]["openAPIV3Schema"] = schema
    found["metadata"]["name"] = f"{plural}.{GROUP}"
    found["spec"]["names"] = {
        "kind": f"Variant{number}",
        "listKind": f"Variant{number}List",
        "plural": plural,
        "singular": f"variant{number}",
    }
    return found, plural


def statuses() -> list[Node]:
    """Those of one job, from its first to its last."""
    world, found = World(EVALUATED), []
    for stage, result in (("prepare", PREPARED), ("check", CHECKED), ("worker", TRAINED), ("evaluate", COMPARED), ("publish", PUBLISHED)):
        world.settle()
        found.append(copy.deepcopy(world.job["status"]))
        world.run(stage)
        world.succeed(stage, result)
    world.settle()
    return [*found, world.job["status"]]


async def _write(session: aiohttp.ClientSession, url: str, objects: list[Node], many: list[Node]) -> None:
    turns = asyncio.Semaphore(8)

    async def one(index: int, number: int) -> None:
        body = {**objects[index], "status": {**many[number % len(many)], "totalGpus": number}}
        async with session.put(f"{url}/{body['metadata']['name']}/status", json=body) as answer:
            answer.raise_for_status()
            objects[index] = await answer.json()

    async def each(index: int) -> None:
        for number in range(WRITES // len(objects)):
            async with turns:
                await one(index, number)

    await asyncio.gather(*map(each, range(len(objects))))


async def _measure(server: APIServer, plurals: dict[str, str], profile: Path | None) -> dict[str, list[float]]:
    many = statuses()
    costs: dict[str, list[float]] = {name: [] for name in plurals}
    connector, headers = aiohttp.TCPConnector(ssl=server.trust), {"Authorization": f"Bearer {server.token}"}
    async with aiohttp.ClientSession(server.url, headers=headers, connector=connector) as session:
        urls = {name: _collection(plural) for name, plural in plurals.items()}
        objects = {name: [await _create(session, urls[name], plural, n) for n in range(OBJECTS)] for name, plural in plurals.items()}
        for number in range(ROUNDS + 1):  # the first warms up
            for name in plurals:
                before = server.core_seconds()
                await _write(session, urls[name], objects[name], many)
                if number:
                    costs[name].append(1000 * (server.core_seconds() - before) / WRITES)
        if profile is not None:
            asked = asyncio.ensure_future(_profile(session, profile))
            while not asked.done():
                await _write(session, urls["installed"], objects["installed"], many)
    return costs


def _collection(plural: str) -> str:
    return f"/apis/{GROUP}/{VERSION}/namespaces/default/{plural}"


async def _create(session: aiohttp.ClientSession, url: str, plural: str, number: int) -> Node:
    body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": plural[:-1].capitalize(), "metadata": {"name": f"job-{number}"}, "spec": EVALUATED}
    async with session.post(url, json=body) as answer:
        answer.raise_for_status()
        return dict(await answer.json())


async def _profile(session: aiohttp.ClientSession, into: Path) -> None:
    async with session.get("/debug/pprof/profile?seconds=15") as answer:
        await asyncio.to_thread(into.write_bytes, await answer.read())


def bench(profile: Path | None = None) -> dict[str, Any]:
    """Milliseconds of the processor a write, median and spread, by variant, and each one's ratio to what is installed."""
    with api_server(NAME) as server:
        definitions, plurals = client.ApiextensionsV1Api(config.new_client_from_config(str(server.admin))), {}
        for number, (name, schema) in enumerate(variants().items()):
            made, plurals[name] = _definition(schema, number)
            definitions.create_custom_resource_definition(made)
        time.sleep(4)
        costs = asyncio.run(_measure(server, plurals, profile))
    first = statistics.median(costs["installed"])
    return {
        "bytes": [len(json.dumps(status)) for status in statuses()],
        **{
            name: {
                "ms": round(statistics.median(found), 2),
                "from": round(min(found), 2),
                "to": round(max(found), 2),
                "ratio": round(statistics.median(found) / first, 2),
            }
            for name, found in costs.items()
        },
    }


def main() -> None:
    """All of it, or with a profile too."""
    match sys.argv[1:]:
        case ["--profile", path]:
            print(json.dumps(bench(Path(path)), indent=1))
        case _:
            print(json.dumps(bench(), indent=1))


if __name__ == "__main__":
    main()
