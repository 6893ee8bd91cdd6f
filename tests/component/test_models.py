"""FineTunedModels against a real API server: versions, champions, roll-backs, retention, and an operator that dies."""

from __future__ import annotations

import urllib.error
from collections.abc import Iterator

import pytest

from finetune_api.contract import CatalogReport, progress_audience
from tests.component.conftest import Api, Kubelet, Operator, until
from tests.component.models import Models, Storage, publishing


@pytest.fixture
def models(api: Api) -> Models:
    return Models(api)


@pytest.fixture
def storage(api: Api, kubelet: Kubelet) -> Storage:
    played = Storage(api)
    kubelet.override = played
    return played


@pytest.fixture
def reporting(module_operator: Operator) -> Iterator[Operator]:
    """The operator of the whole cluster, which takes reports."""
    before = module_operator.logs.stat().st_size if module_operator.logs.exists() else 0
    module_operator.ensure({"FINETUNE_WATCH_NAMESPACES": "", "FINETUNE_PROGRESS_URL": f"https://127.0.0.1:{module_operator.port}"})
    yield module_operator
    print(module_operator.logs.read_bytes()[before:].decode()[-6000:])


def add(api: Api, name: str, seconds: float = 60) -> None:
    """A job that adds a version."""
    api.create_job(publishing(), name=name)
    until(f"{name} succeeds", lambda: api.status(name).get("phase") == "Succeeded", seconds)


def test_from_the_first_version_to_a_roll_back(api: Api, models: Models, storage: Storage, reporting: Operator) -> None:
    api.create_job(publishing(), name="first")
    until("it waits for its model", lambda: api.condition("TargetsReady", "first").get("reason") == "ModelNotFound")
    assert not api.pods()
    models.create()
    until("it succeeds", lambda: api.status("first").get("phase") == "Succeeded", 60)
    storage.verdicts = ["Passed", "NotPassed"]
    for name in ("second", "third"):
        until("the storage says what was decided", lambda: {n: r.state for n, r in storage.records.items()} == models.states())
        add(api, name)
    until("all is decided", lambda: models.states() == {1: "Retired", 2: "Champion", 3: "Rejected"})
    assert [champion["number"] for champion in storage.champions] == [1, 2], "each was compared with the champion of its time"
    status = models.status()
    assert (status["champion"], status["latest"], status["count"], status["score"]) == (2, 3, 3, "loss 1 (base 2)")
    newest = status["versions"][0]
    assert (
        newest["jobUid"] == api.job("third")["metadata"]["uid"]
        and newest["settings"]["method"] == "lora"
        and "not better" in newest["message"]
    )
    assert newest["base"]["fingerprint"] == "f" and newest["dataDigest"] == "sha256:00"

    models.patch({"champion": 1})
    until("it is rolled back", lambda: models.status()["champion"] == 1)
    assert models.states() == {1: "Champion", 2: "Retired", 3: "Rejected"}
    until("that is told", lambda: api.events().count("Promoted") == 2 and "RolledBack" in api.events() and "Rejected" in api.events())
    assert f"FineTunedModel {api.namespace}/bot: champion 2 -> 1 by spec.champion, set by " in reporting.logs.read_text()
    row = api.cluster.kubectl("-n", api.namespace, "get", "ftm").splitlines()
    assert row[0].split()[:4] == ["NAME", "CHAMPION", "VERSIONS", "SCORE"] and row[1].split()[:4] == ["bot", "1", "3", "loss"]

    models.patch({"champion": 9})
    until("an unknown pin is said", lambda: models.condition("Ready").get("reason") == "VersionNotFound")
    assert models.status()["champion"] == 1

    models.patch({"champion": 1, "retention": {"versions": 1}})
    until("what is not kept is removed", lambda: {n for n, r in storage.records.items() if r.removed_at} == {2})
    until("that is on record", lambda: models.status()["storage"].get("removed") == [2])
    assert models.states() == {1: "Champion", 3: "Rejected"}, "what is pinned is kept, and the newest"

    models.delete()
    until("it is gone with its catalog pods", lambda: not [o for o in api.owned() if "bot-" in o])
    assert set(storage.records) == {1, 2, 3}
    models.create()
    until("it has its versions back", lambda: models.states() == {1: "Champion", 3: "Rejected"})
    until("and its champion", lambda: models.condition("Ready").get("reason") == "HasChampion")
    until("and rests", lambda: models.condition("StorageReady").get("reason") == "Synced")
    assert "Promoted" not in api.events()[-3:] and models.status()["champion"] == 1


@pytest.mark.parametrize(("promotion", "states"), [("Manual", {1: "Candidate", 2: "Candidate"}), ("Always", {1: "Retired", 2: "Champion"})])
def test_promotion_by_hand_and_always(
    api: Api, models: Models, storage: Storage, reporting: Operator, promotion: str, states: dict[int, str]
) -> None:
    storage.verdicts = ["NotPassed"] * 2
    storage.refuses = 1
    models.create(promotion=promotion)
    until("the storage refuses", lambda: models.condition("StorageReady").get("reason") == "StorageRefused")
    for name in ("one", "two"):
        add(api, name)
    until("both are decided", lambda: models.states() == states)
    until("the storage is in line", lambda: {n: r.state for n, r in storage.records.items()} == states)
    until("that is said", lambda: models.condition("StorageReady").get("reason") == "Synced" and not models.status()["storage"]["retries"])
    if promotion == "Manual":
        assert models.condition("Ready")["reason"] == "NoChampion" and "set spec.champion: 2" in models.condition("Ready")["message"]


def test_reports_of_others_do_not_count(api: Api, models: Models, storage: Storage, kubelet: Kubelet, reporting: Operator) -> None:
    """A pod of another job, and a token of another audience: the storage would be what a tenant says it is."""
    kubelet.hold = {"prepare"}
    models.create()
    api.create_job(publishing(), name="other")
    stranger = until("another pod runs", lambda: [p for p in api.pods() if "other-prepare" in p.metadata.name])[0]
    own = until("its own pod is there", lambda: [p for p in api.pods() if "bot-catalog" in p.metadata.name])[0]
    url, body = f"https://127.0.0.1:{reporting.port}", CatalogReport(done="sha256:0").model_dump_json(by_alias=True)
    codes = []
    for pod, audience, sent in ((stranger, None, body), (own, progress_audience(api.namespace, "bot"), body), (own, None, "[]")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            storage.post(url, "bot", pod, sent, audience)
        codes.append(refused.value.code)
    assert codes == [403, 401, 400]
