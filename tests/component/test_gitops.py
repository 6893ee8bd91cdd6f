"""Git and the operator never fight: what was applied shows no difference, whoever applies it, while the job runs and after."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cluster.local import kubectl
from tests.cluster.shell import REPO
from tests.component.conftest import Api, Kubelet, until
from tests.component.test_webhooks import WITH_WEBHOOKS, Start, configurations, webhooks  # noqa: F401 - fixtures

pytestmark = WITH_WEBHOOKS

EXAMPLES = sorted(p for p in (REPO / "examples").glob("*.yaml") if "kind: FineTuneJob" in p.read_text())


def run(api: Api, document: dict[str, object], *words: str) -> subprocess.CompletedProcess[str]:
    command = [kubectl(), "--kubeconfig", api.cluster.kubeconfig, "-n", api.namespace, *words, "-f", "-"]
    return subprocess.run(command, input=json.dumps(document), capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", EXAMPLES, ids=[p.stem for p in EXAMPLES])
def test_no_difference_is_left(api: Api, webhooks: Start, kubelet: Kubelet, path: Path) -> None:  # noqa: F811
    webhooks()
    kubelet.hold.add("train")
    documents = {d["kind"]: d for d in yaml.safe_load_all(path.read_text()) if d}
    for found in documents.values():
        found["metadata"].pop("namespace", None)
    document = documents["FineTuneJob"]
    if (model := documents.get("FineTunedModel")) is not None:  # the job waits for it
        assert run(api, model, "apply").returncode == 0
    name = document["metadata"]["name"]
    for words in (["apply"], ["apply", "--server-side", "--field-manager=argocd", "--force-conflicts"]):
        done = run(api, document, *words)
        assert done.returncode == 0, done.stderr
        assert run(api, document, "diff").returncode == 0, run(api, document, "diff").stdout
    until("it is past prepare", lambda: api.status(name).get("phase") in ("Queued", "Starting", "Training"))
    assert run(api, document, "diff").returncode == 0, "the operator has changed nothing of it"
    generation = api.job(name)["metadata"]["generation"]
    again = run(api, document, "apply", "--server-side", "--field-manager=argocd")
    assert again.returncode == 0, again.stderr
    assert api.job(name)["metadata"]["generation"] == generation, "applied again is not changed"


def test_a_change_of_another_manager_is_kept(api: Api, webhooks: Start, kubelet: Kubelet) -> None:  # noqa: F811
    webhooks()
    kubelet.hold.add("train")
    document = next(d for d in yaml.safe_load_all((REPO / "examples" / "tiny.yaml").read_text()) if d)
    assert run(api, document, "apply", "--server-side", "--field-manager=argocd").returncode == 0
    until("training", lambda: api.status("tiny").get("phase") == "Training")
    api.patch_job({"metadata": {"labels": {"cost-centre": "42"}}}, "tiny")
    assert run(api, document, "apply", "--server-side", "--field-manager=argocd").returncode == 0
    assert api.job("tiny")["metadata"]["labels"]["cost-centre"] == "42"
    assert api.status("tiny")["phase"] == "Training"
