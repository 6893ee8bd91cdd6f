"""OpenAI's fine-tuning API by its SDK, over real sockets: files in a bucket (moto), metadata in SQLite, jobs at the edge of Kubernetes.

The real API server: tests/component/test_fine_tuning_api.py.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import boto3
import openai
import pytest
from moto.server import ThreadedMotoServer

from finetune_api.contract import S3_KEYS, Env
from finetune_gateway.store.keeper import StoreAway
from finetune_gateway.tuning import blobs, creating
from finetune_gateway.tuning.files import Limits
from finetune_gateway.tuning.jobs import read_job
from finetune_operator.cluster.errors import APIError
from finetune_trainer.data.fetch import fetch
from tests.gateway import KEY, Running, running, until
from tests.unit.test_fine_tuning import ENDED, MAP, PAIR, PROGRESS, TURNS, condition
from tests.unit.test_results import Shelf

ROWS = b"\n".join(json.dumps({"messages": [*TURNS, *TURNS], "parallel_tool_calls": True}).encode() for _ in range(12))
CHATS = "ftk_" + "c" * 43
OTHERS = "ftk_" + "o" * 43


class Cut(Exception):
    """The connection is lost after the write."""


class Kubernetes:
    """The API server's part: objects by name, and what it refuses."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.users: list[tuple[str, tuple[str, ...]]] = []
        self.refuses: APIError | None = None
        self.unheard = 0
        """So many writes are carried out, and their answers are lost."""

    def acting_as(self, user: str, groups: Iterable[str] = ()) -> Kubernetes:
        self.users.append((user, tuple(groups)))
        return self

    async def request(self, method: str, path: str, *, body: Any = None, **_: Any) -> dict[str, Any]:
        if self.refuses is not None:
            raise self.refuses
        parts = path.split("/")
        namespace, name = parts[5], parts[7] if len(parts) > 7 else body["metadata"]["name"]
        key = (namespace, name)
        if method == "GET":
            if key not in self.objects:
                raise APIError(404, "NotFound", "no")
            return self.objects[key]
        if method == "PATCH":
            for block, values in body["spec"].items():
                self.objects[key]["spec"].setdefault(block, {}).update(values)
            return self.objects[key]
        if key in self.objects:
            raise APIError(409, "AlreadyExists", "taken")
        meta = {**body["metadata"], "uid": str(uuid.uuid4()), "creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
        self.objects[key] = json.loads(json.dumps({**body, "metadata": meta}))
        if self.unheard:
            self.unheard -= 1
            raise Cut
        return self.objects[key]

    def tell(self, gateway: Running, status: dict[str, Any] | None = None) -> None:
        """What the watch would bring."""
        tuning = gateway.parts.tuning
        assert tuning is not None
        for found in self.objects.values():
            tuning.jobs.put(read_job(json.dumps({**found, **({"status": status} if status else {})}).encode()))


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


class Bucket:
    def __init__(self, endpoint: str) -> None:
        self.client: Any = boto3.client("s3", endpoint_url=endpoint)
        self.name = f"b{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=self.name)

    def keys(self) -> list[str]:
        return [found["Key"] for found in self.client.list_objects_v2(Bucket=self.name).get("Contents", ())]

    def uploads(self) -> list[Any]:
        return list(self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", ()))


class Place:
    """A gateway with the API, and who asks it."""

    def __init__(self, gateway: Running, kubernetes: Kubernetes, bucket: Bucket) -> None:
        self.gateway, self.kubernetes, self.bucket = gateway, kubernetes, bucket
        self.file = ""

    async def upload(self) -> None:
        """A file to train on."""
        async with self.sdk() as sdk:
            self.file = (await sdk.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")).id

    def sdk(self, key: str = KEY, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.gateway.url}/v1", api_key=key, **{"max_retries": 0, **options})


@pytest.fixture
async def place(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    for name, value in (("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    (tmp_path / "models.yaml").write_text(MAP)
    bucket, kubernetes = Bucket(endpoint), Kubernetes()
    settings = {
        "database": f"sqlite:///{tmp_path}/gateway.db",
        "fine_tuning_models": str(tmp_path / "models.yaml"),
        "fine_tuning_storage": f"s3://{bucket.name}/files",
        "fine_tuning_s3_endpoint": endpoint,
        "fine_tuning_file_bytes": 20 * 2**20,
    }
    async with running(kubernetes, **{**settings, **getattr(request, "param", {})}) as gateway:
        gateway.key(fine_tuning=True)
        gateway.key(CHATS, "chats")
        gateway.key(OTHERS, "others", namespace="team-b", fine_tuning=True)
        assert gateway.parts.store is not None
        await gateway.parts.store.flush()
        yield Place(gateway, kubernetes, bucket)


async def refused(call: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as found:
        await call
    return found.value


async def test_files(place: Place) -> None:
    async with place.sdk() as sdk, place.sdk(OTHERS) as other:
        file = await sdk.files.create(file=("../rows.jsonl", ROWS), purpose="fine-tune")
        assert (file.status, file.bytes, file.filename, file.purpose) == ("processed", len(ROWS), "rows.jsonl", "fine-tune")
        assert await sdk.files.retrieve(file.id) == file and (await sdk.files.content(file.id)).content == ROWS
        (key,) = place.bucket.keys()
        assert key.startswith("files/team-a/sha256-") and key.endswith(".jsonl")
        again = await sdk.files.create(file=("b.jsonl", ROWS), purpose="fine-tune")
        bad = await sdk.files.create(file=("bad.jsonl", b"{}\n" + ROWS), purpose="fine-tune")
        assert bad.status == "error" and str(bad.status_details).startswith("line 1: ")
        found = [one.id async for one in await sdk.files.list(limit=1, order="asc")]
        assert sorted(found) == sorted([file.id, again.id, bad.id]) and (await sdk.files.list(purpose="batch")).data == []
        for call in (
            other.files.retrieve(file.id),
            other.files.content(file.id),
            other.files.delete(file.id),
            sdk.files.retrieve("file-x"),
        ):
            failure = await refused(call)
            assert (failure.status_code, failure.code, failure.response.headers["x-should-retry"]) == (404, "file_not_found", "false")
        assert (await other.files.list()).data == []
        assert (await sdk.files.delete(file.id)).deleted
        assert len(place.bucket.keys()) == 2, "another file has the same bytes"
        await sdk.files.delete(again.id)
        assert len(place.bucket.keys()) == 1


async def test_a_large_file_comes_in_parts_and_nothing_is_left_of_what_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "PART", 5 * 2**20)
    large = (ROWS + b"\n") * (12 * 2**20 // len(ROWS))
    async with place.sdk() as sdk:
        file = await sdk.files.create(file=("large.jsonl", large), purpose="fine-tune")
        assert file.bytes == len(large) > 12 * 2**20 and (await sdk.files.content(file.id)).content == large
        (key,) = place.bucket.keys()
        assert key.startswith("files/team-a/sha256-")
        failure = await refused(sdk.files.create(file=("huge.jsonl", large * 2), purpose="fine-tune"))
        assert (failure.status_code, failure.code) == (413, "file_too_large")

        async def broken() -> AsyncIterator[bytes]:
            yield b'--B\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
            yield large
            raise OSError

        with contextlib.suppress(aiohttp.ClientError, OSError):
            headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "multipart/form-data; boundary=B"}
            async with aiohttp.ClientSession() as session:
                await session.post(f"{place.gateway.url}/v1/files", data=broken(), headers=headers)
        await until(lambda: not place.bucket.uploads())
        assert place.bucket.keys() == [key] and len((await sdk.files.list()).data) == 1


async def test_a_file_in_parts(place: Place) -> None:
    """By the SDK's own verbs; the parts go when the file is whole, or given up."""
    halves = (ROWS[: len(ROWS) // 2], ROWS[len(ROWS) // 2 :])
    async with place.sdk() as sdk, place.sdk(OTHERS) as other:

        async def begun(size: int = len(ROWS)) -> Any:
            return await sdk.uploads.create(bytes=size, filename="a/rows.jsonl", mime_type="text/jsonl", purpose="fine-tune")

        upload = await begun()
        assert (upload.status, upload.filename, upload.expires_at - upload.created_at) == ("pending", "rows.jsonl", 3600)
        parts = [(await sdk.uploads.parts.create(upload.id, data=half)).id for half in reversed(halves)][::-1]
        assert len(place.bucket.keys()) == 2
        for ids, md5, param in (
            ([parts[0]], None, "part_ids"),
            ([*parts, "part_x"], None, "part_ids"),
            (parts, "0" * 32, "md5"),
        ):
            assert (await refused(sdk.uploads.complete(upload.id, part_ids=ids, md5=md5 or openai.omit))).param == param
        assert (await refused(other.uploads.complete(upload.id, part_ids=parts))).code == "upload_not_found"
        done = await sdk.uploads.complete(upload.id, part_ids=parts, md5=hashlib.md5(ROWS).hexdigest())
        assert done.status == "completed" and done.file is not None and done.file.status == "processed"
        assert (await sdk.files.content(done.file.id)).content == ROWS and len(place.bucket.keys()) == 1
        again = await sdk.uploads.complete(upload.id, part_ids=parts)
        assert again.file == done.file, "a retry, whose first try was carried out"
        assert (await refused(sdk.uploads.cancel(upload.id))).code == "invalid_upload_state"
        given_up = await begun()
        await sdk.uploads.parts.create(given_up.id, data=halves[0])
        assert (await sdk.uploads.cancel(given_up.id)).status == "cancelled" and len(place.bucket.keys()) == 1
        assert (await refused(sdk.uploads.parts.create(given_up.id, data=halves[0]))).code == "invalid_upload_state"
        assert (await refused(begun(2**40))).param == "bytes"


async def test_a_client_that_drips_is_sent_away(place: Place) -> None:
    files: Any = place.gateway.parts.tuning._files  # type: ignore[union-attr]
    files._limits = Limits(2**20, 0.2, 0.5)

    async def dripping(pause: float) -> AsyncIterator[bytes]:
        yield b'--B\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(12):
            await asyncio.sleep(pause)
            yield b"x"

    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "multipart/form-data; boundary=B"}
    async with aiohttp.ClientSession(headers=headers) as session:
        for pause in (0.1, 0.4):
            async with session.post(f"{place.gateway.url}/v1/files", data=dripping(pause)) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (408, "body_timeout")
    assert place.bucket.keys() == [] and place.bucket.uploads() == []


async def test_a_full_bucket_is_no_reason_to_try_again(place: Place) -> None:
    async with place.sdk() as sdk:
        place.bucket.client.delete_bucket(Bucket=place.bucket.name)
        failure = await refused(sdk.files.create(file=("a.jsonl", ROWS), purpose="fine-tune"))
        assert (failure.status_code, failure.response.headers["x-should-retry"]) == (503, "true")
    error = blobs.ClientError({"Error": {"Code": "XMinioStorageFull"}}, "PutObject")
    full = blobs._refusal(error)
    assert (full.status, full.code, dict(full.headers)[b"x-should-retry"]) == (403, "insufficient_quota", b"false")


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"purpose": "batch"}, "purpose"),
        ({}, "purpose"),
        ({"purpose": "fine-tune", "expires_after[seconds]": "3600"}, "expires_after[seconds]"),
        ({"purpose": "fine-tune", "colour": "red"}, "colour"),
        ({"purpose": "x" * 2000}, "purpose"),
        ({"purpose": "fine-tune", "file": None}, "file"),
    ],
)
async def test_bad_forms(place: Place, form: dict[str, Any], param: str) -> None:
    data = aiohttp.FormData(default_to_multipart=True)
    for name, value in {"file": "", **form}.items():
        if value is not None:
            data.add_field(name, value or ROWS, **({} if value else {"filename": "rows.jsonl"}))
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session,
        session.post(f"{place.gateway.url}/v1/files", data=data) as answer,
    ):
        error = (await answer.json())["error"]
    assert (answer.status, error["param"]) == (400, param) and error.keys() == {"message", "type", "param", "code"}
    assert place.bucket.keys() == []


async def test_a_job_from_its_file_to_its_results(place: Place) -> None:
    async with place.sdk() as sdk, place.sdk(OTHERS) as other:
        file = await sdk.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        job = await sdk.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=file.id, suffix="my bot", metadata={"a": "b"})
        assert (job.status, job.organization_id, job.training_file) == ("validating_files", "team-a", file.id)
        ((namespace, name), made) = next(iter(place.kubernetes.objects.items()))
        assert namespace == "team-a" and name.startswith("my-bot-") and made["spec"]["model"]["uri"] == "hf://org/base"
        (key,) = place.bucket.keys()
        assert made["spec"]["dataset"]["train"]["uri"] == f"s3://{place.bucket.name}/{key}"
        assert place.kubernetes.users[0] == ("system:serviceaccount:team-a:finetune-keys", ())
        assert (await refused(sdk.files.delete(file.id))).code == "file_in_use"
        for call in (
            other.fine_tuning.jobs.retrieve(job.id),
            other.fine_tuning.jobs.cancel(job.id),
            other.fine_tuning.jobs.list_events(job.id),
        ):
            assert (await refused(call)).status_code == 404
        paused = await sdk.fine_tuning.jobs.pause(job.id)
        place.kubernetes.tell(place.gateway)
        assert (paused.status, made["spec"]["runPolicy"]) == ("queued", {"suspend": True})
        await sdk.fine_tuning.jobs.resume(job.id)
        for step in (5, 10):
            place.kubernetes.tell(
                place.gateway, {"phase": "Training", "progress": {**PROGRESS, "step": step}, "checkpoint": {"step": step}}
            )
        assert (await sdk.fine_tuning.jobs.retrieve(job.id)).estimated_finish
        place.kubernetes.tell(place.gateway, ENDED)
        ended = await sdk.fine_tuning.jobs.retrieve(job.id)
        assert (ended.status, ended.trained_tokens) == ("succeeded", 2500)
        told = [event async for event in await sdk.fine_tuning.jobs.list_events(job.id, limit=2)]
        assert [event.data["step"] for event in told if event.type == "metrics" and isinstance(event.data, dict)] == [10, 5]
        assert {f"Created fine-tuning job: {job.id}", "The job has successfully completed"} <= {event.message for event in told}
        assert len({event.id for event in told}) == len(told)
        steps = [point.step_number async for point in await sdk.fine_tuning.jobs.checkpoints.list(job.id, limit=1)]
        assert steps == [10, 5]
        (results,) = ended.result_files
        table = (await sdk.files.content(results)).text
        assert table.splitlines()[0] == "step,train_loss,valid_loss,learning_rate,tokens_per_second,epoch"
        assert [line.split(",")[0] for line in table.splitlines()[1:]] == ["5", "10"]
        assert (await sdk.files.retrieve(results)).bytes == len(table) and (await refused(other.files.content(results))).status_code == 404
        assert (await refused(sdk.fine_tuning.jobs.cancel(job.id))).code == "invalid_job_state"
        model = await sdk.models.retrieve(str(ended.fine_tuned_model))
        assert model.owned_by == "team-a" and model.id in [found.id async for found in sdk.models.list()]
        assert (await refused(other.models.retrieve(model.id))).code == "model_not_found"
        assert (await refused(sdk.models.delete(model.id))).code == "unsupported_operation"
        assert (await refused(sdk.fine_tuning.checkpoints.permissions.list("ft:x"))).code == "unsupported_operation"
        chat = await refused(sdk.chat.completions.create(model=model.id, messages=[]))
        assert (chat.status_code, chat.code) == (404, "model_not_found") and model.id in chat.message


async def test_the_trainer_fetches_what_was_uploaded(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the source that stands in the job, with the keys of a Secret of its own namespace."""
    monkeypatch.setenv(Env.ALLOWED_HOSTS, "127.0.0.1")
    await place.upload()
    await create(place)
    ((_, made),) = place.kubernetes.objects.items()
    source = made["spec"]["dataset"]["train"]
    assert source["secretRef"] == {"name": "finetune-files"}
    (tmp_path / "keys").mkdir()
    for name in S3_KEYS:
        (tmp_path / "keys" / name).write_text("k")
    context = Shelf(tmp_path).context(dataset=made["spec"]["dataset"])
    context.job.secrets["train"] = str(tmp_path / "keys")
    fetched = await asyncio.to_thread(fetch, context, context.job.spec.dataset.train, "train")
    assert fetched.read_bytes() == ROWS and fetched.suffix == ".jsonl"


async def test_cancelling_is_for_good_and_can_be_said_twice(place: Place) -> None:
    async with place.sdk() as sdk:
        file = await sdk.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        job = await sdk.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=file.id)
        assert (await sdk.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
        place.kubernetes.tell(place.gateway)
        assert (await sdk.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
        assert (await refused(sdk.fine_tuning.jobs.resume(job.id))).code == "invalid_job_state"


async def test_lists_are_pages_newest_first(place: Place) -> None:
    async with place.sdk() as sdk:
        file = await sdk.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        made = {(await sdk.fine_tuning.jobs.create(model="gpt-plain", training_file=file.id, metadata={"n": str(n)})).id for n in range(5)}
        found = [job.id async for job in await sdk.fine_tuning.jobs.list(limit=2)]
        assert len(found) == 5 and set(found) == made
        assert len((await sdk.fine_tuning.jobs.list(metadata={"n": "3"})).data) == 1
        assert (await refused(sdk.fine_tuning.jobs.list(after="ftjob-x"))).param == "after"


async def test_what_no_job_is_made_of(place: Place) -> None:
    async with place.sdk() as sdk:
        bad = await sdk.files.create(file=("bad.jsonl", b"no\n" + ROWS), purpose="fine-tune")
        pairs = b"\n".join(json.dumps(PAIR).encode() for _ in range(10))
        pair = await sdk.files.create(file=("pairs.jsonl", pairs), purpose="fine-tune")
        for fields, param in (
            ({"model": "gpt-9", "training_file": bad.id}, "model"),
            ({"model": "gpt-plain", "training_file": bad.id}, "training_file"),
            ({"model": "gpt-plain", "training_file": pair.id}, "training_file"),
            ({"model": "gpt-plain", "training_file": pair.id, "validation_file": "file-x", "method": {"type": "dpo"}}, "validation_file"),
            ({"model": "gpt-plain", "training_file": pair.id, "extra_body": {"colour": 1}}, "colour"),
        ):
            failure = await refused(sdk.fine_tuning.jobs.create(**fields))
            assert (failure.param, failure.response.headers["x-should-retry"]) == (param, "false")
        assert place.kubernetes.objects == {}
        await sdk.fine_tuning.jobs.create(model="gpt-plain", training_file=pair.id, method={"type": "dpo"})


async def create(place: Place, tries: int = 0, **options: Any) -> str:
    """A create as the SDK's first try, or as one that repeats it."""
    body = {"model": "gpt-plain", "training_file": place.file, **options.pop("body", {})}
    headers = {"Authorization": f"Bearer {KEY}", "x-stainless-retry-count": str(tries), **options}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{place.gateway.url}/v1/fine_tuning/jobs", json=body) as answer,
    ):
        found = await answer.json()
        return str(found["id"] if answer.status == 200 else found["error"]["code"])


async def test_a_retried_create_makes_one_job_and_two_wanted_ones_make_two(place: Place) -> None:
    await place.upload()
    first = await create(place)
    assert await create(place, 1) == first
    second = await create(place)
    assert second != first and await create(place, 2) == second
    assert await create(place, 1, body={"seed": 3}) not in (first, second)
    assert len(place.kubernetes.objects) == 3
    tuning = place.gateway.parts.tuning
    assert tuning is not None
    # a gateway that has not heard of any of them, as another replica, or one that was killed after the write
    tuning.jobs.replace([])
    assert await create(place, 1) in (first, second)
    tuning.jobs.replace([])
    third = await create(place)
    assert third not in (first, second) and len(place.kubernetes.objects) == 4


async def test_an_answer_that_is_lost_after_the_write(place: Place) -> None:
    """The SDK's own retry finds the job; an old twin is no twin."""
    async with place.sdk(max_retries=2) as sdk:
        await place.upload()
        place.kubernetes.unheard = 1
        job = await sdk.fine_tuning.jobs.create(model="gpt-plain", training_file=place.file)
        ((_, made),) = place.kubernetes.objects.items()
        assert job.id == "ftjob-" + made["metadata"]["uid"].replace("-", "")
    made["metadata"]["creationTimestamp"] = (datetime.now(UTC) - creating.WINDOW - timedelta(seconds=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
    place.kubernetes.tell(place.gateway)
    assert await create(place, 1) != job.id and len(place.kubernetes.objects) == 2


async def test_a_retry_that_overtakes_the_try_that_it_repeats(place: Place) -> None:
    await place.upload()
    held, original = asyncio.Event(), place.kubernetes.request

    async def slow(method: str, path: str, **more: Any) -> dict[str, Any]:
        if method == "POST" and not held.is_set():
            held.set()
            await asyncio.sleep(0.3)
        return await original(method, path, **more)

    place.kubernetes.request = slow  # type: ignore[method-assign]
    first = asyncio.create_task(create(place))
    await held.wait()
    assert await create(place, 1) == await first and len(place.kubernetes.objects) == 1


@pytest.mark.parametrize("place", [{"replicas": 2}], indirect=True)
async def test_a_job_that_another_gateway_made_a_moment_ago(place: Place) -> None:
    """Its own watch brings it: who asks waits for that. What is nobody's is not there, a second later."""
    await place.upload()
    made = await create(place)
    place.gateway.parts.tuning.jobs.replace([])  # type: ignore[union-attr]
    async with place.sdk() as sdk:
        asked = asyncio.create_task(sdk.fine_tuning.jobs.retrieve(made))
        await asyncio.sleep(0.2)
        place.kubernetes.tell(place.gateway)
        assert (await asked).id == made
        assert (await refused(sdk.fine_tuning.jobs.retrieve("ftjob-" + "0" * 32))).status_code == 404


async def test_an_idempotency_key(place: Place) -> None:
    await place.upload()
    key = {"Idempotency-Key": "k1"}
    first = await create(place, **key)
    assert await create(place, **key) == first != await create(place, **{"Idempotency-Key": "k2"})
    assert await create(place, **key, body={"seed": 1}) == "idempotency_key_reused"
    place.gateway.parts.tuning.jobs.replace([])  # type: ignore[union-attr]
    assert await create(place, **key) == first


async def test_what_kubernetes_refuses(place: Place) -> None:
    await place.upload()
    for failure, code in (
        (APIError(403, "Forbidden", "no rights"), "permission_denied"),
        (APIError(403, "Forbidden", "exceeded quota: jobs"), "insufficient_quota"),
        (APIError(422, "Invalid", "spec.x"), "invalid_value"),
        (APIError(0, "Unreachable", "away"), "try_again"),
    ):
        place.kubernetes.refuses = failure
        assert await create(place) == code


async def test_who_may(place: Place) -> None:
    """Keys for fine-tuning; tokens by their rights in the namespace that they name, and to write only where they are impersonated."""
    gateway = place.gateway
    account = "system:serviceaccount:team-a:ci"
    gateway.reviews.users = {"account": account, "person": "jo"}
    async with place.sdk(CHATS) as chats, place.sdk("account") as ci:
        assert (await refused(chats.files.list())).code == "permission_denied"
        assert (await refused(ci.files.list())).code == "organization_not_found"
        assert (await refused(ci.with_options(organization="../x").files.list())).code == "organization_not_found"
    gateway.reviews.on_jobs = {(user, verb, "team-a") for user in (account, "jo") for verb in ("list", "create")}
    gateway.reviews.users["account2"] = account  # what was refused a moment ago is kept for a few seconds
    async with place.sdk("account2") as ci, place.sdk("person", organization="team-a") as jo, place.sdk("person") as nowhere:
        file = await ci.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        assert (await refused(jo.fine_tuning.jobs.create(model="gpt-plain", training_file=file.id))).code == "permission_denied"
        place.gateway.parts.tuning._actors._users = True  # type: ignore[union-attr]
        job = await ci.fine_tuning.jobs.create(model="gpt-plain", training_file=file.id)
        assert place.kubernetes.users[-1] == (account, ()) and [found.id for found in (await jo.fine_tuning.jobs.list()).data] == [job.id]
        await jo.fine_tuning.jobs.create(model="gpt-plain", training_file=file.id)
        assert place.kubernetes.users[-1] == ("jo", ("g",))
        assert (await refused(ci.fine_tuning.jobs.cancel(job.id))).code == "permission_denied", "no right to patch"
        assert (await refused(nowhere.fine_tuning.jobs.list())).code == "missing_organization"
        other = ci.with_options(organization="team-b")
        assert (await refused(other.fine_tuning.jobs.list())).code == "organization_not_found"


async def test_a_fine_tuned_model_answers_where_it_is_served(place: Place) -> None:
    from tests.gateway import Replica, endpoint, served

    async with place.sdk() as sdk, Replica().serving() as replica:
        file = await sdk.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        job = await sdk.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=file.id)
        place.kubernetes.tell(place.gateway, ENDED)
        name = str((await sdk.fine_tuning.jobs.retrieve(job.id)).fine_tuned_model)
        place.gateway.see(endpoint(served(replica.address, "support@4"), model="support", version=4))
        assert (await sdk.chat.completions.create(model=name, messages=[])).model == "support@4"
        async with place.sdk(CHATS) as chats:
            assert name in [found.id async for found in chats.models.list()], "served at an endpoint that they may use"
            assert (await chats.chat.completions.create(model=name, messages=[])).model == "support@4"
        async with place.sdk(OTHERS) as other:
            failure = await refused(other.chat.completions.create(model=name, messages=[]))
            assert failure.code == "model_not_found" and "support" not in failure.message


async def test_a_store_that_is_away_loses_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async with place.sdk() as sdk:
        file = await sdk.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        job = await sdk.fine_tuning.jobs.create(model="gpt-plain", training_file=file.id)
        store: Any = place.gateway.parts.store
        within = store._within

        async def away(*_: Any) -> None:
            raise StoreAway("it does not answer")

        monkeypatch.setattr(store, "_within", away)
        place.kubernetes.tell(place.gateway, {"phase": "Training", "progress": PROGRESS})
        failure = await refused(sdk.fine_tuning.jobs.list_events(job.id))
        assert (failure.status_code, failure.response.headers["x-should-retry"]) == (503, "true")
        place.kubernetes.tell(place.gateway, {"phase": "Training", "conditions": [condition("Running")]})
        monkeypatch.setattr(store, "_within", within)
        told = [event.type async for event in await sdk.fine_tuning.jobs.list_events(job.id)]
        assert told.count("metrics") == 1


async def test_bad_json(place: Place) -> None:
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session:
        for body, status in (
            (b"[", 400),
            (b"[]", 400),
            (b'{"a":' * 100_000, 400),
            (b"x" * (2**20 + 1), 413),
            (base64.b64decode("/w=="), 400),
        ):
            async with session.post(f"{place.gateway.url}/v1/fine_tuning/jobs", data=body) as answer:
                assert answer.status == status and "error" in await answer.json()
