"""OpenAI's fine-tuning API by its SDK: the gateway as a process, with the chart's rights alone, before a real API server and a bucket."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import openai
import pytest
import yaml
from kubernetes import client
from moto.server import ThreadedMotoServer

from finetune_api import GROUP, PLURAL, VERSION
from finetune_api.status import FineTuneJobStatus
from tests.cluster import javascript
from tests.cluster.helm import NAMESPACE
from tests.component.cli import finetune
from tests.component.conftest import Api, until
from tests.component.test_gateway import Process, account
from tests.component.test_rights import grant
from tests.factory import MINIMAL
from tests.unit.test_fine_tuning import ENDED, MAP
from tests.unit.test_fine_tuning_api import ROWS

KEYS = "finetune-keys"
BUCKET = "openai-files"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in (("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=BUCKET)
    yield f"http://{host}:{port}"
    server.stop()


def _may_train(api: Api, *verbs: str) -> None:
    """The service account that API keys of the namespace act as."""
    api.core.create_namespaced_service_account(api.namespace, {"metadata": {"name": KEYS}})
    rbac = client.RbacAuthorizationV1Api(api.core.api_client)
    rule = {"apiGroups": [GROUP], "resources": [PLURAL], "verbs": list(verbs)}
    rbac.create_namespaced_role(api.namespace, {"metadata": {"name": KEYS}, "rules": [rule]})
    subject = {"kind": "ServiceAccount", "name": KEYS, "namespace": api.namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": KEYS}
    rbac.create_namespaced_role_binding(api.namespace, {"metadata": {"name": KEYS}, "roleRef": role, "subjects": [subject]})


def _tell(api: Api, name: str, status: dict[str, Any]) -> None:
    """What the operator would write."""
    api.custom.patch_namespaced_custom_object_status(
        GROUP, VERSION, api.namespace, PLURAL, name, {"status": FineTuneJobStatus.model_validate(status).to_wire()}
    )


def _create(port: int, key: str, file: str, tries: int) -> str:
    """A create that says which try it is; the id of its job."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", "x-stainless-retry-count": str(tries)}
    body = json.dumps({"model": "gpt-plain", "training_file": file, "seed": 5}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/v1/fine_tuning/jobs", body, headers)) as answer:
        return str(json.loads(answer.read())["id"])


def test_from_a_file_to_a_model(api: Api, bucket: str, tmp_path: Path) -> None:
    """Under the real admission: what the API makes of a request is a job that the API server takes, in the name of the key's account."""
    (tmp_path / "models.yaml").write_text(MAP)
    tuning = {"models": yaml.safe_load(MAP), "storage": {"uri": f"s3://{BUCKET}/files"}, "enabled": True}
    settings = {
        "fine_tuning_models": tmp_path / "models.yaml",
        "fine_tuning_storage": f"s3://{BUCKET}/files",
        "fine_tuning_s3_endpoint": bucket,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }
    with account(api, tmp_path) as kubeconfig:
        grant(api, gateway={"enabled": True, "replicas": 1, "database": {"kind": "sqlite"}, "fineTuning": tuning})
        started = Process(api, kubeconfig, tmp_path / "gateway.log", **settings)
        processes = [started]
        try:
            until("it is ready", lambda: started.ready() == (200, "ok"))
            key = finetune(api, "keys", "create", "trainer", "--fine-tuning").strip().splitlines()[-1]
            sdk = openai.OpenAI(base_url=f"http://127.0.0.1:{started.port}/v1", api_key=key, max_retries=0)

            def takes_the_key() -> bool:
                try:
                    return sdk.files.list().data == []
                except openai.APIStatusError:
                    return False

            until("the key is known, and the store there", takes_the_key)
            file = sdk.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
            with pytest.raises(openai.PermissionDeniedError, match=KEYS):
                sdk.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=file.id)
            _may_train(api, "create", "get", "patch")

            def made() -> Any:
                try:
                    return sdk.fine_tuning.jobs.create(
                        model="gpt-4o-mini", training_file=file.id, validation_file=file.id, suffix="support", metadata={"team": "a"}
                    )
                except openai.PermissionDeniedError:
                    return None

            found: list[Any] = []
            until("the account has its rights", lambda: bool(found.append(job) or True) if (job := made()) else False)
            job = found[0]
            (raw,) = api.custom.list_namespaced_custom_object(GROUP, VERSION, api.namespace, PLURAL)["items"]
            name = raw["metadata"]["name"]
            assert job.id == "ftjob-" + raw["metadata"]["uid"].replace("-", "") and name.startswith("support-")
            assert [entry["manager"] for entry in raw["metadata"]["managedFields"]] == ["finetune-gateway"]

            sdk.fine_tuning.jobs.pause(job.id)
            assert api.job(name)["spec"]["runPolicy"]["suspend"] is True
            sdk.fine_tuning.jobs.resume(job.id)
            assert api.job(name)["spec"]["runPolicy"]["suspend"] is False
            _tell(api, name, ENDED)
            until("the watch brings it", lambda: sdk.fine_tuning.jobs.retrieve(job.id).status == "succeeded")
            ended = sdk.fine_tuning.jobs.retrieve(job.id)
            assert ended.fine_tuned_model == f"ft:gpt-4o-mini:{api.namespace}:support:{job.id[6:18]}" and ended.trained_tokens == 2500
            assert "Step 10/40" in str([event.message for event in sdk.fine_tuning.jobs.list_events(job.id)])
            assert sdk.files.content(ended.result_files[0]).text.splitlines()[1].startswith("10,1.25,")

            (tmp_path / "rows.jsonl").write_bytes(ROWS)
            told = javascript.fine_tune(f"http://127.0.0.1:{started.port}/v1", key, tmp_path / "rows.jsonl")
            assert told == {
                "file": ["processed", "rows.jsonl"],
                "content": True,
                "upload": ["completed", "processed"],
                "cancelled": "cancelled",
                "files": 3,
                "job": ["validating_files", 3, "node", True],
                "paused": "queued",
                "resumed": "validating_files",
                "events": [told["events"][0]],
                "checkpoints": 0,
                "listed": told["listed"],
                "end": "cancelled",
                "unknown": "400 unknown_parameter colour",
                "missing": "404 fine_tune_not_found fine_tuning_job_id",
                "permissions": "400 unsupported_operation null",
                "models": 1,
                "model": "400 unsupported_operation model",
                "deleted": True,
            }
            assert told["events"][0].startswith("Created fine-tuning job: ") and len(told["listed"]) == 1

            api.create_job(MINIMAL, name="by-kubectl")
            until("jobs of kubectl appear, too", lambda: len(sdk.fine_tuning.jobs.list().data) == 3)
            other = next(job for job in sdk.fine_tuning.jobs.list() if not job.metadata)
            assert (
                sdk.fine_tuning.jobs.cancel(other.id).status == "cancelled" and api.job("by-kubectl")["spec"]["runPolicy"]["cancel"] is True
            )

            first = _create(started.port, key, file.id, 0)
            started.process.kill()
            again = Process(api, kubeconfig, tmp_path / "gateway.log", **settings)
            processes.append(again)
            until("another one is ready", lambda: again.ready() == (200, "ok"))
            assert _create(again.port, key, file.id, 1) == first, "the try after a gateway was killed"
            assert _create(again.port, key, file.id, 0) != first
            assert len(api.custom.list_namespaced_custom_object(GROUP, VERSION, api.namespace, PLURAL)["items"]) == 5
        finally:
            for process in processes:
                if process.process.poll() is None:
                    process.process.kill()
            print((tmp_path / "gateway.log").read_text()[-6000:])
            api.cluster.kubectl("delete", "--ignore-not-found", "-n", NAMESPACE, "secret", "finetune-gateway-keys")
