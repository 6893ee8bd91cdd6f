"""Models and chat by the command line against a real API server, without an operator: the tests write the statuses by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from finetune_api import API_VERSION, GROUP, VERSION
from finetune_api.tuned_model import MODEL_KIND, MODEL_PLURAL
from finetune_cli.cluster import Models
from tests.component.cli import finetune
from tests.component.conftest import Api
from tests.loopback import serving
from tests.unit.test_cli_chat import KEY, Upstream
from tests.unit.test_cli_models import MODEL


def test_versions_of_a_model_are_shown_promoted_and_rolled_back(api: Api, tmp_path: Path) -> None:
    where = (GROUP, VERSION, api.namespace, MODEL_PLURAL)
    manifest = {"apiVersion": API_VERSION, "kind": MODEL_KIND, "metadata": {"name": "support-bot"}, "spec": {"storage": "pvc://models/bot"}}
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(manifest))
    assert "finetunedmodel/support-bot created (server dry run)" in finetune(api, "create", "-f", str(path), "--dry-run", "server")
    assert "finetunedmodel/support-bot created" in finetune(api, "create", "-f", str(path))
    assert "has no version yet" in finetune(api, "models", "lineage", "support-bot", code=2)
    api.custom.patch_namespaced_custom_object_status(*where, "support-bot", {"status": MODEL["status"]})
    listed = finetune(api, "models", "list")
    assert "loss 0.43 (base 1.03)" in listed and listed.split("\n")[1].split()[:3] == ["support-bot", "3", "4"]
    assert finetune(api, "models", "list", "-o", "name").strip() == "finetunedmodel/support-bot"
    assert json.loads(finetune(api, "models", "get", "support-bot", "-o", "json"))["status"]["champion"] == 3
    assert "Version 3  Champion" in finetune(api, "models", "get", "support-bot")
    assert "hyperparameters.epochs" in finetune(api, "models", "compare", "support-bot", "2", "3")
    assert "support-bot@2" in finetune(api, "models", "lineage", "support-bot")
    assert yaml.safe_load(finetune(api, "models", "lineage", "support-bot", "4", "-o", "yaml"))[0]["version"] == 4

    def pin() -> Any:
        return api.custom.get_namespaced_custom_object(*where, "support-bot")["spec"].get("champion")

    assert "did you mean support-bot?" in finetune(api, "models", "promote", "suport-bot", "2", code=2)
    assert "has no version 9; there are: 4, 3, 2" in finetune(api, "models", "promote", "support-bot", "9", code=2) and pin() is None
    told = finetune(api, "models", "rollback", "support-bot")
    assert "version 2 is pinned as champion (it was 3)" in told and "spec: {champion: 2}" in told and pin() == 2
    assert "pinned already" in finetune(api, "models", "rollback", "support-bot")
    assert "had been rejected" in finetune(api, "models", "promote", "support-bot", "4") and pin() == 4


def test_a_pin_is_not_written_over_another(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """A status that changed in between is no reason to stop, another choice is."""
    where = (GROUP, VERSION, api.namespace, MODEL_PLURAL)
    body = {"apiVersion": API_VERSION, "kind": MODEL_KIND, "metadata": {"name": "support-bot"}, "spec": {"storage": "pvc://models/bot"}}
    api.custom.create_namespaced_custom_object(*where, body)
    api.custom.patch_namespaced_custom_object_status(*where, "support-bot", {"status": MODEL["status"]})
    real, meanwhile = Models.patch, [{"status": {"score": "told anew"}}]

    def disturbed(self: Models, name: str, spec: dict[str, Any], *, seen: str | None = None) -> Any:
        if meanwhile:
            change = meanwhile.pop()
            write = api.custom.patch_namespaced_custom_object_status if "status" in change else api.custom.patch_namespaced_custom_object
            write(*where, name, change)
        return real(self, name, spec, seen=seen)

    monkeypatch.setattr(Models, "patch", disturbed)
    assert "version 2 is pinned" in finetune(api, "models", "promote", "support-bot", "2")
    meanwhile.append({"spec": {"champion": 3}})
    assert "somebody else has changed its champion meanwhile" in finetune(api, "models", "promote", "support-bot", "4", code=2)
    assert api.custom.get_namespaced_custom_object(*where, "support-bot")["spec"]["champion"] == 3


def test_the_base_of_a_chat_is_the_endpoint_that_serves_the_model(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the gateway does not say which base it is. The server is that of the unit tests."""
    where = (GROUP, VERSION, api.namespace, MODEL_PLURAL)
    body = {"apiVersion": API_VERSION, "kind": MODEL_KIND, "metadata": {"name": "helper"}, "spec": {"storage": "pvc://models/helper"}}
    api.custom.create_namespaced_custom_object(*where, body)
    with serving(Upstream) as port:
        monkeypatch.setenv("FINETUNE_API_KEY", KEY)
        words = ("chat", "helper@1", "--compare", "-m", "hi", "--url", f"http://127.0.0.1:{port}")
        assert "Name its FineTuneEndpoint: --base NAME" in finetune(api, *words, code=2)
        api.custom.patch_namespaced_custom_object_status(*where, "helper", {"status": {"served": ["endpoint"]}})
        told = finetune(api, *words)
    assert f"{api.namespace}/endpoint:\n" in told and f"{api.namespace}/helper@1:\n" in told


def test_who_may_not_promote_is_told(api: Api, tmp_path: Path) -> None:
    kubeconfig = yaml.safe_load(api.cluster.kubeconfig.read_text())
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "reader"}}
    api.core.create_namespaced_service_account(api.namespace, account)
    token = api.core.create_namespaced_service_account_token("reader", api.namespace, {"spec": {}}).status.token
    kubeconfig["users"] = [{"name": user["name"], "user": {"token": token}} for user in kubeconfig["users"]]
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(kubeconfig))
    reader: Any = SimpleNamespace(cluster=SimpleNamespace(kubeconfig=path), namespace=api.namespace)
    told = finetune(reader, "models", "promote", "support-bot", "2", code=2)
    assert "cannot get resource" in told and "finetunedmodels" in told and "Traceback" not in told
