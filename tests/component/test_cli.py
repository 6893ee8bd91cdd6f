"""The command line against a real API server; the test plays kubelet, so there are no logs here (tests/e2e has them)."""

from __future__ import annotations

import json

from tests.component.cli import finetune
from tests.component.conftest import Api, Kubelet, Operator, until
from tests.factory import MINIMAL


def test_a_job_from_flags_to_its_end(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    flags = ("--model", "pvc://models/tiny", "--data", "configmap://rows/train.jsonl", "--eval-fraction", "0", "--gpus", "0")
    assert "created (server dry run)" in finetune(api, "create", "--name", "dry", *flags, "--dry-run", "server")
    assert "finetunejob/one created" in finetune(api, "create", "--name", "one", *flags)
    until("it has ended", lambda: api.status("one").get("phase") == "Succeeded")
    assert "one" in finetune(api, "list") and "dry" not in finetune(api, "list")
    assert finetune(api, "list", "-o", "name").strip() == "finetunejob/one"
    assert json.loads(finetune(api, "get", "one", "-o", "json"))["status"]["phase"] == "Succeeded"
    told = finetune(api, "describe", "one")
    assert "pvc://models/tiny" in told and "DataReady" in told and "Admitted" in told and "Succeeded" in told
    assert "Succeeded" in finetune(api, "events", "one")
    assert "pvc://models/tiny" in finetune(api, "compare", "one", "one")
    assert "Succeeded" in finetune(api, "watch", "one")
    again = finetune(api, "retry", "one", "--name", "two")
    assert "finetunejob/two created" in again
    assert "one deleted" in finetune(api, "delete", "one", "two")
    assert "not found" in finetune(api, "get", "one", code=2)


def test_a_job_is_suspended_resumed_and_cancelled(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    kubelet.hold.add("train")
    api.create_job(MINIMAL)
    until("training", lambda: api.status().get("phase") == "Training")
    finetune(api, "suspend", "support")
    until("suspended", lambda: api.status().get("phase") == "Suspended")
    until("its pods are gone", lambda: not api.workers())
    finetune(api, "resume", "support")
    until("training again", lambda: api.status().get("phase") == "Training")
    finetune(api, "cancel", "support")
    until("cancelled", lambda: api.status().get("phase") == "Failed")
    assert api.condition("Failed")["reason"] == "Cancelled"
    until("nothing runs", lambda: all(p.status.phase in ("Succeeded", "Failed") or p.metadata.deletion_timestamp for p in api.pods()))
    assert "Cancelled" in finetune(api, "describe", "support")
    assert finetune(api, "estimate", "support", code=2), "what it takes was not estimated by a played prepare"
