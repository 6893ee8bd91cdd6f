"""Where catalog pods report: within bounds, to the operator that acts, from a pod of the object's own Job."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from finetune_api import names
from finetune_api.contract import PROGRESS_BODY_LIMIT, CatalogReport, catalog_audience
from finetune_operator.cache.catalog import CatalogBoard
from finetune_operator.cache.store import Store
from finetune_operator.servers import catalog as catalog_server
from finetune_operator.servers.catalog import CatalogServer
from tests.unit.test_store_and_queue import child, other

PATH = "/v1/namespaces/team-a/finetunedmodels/bot/catalog"
BODY = CatalogReport(done="sha256:1").model_dump_json(by_alias=True)


class Reviews:
    """Stands for the API server's TokenReview: `token-POD` is good for the audience of bot."""

    async def review_token(self, token: str, audience: str) -> dict[str, Any]:
        extra = {"authentication.kubernetes.io/pod-uid": [token.removeprefix("token-")]}
        good = audience == catalog_audience("team-a", "bot")
        return {"authenticated": good, "audiences": [audience], "user": {"extra": extra}}


@pytest.fixture
async def endpoint() -> Any:
    store, board, acts = Store(), CatalogBoard(), [True]
    woken: list[Any] = []
    for name in ("bot", "theirs"):
        store.models.put(other("FineTunedModel", name))
        for kind, uid, owner in (("Job", f"job-{name}", f"uid-{name}"), ("Pod", f"pod-{name}", f"job-{name}")):
            raw = child(kind, f"{name}-catalog-1", uid, owner)
            raw["metadata"]["labels"] = {names.LABEL_OWNER_UID: f"uid-{name}", names.LABEL_STAGE: "catalog"}
            store.put_child(kind, raw)
    server = CatalogServer(Reviews(), store, board, lambda key, kind: woken.append((kind, key)), lambda: acts[0])  # type: ignore[arg-type]
    app = web.Application(client_max_size=PROGRESS_BODY_LIMIT)  # as beside the small reports
    app.add_routes(server.routes())
    async with TestClient(TestServer(app)) as client:
        client.board, client.woken, client.acts = board, woken, acts  # type: ignore[attr-defined]
        yield client


async def post(client: Any, token: str = "token-pod-bot", body: str = BODY, path: str = PATH) -> int:
    return int((await client.post(path, data=body, headers={"Authorization": f"Bearer {token}"})).status)


async def test_a_report_reaches_the_board_with_the_name_of_its_job(endpoint: Any) -> None:
    assert await post(endpoint, body=BODY + " " * 2 * PROGRESS_BODY_LIMIT) == 204, "it may be larger than progress"
    found = endpoint.board.latest("uid-bot")
    assert (found.by, found.report.done) == ("bot-catalog-1", "sha256:1") and endpoint.woken == [("FineTunedModel", ("team-a", "bot"))]
    newer = CatalogReport(done="sha256:2")
    endpoint.board.taken("uid-bot", newer)
    assert endpoint.board.latest("uid-bot") is found, "what has come since is not taken with what is on record"
    endpoint.board.taken("uid-bot", found.report)
    assert endpoint.board.latest("uid-bot") is None


@pytest.mark.parametrize(
    ("token", "path", "code"),
    [
        ("token-pod-theirs", PATH, 403),
        ("token-gone", PATH, 403),
        ("token-pod-theirs", PATH.replace("bot", "theirs"), 401),
        ("token-pod-bot", PATH.replace("team-a", "team-b"), 401),
        ("", PATH, 401),
    ],
)
async def test_a13_others_may_not(endpoint: Any, token: str, path: str, code: int) -> None:
    assert await post(endpoint, token, path=path) == code
    assert endpoint.board.latest("uid-bot") is None and not endpoint.woken


@pytest.mark.parametrize(("body", "code"), [("{", 400), ('{"done": 5}', 400), ('{"done": "x", "records": [{}]}', 400), ("x" * 3000, 413)])
async def test_a13_bodies_are_bounded_and_read_strictly(endpoint: Any, body: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_server, "CATALOG_BODY_LIMIT", 2000)
    assert await post(endpoint, body=body) == code


async def test_one_that_stands_by_takes_none(endpoint: Any) -> None:
    endpoint.acts[0] = False
    assert await post(endpoint) == 503
