"""Results in a bucket and bases out of one, over S3's protocol. moto in place of S3: the protocol is real, the store is not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer
from safetensors.numpy import save_file

from finetune_api.contract import S3_KEYS, Env
from finetune_trainer.export import bucket
from finetune_trainer.job.context import Context
from finetune_trainer.models.fetch import fetch_base_model, fetch_model
from finetune_trainer.process.errors import InfrastructureError, SourceUnavailable, UserError
from finetune_trainer.remote import retry
from finetune_trainer.stages.check import check
from finetune_trainer.stages.publish import publish
from tests.unit.test_results import Shelf, forms_are_restored

KEYS = {"name": "bucket-keys"}


class Store:
    """A bucket, and jobs that publish to it."""

    def __init__(self, endpoint: str, folder: Path) -> None:
        self.endpoint, self.keys, self.shelf = endpoint, folder / "keys", Shelf(folder)
        self.keys.mkdir()
        for name in S3_KEYS:
            (self.keys / name).write_text("k")
        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
        self.client: Any = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
        self.client.create_bucket(Bucket="models")

    def context(self, uri: str = "s3://models/team/support", **blocks: Any) -> Context:
        """A finished job with this target."""
        target = {"uri": uri, "secretRef": KEYS, "s3Endpoint": self.endpoint}
        context = self.shelf.context(**{"publish": [target], **blocks})
        context.job.secrets.update({field: str(self.keys) for field in ("publish-0", "model")})
        return context

    def objects(self) -> dict[str, bytes]:
        """All that is to be seen."""
        found = self.client.list_objects_v2(Bucket="models").get("Contents", ())
        return {o["Key"]: self.client.get_object(Bucket="models", Key=o["Key"])["Body"].read() for o in found}

    def uploads(self) -> list[Any]:
        """What has begun and has not ended."""
        return list(self.client.list_multipart_uploads(Bucket="models").get("Uploads", ()))


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    server.stop()


@pytest.fixture
def store(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv(Env.ALLOWED_HOSTS, "127.0.0.1")
    monkeypatch.setattr(retry, "_PAUSES", (0.01,))
    made = Store(endpoint, tmp_path)
    yield made
    for upload in made.uploads():
        made.client.abort_multipart_upload(Bucket="models", Key=upload["Key"], UploadId=upload["UploadId"])
    for key in made.objects():
        made.client.delete_object(Bucket="models", Key=key)
    made.client.delete_bucket(Bucket="models")


def test_a_result_in_a_bucket(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked first, written once, read back; the list of digests is right; publishing again changes nothing."""
    assert check(store.context()).reason == "TargetsReady" and not store.objects() and not store.uploads(), "asking leaves nothing behind"
    result = publish(store.context())
    objects = store.objects()
    names = {"README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "finetune.json"}
    assert set(objects) == {f"team/support/{name}" for name in names} and not store.uploads()
    (tmp_path / "copy").mkdir()
    for key, body in objects.items():
        (tmp_path / "copy" / Path(key).name).write_bytes(body)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "copy", check=True)
    assert publish(store.context()) == result
    found = check(store.context(uid="22222222-b"))
    assert (found.reason, found.result) == ("Restored", result.result), "made again from a backup"
    forms_are_restored(monkeypatch, store.context)


def test_a_file_of_several_parts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "_PART", 5 * 2**20)  # the least that S3 takes
    context, weights = store.context(), bytes(range(256)) * 45_000
    Path(context.layout.output, "adapter_model.safetensors").write_bytes(weights)
    publish(context)
    assert store.objects()["team/support/adapter_model.safetensors"] == weights


def test_what_was_killed_in_the_middle_is_not_whole_and_is_gone_on_with(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sees files of an upload that did not end; the next try leaves nothing of it behind."""
    upload, tries = bucket._Place._upload, iter([None, None, KeyboardInterrupt()])

    def killed(place: Any, name: str, file: Path) -> Any:
        if (stop := next(tries)) is not None:
            raise stop
        return upload(place, name, file)

    monkeypatch.setattr(bucket._Place, "_upload", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(store.context())
    assert set(store.objects()) == {"team/support/finetune.json"} and len(store.uploads()) == 2
    assert check(store.context()).reason == "TargetsReady", "what is not whole does not count"
    with pytest.raises(UserError, match="publishing it has not ended"):
        fetch_base_model(store.context(model={"uri": "s3://models/team/support", "secretRef": KEYS, "s3Endpoint": store.endpoint}))
    monkeypatch.setattr(bucket._Place, "_upload", upload)
    publish(store.context())
    assert len(store.objects()) == 5 and not store.uploads()


def test_a21_what_is_anothers_is_never_overwritten(store: Store) -> None:
    publish(store.context())
    before = store.objects()
    for ask in (check, publish):
        with pytest.raises(UserError, match=r"holds the result of job n/j \(11111111-a\), which was to make another") as taken:
            ask(store.context(uid="22222222-b", tuning={"method": "dora"}))
        assert taken.value.reason == "TargetTaken" and store.objects() == before
    store.client.put_object(Bucket="models", Key="data/thesis.tex", Body=b"x")
    with pytest.raises(UserError, match="something that no FineTuneJob published"):
        publish(store.context("s3://models/data"))


def test_of_two_that_publish_at_once_one_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other's record came between the look and the write: S3 refuses the write, and what is there is looked at again."""
    look, raced = bucket._Place._owner, list[str]()

    def late(place: Any) -> Any:
        found = look(place)
        if not raced:
            raced.append("yes")
            other = {"job": {"name": "k", "namespace": "n", "uid": "33333333-c", "spec": "sha256:0"}}
            store.client.put_object(Bucket="models", Key="team/support/finetune.json", Body=json.dumps(other).encode())
        return found

    monkeypatch.setattr(bucket._Place, "_owner", late)
    with pytest.raises(UserError, match="holds the result of job n/k"):
        publish(store.context())
    assert json.loads(store.objects()["team/support/finetune.json"])["job"]["name"] == "k"


def test_its_own_result_is_mended_and_replaced(store: Store) -> None:
    publish(store.context())
    weights = {"Bucket": "models", "Key": "team/support/adapter_model.safetensors"}
    store.client.put_object(**weights, Body=b"damaged")
    publish(store.context())
    assert store.objects()[weights["Key"]] == b"weights"
    store.client.delete_object(**weights)
    store.client.put_object(Bucket="models", Key="team/support/old.json", Body=b"{}")
    publish(store.context())
    assert store.objects()[weights["Key"]] == b"weights" and "team/support/old.json" not in store.objects()


def test_what_arrives_otherwise_than_it_was_sent_is_not_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket._Place, "_damaged", lambda place, sums: "adapter_model.safetensors")
    with pytest.raises(InfrastructureError, match=r"adapter_model\.safetensors: what was written differs") as found:
        publish(store.context())
    assert found.value.reason == "VerificationFailed" and "team/support/SHA256SUMS" not in store.objects()


def test_what_s3_refuses_and_what_is_waited_for(store: Store) -> None:
    with pytest.raises(UserError, match="there is no bucket none; no GPU was taken"):
        check(store.context("s3://none/x"))
    away = store.context(publish=[{"uri": "s3://models/x", "secretRef": KEYS, "s3Endpoint": "http://127.0.0.1:1"}])
    with pytest.raises(SourceUnavailable, match=r"127\.0\.0\.1 cannot be reached"):
        publish(away)


def test_a_user_does_not_reach_addresses_of_the_cluster(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case A6, for targets and bases as for rows."""
    monkeypatch.setenv(Env.ALLOWED_HOSTS, "")
    for ask in (check, publish):
        with pytest.raises(UserError, match="which is not public"):
            ask(store.context())
    with pytest.raises(UserError, match="which is not public"):
        fetch_base_model(store.context(model={"uri": "s3://models/x", "secretRef": KEYS, "s3Endpoint": store.endpoint}))


def test_a_base_out_of_a_bucket(store: Store, tiny_model: Path) -> None:
    """Once: what was fetched is what later stages use."""
    for file in tiny_model.iterdir():
        store.client.upload_file(str(file), "models", f"bases/tiny/{file.name}")
    store.client.put_object(Bucket="models", Key="bases/tiny/pickle.bin", Body=b"x")
    store.client.put_object(Bucket="models", Key="bases/tiny/onnx/config.json", Body=b"x")
    asked = {"model": {"uri": "s3://models/bases/tiny", "secretRef": KEYS, "s3Endpoint": store.endpoint}}
    context = store.context(**asked)
    folder = Path(fetch_base_model(context))
    assert {p.name for p in folder.iterdir()} == {p.name for p in tiny_model.iterdir()}
    store.client.delete_object(Bucket="models", Key="bases/tiny/config.json")
    assert fetch_base_model(context) == str(folder)
    with pytest.raises(UserError, match=r"holds no config\.json"):  # another job
        fetch_base_model(store.context(**asked))
    with pytest.raises(UserError, match=r"s3://models/nothing holds none of "):
        fetch_base_model(store.context(model={**asked["model"], "uri": "s3://models/nothing"}))


def test_going_on_from_an_adapter_in_a_bucket(store: Store) -> None:
    """By keys and an endpoint of its own; pinned by the digest of what was published."""
    context = store.context()
    save_file({"base_model.model.q.lora_A.weight": np.ones((2, 2), np.float32)}, Path(context.layout.output, "adapter_model.safetensors"))
    digest = publish(context).result["artifacts"][0]["digest"]
    uri = "s3://models/team/support"
    tuning = {"continueFrom": uri, "continueFromSecretRef": KEYS, "continueFromS3Endpoint": store.endpoint}
    later = store.context(tuning=tuning)
    later.job.secrets["adapter"] = later.job.secrets.pop("model")
    folder = Path(fetch_model(later, "adapter", uri, config="adapter_config.json"))
    assert (folder / "finetune.json").is_file() and later.read_json(later.layout.reference("adapter"))["revision"] == digest


def test_a_published_model_that_was_changed_is_no_base(store: Store) -> None:
    publish(store.context())
    store.client.put_object(Bucket="models", Key="team/support/adapter_config.json", Body=b"{}")
    with pytest.raises(UserError, match=r"adapter_config\.json is not what SHA256SUMS says"):
        fetch_base_model(store.context(model={"uri": "s3://models/team/support", "secretRef": KEYS, "s3Endpoint": store.endpoint}))


def test_an_error_of_s3s_own_stays_what_it_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(place: Any) -> Any:
        raise ClientError({"Error": {"Code": "InvalidRequest"}, "ResponseMetadata": {"HTTPStatusCode": 400}}, "PutObject")

    monkeypatch.setattr(bucket._Place, "_owner", broken)
    with pytest.raises(InfrastructureError, match="InvalidRequest"):
        publish(store.context())
