"""A line of versions, really trained: two jobs, the champion as an arm, a pin, and an object that is made again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_api import API_VERSION
from tests.cluster import loader
from tests.e2e.conftest import User
from tests.e2e.test_cluster import manifest

MODEL = "colours"


def line(**spec: Any) -> dict[str, Any]:
    """A FineTunedModel in the claim of the examples."""
    storage = f"pvc://published/lines/{MODEL}"
    return {"apiVersion": API_VERSION, "kind": "FineTunedModel", "metadata": {"name": MODEL}, "spec": {"storage": storage, **spec}}


def version_job(name: str, base: str, **tuning: Any) -> dict[str, Any]:
    document = manifest(name)
    document["spec"].update(publish=[{"model": MODEL}], model={"uri": base})
    document["spec"]["tuning"].update(tuning)
    if "continueFrom" in tuning:
        del document["spec"]["tuning"]["lora"]  # it has its own
    return document


def model(user: User) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(user.kubectl("get", "finetunedmodel", MODEL, "-o", "json")).get("status") or {}
    return found


def states(user: User) -> dict[int, str]:
    return {version["number"]: version["state"] for version in model(user).get("versions", [])}


@pytest.mark.timeout(1200)
def test_versions_follow_each_other(user: User, served_base: str) -> None:
    user.apply(version_job("first", served_base))
    user.until("it says what it waits for", lambda: "ModelNotFound" in user.kubectl("get", "finetunejob", "first", "-o", "json"), 120)
    assert not user.pods("first"), "nothing runs for a model that is not there"
    user.apply(line())
    status = user.ended("first", 600)
    assert status["phase"] == "Succeeded", user.story()
    [artifact] = status["artifacts"]
    assert (artifact["model"], artifact["version"], artifact["uri"]) == (MODEL, 1, f"pvc://published/lines/{MODEL}/versions/1")
    assert states(user) == {1: "Champion"}

    user.apply(version_job("second", served_base, continueFrom=f"model://{MODEL}"))
    status = user.ended("second", 600)
    assert status["phase"] == "Succeeded", user.story()
    compared = status["evaluation"]["champion"]
    assert compared["version"] == 1, compared
    found = model(user)
    newest = found["versions"][0]
    assert (newest["number"], newest["parent"], newest["job"]) == (2, 1, "second")
    assert newest["state"] == {"Passed": "Champion", "NotPassed": "Rejected", "Inconclusive": "Candidate"}[compared["result"]], newest

    for champion in (2, 1):  # promoted, and rolled back
        user.kubectl("patch", "finetunedmodel", MODEL, "--type=merge", "-p", json.dumps({"spec": {"champion": champion}}))
        user.until(f"{champion} is the champion", lambda champion=champion: model(user).get("champion") == champion, 120)
    assert states(user) == {1: "Champion", 2: "Retired"}
    row = user.kubectl("get", "ftm", MODEL, "--no-headers").split()
    assert row[:3] == [MODEL, "1", "2"], row

    with loader.mounted(user.cluster, user.namespace, "published") as pod:

        def kept(path: str) -> dict[str, Any]:
            return dict(json.loads(user.kubectl("exec", pod, "--", "cat", f"/volume/lines/{MODEL}/{path}")))

        user.until("the storage knows", lambda: kept("records/2.json")["state"] == "Retired", 300)
        assert kept("probes/2.json")["probes"]

    user.kubectl("delete", "finetunejobs", "--all", "--wait")
    user.kubectl("delete", "finetunedmodel", MODEL)
    user.apply(line())
    user.until("it finds its versions again", lambda: states(user) == {1: "Champion", 2: "Retired"}, 300)
    assert model(user)["versions"][0]["digest"] == newest["digest"]
