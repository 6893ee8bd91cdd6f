"""A FineTunedModel's storage: numbers that are given once, versions that are whole or not there, the stage catalog.

On a volume, and in a bucket over S3's protocol: moto in place of S3, the protocol is real, the store is not.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import botocore.client
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from safetensors.numpy import save_file

from finetune_api.contract import S3_KEYS, CatalogFile, CatalogReport, Env, ExitCode, JobFile, ModelStorage, Mounts, read_stage_result
from finetune_api.serving import OrderedModel
from finetune_api.validation import parse_spec
from finetune_api.versions import VersionRecord
from finetune_trainer.data.prompts import prompt_key, unseen
from finetune_trainer.export.versions import _Shelf, lora_rank
from finetune_trainer.job.context import Context
from finetune_trainer.models import versions
from finetune_trainer.models.fetch import fetch_model
from finetune_trainer.models.weights import ADAPTER_CONFIG
from finetune_trainer.process.errors import InfrastructureError, SourceUnavailable, UserError
from finetune_trainer.remote import retry, storage
from finetune_trainer.serving.checks import check_whole_numbers
from finetune_trainer.serving.storage import fetch_whole
from finetune_trainer.stages.catalog import catalog
from finetune_trainer.stages.check import check
from finetune_trainer.stages.publish import publish
from tests.factory import MINIMAL, merged
from tests.unit.test_results import forms_are_restored

MODEL = "support-bot"
ROW = {"messages": [{"role": "user", "content": "a question of a user"}, {"role": "assistant", "content": "an answer"}]}
PROBES = '{"probes": [], "fingerprint": "a row of a user"}'


class Line:
    """The storage of a FineTunedModel, and jobs that publish to it."""

    def __init__(self, folder: Path, model: ModelStorage) -> None:
        self.folder, self.model, self.keys = folder, model, folder / "keys"
        self.keys.mkdir(parents=True, exist_ok=True)
        for name in S3_KEYS:
            (self.keys / name).write_text("k")
        self.claim = folder / "claim"
        self.claim.mkdir(exist_ok=True)
        self.mounts = {"pvc://versions": str(self.claim)}

    @property
    def storage(self) -> storage.Storage:
        return storage.open_storage(self.model, self.mounts, str(self.keys))

    def context(self, name: str = "j", uid: str = "11111111-a", rows: tuple[Any, ...] = (ROW,), **blocks: Any) -> Context:
        """A finished job that publishes a version."""
        spec = parse_spec(merged(MINIMAL, **{"publish": [{"model": MODEL}], **blocks}))
        job = JobFile(
            name=name, namespace="n", uid=uid, spec=spec, models={MODEL: self.model}, secrets={f"model-{MODEL}": str(self.keys)},
            targets=self.mounts, sources=self.mounts,
        )  # fmt: skip
        context = Context(job, str(self.folder / "workspace"))
        output = Path(context.layout.output)
        (output / "adapter_model.safetensors").write_bytes(b"weights of " + name.encode())
        (output / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 8, "rank_pattern": {"q_proj": 32, "v_proj": 4}}))
        dataset = {"train": 9, "eval": 1, "tokens": 99, "format": "text", "digest": "sha256:0"}
        context.write_json(context.layout.data_report, {"dataset": dataset})
        base = {"uri": "hf://org/base", "revision": "c0ffee", "fingerprint": "sha256:1", "path": "/x"}
        context.write_json(context.layout.reference("model"), base)
        pq.write_table(pa.table({"row": [json.dumps(row) for row in rows]}), context.layout.train_rows)
        Path(context.layout.probes).write_text(PROBES)
        return context

    def record(self, number: int) -> VersionRecord:
        found = versions.read_record(self.storage, number)
        assert found is not None
        return found

    def check_whole(self) -> list[int]:
        """Every version that has a record has all of it, as its record says; their numbers."""
        numbers = versions.recorded_numbers(self.storage)
        for number in numbers:
            record = self.record(number)
            folder = versions.fetch_version(self.storage, record, str(self.folder / f"read-{threading.get_ident()}-{len(numbers)}"))
            assert (folder / "adapter_model.safetensors").read_bytes() == b"weights of " + record.job.name.encode()
            assert self.storage.read(f"probes/{number}.json") == PROBES.encode()
            assert self.storage.read(f"prompts/{number}.bin") == prompt_key(ROW)
        return numbers

    def catalog(self, **wanted: Any) -> CatalogFile:
        mounted = {"targets": self.mounts, "secrets": {"storage": str(self.keys)}}
        return CatalogFile(name=MODEL, namespace="n", uid="m", storage=self.model, **mounted, **wanted)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    server.stop()


Lines = Callable[[], Line]


@pytest.fixture(params=["pvc", "s3"])
def lines(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lines:
    """Makes storages that are empty, each another."""
    monkeypatch.setenv(Env.ALLOWED_HOSTS, "127.0.0.1")
    monkeypatch.setattr(retry, "_PAUSES", (0.01,))
    made: list[Line] = []
    if request.param == "s3":
        url = request.getfixturevalue("endpoint")
        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
        client: Any = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)
        bucket = f"b{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:16]}"
        client.create_bucket(Bucket=bucket)

    def make() -> Line:
        model = ModelStorage(storage=f"pvc://versions/team/m{len(made)}")
        if request.param == "s3":
            model = ModelStorage(storage=f"s3://{bucket}/team/m{len(made)}", s3_endpoint=url)
        made.append(Line(tmp_path, model))
        return made[-1]

    return make


@pytest.fixture
def line(lines: Lines) -> Line:
    return lines()


def test_a_whole_model_as_it_was_published_is_let_in_by_a_replica(line: Line, tmp_path: Path) -> None:
    context = line.context(tuning={"method": "full"})
    output = Path(context.layout.output)
    for file in ("adapter_model.safetensors", ADAPTER_CONFIG):
        (output / file).unlink()
    save_file({"a": np.ones((2, 2), np.float32)}, output / "model.safetensors")
    (output / "config.json").write_text('{"model_type": "llama"}')
    publish(context)
    record = line.record(1)
    order = OrderedModel(name=f"{MODEL}@1", model=MODEL, number=1, storage=line.model.storage, digest=record.digest)
    assert (record.form, record.merged) == ("Model", False)
    folder = fetch_whole(line.storage, order, tmp_path / "here")
    assert (folder / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes() and (folder / "config.json").is_file()
    check_whole_numbers(folder, order.name)


def test_a_merged_model_beside_the_adapter_is_on_record(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(_: Context, bundle: Path) -> list[Any]:
        (bundle / "merged").mkdir()
        (bundle / "merged" / "config.json").write_text("{}")
        return []

    monkeypatch.setitem(sys.modules, "finetune_trainer.export.forms", SimpleNamespace(export=export))
    publish(line.context(output={"merged": True}))
    assert line.record(1).merged and line.storage.read("versions/1/merged/config.json") == b"{}"
    publish(line.context(name="k", uid="22222222-b"))
    assert not line.record(2).merged


def test_a_version_and_its_record(line: Line) -> None:
    """Files as anywhere else, and a record from which the object can be made again; the same job again changes nothing."""
    assert check(line.context()).reason == "TargetsReady" and not line.storage.names("versions"), "asking leaves nothing behind"
    context = line.context(tuning={"lora": {"rank": 8}})
    arms = [{"name": "Base", "metrics": {"loss": 2.0}, "shots": 0}, {"name": "Tuned", "metrics": {"loss": 1.0}, "shots": 0}]
    context.write_json(
        context.layout.evaluation_report,
        {"arms": arms, "examples": 9, "prompts": 9, "comparedWith": "Base", "improvement": 0.5, "interval": [0.4, 0.6], "gate": "Passed",
         "reason": "Compared", "message": "m", "systemPrompt": "", "samples": [{"prompt": "a question of a user"}]},
    )  # fmt: skip
    result = publish(context)
    artifact = result.result["artifacts"][0]
    assert artifact["uri"] == f"{line.model.storage}/versions/1"
    assert (artifact["model"], artifact["version"], artifact["rank"]) == (MODEL, 1, 32), "the largest rank, of a pattern, too"
    found = line.record(1)
    assert (found.number, found.job.name, found.job.uid, found.digest) == (1, "j", "11111111-a", artifact["digest"])
    assert found.base.to_wire() == {"uri": "hf://org/base", "revision": "c0ffee", "fingerprint": "sha256:1"}
    assert (found.data_digest, found.parent, found.rank, found.form, found.state) == ("sha256:0", None, 32, "Adapter", "Candidate")
    assert found.tuning["lora"]["rank"] == 8 and found.evaluation is not None
    assert [(arm.name, arm.metrics) for arm in found.evaluation.arms] == [("Base", {"loss": 2.0}), ("Tuned", {"loss": 1.0})]
    assert line.check_whole() == [1]
    before = line.storage.read("records/1.json")
    assert publish(context) == result and line.storage.read("records/1.json") == before
    again = line.context(uid="22222222-b", tuning={"lora": {"rank": 8}})
    assert (check(again).reason, check(again).result) == ("Restored", result.result), "made again from a backup"
    for number in line.storage.names("versions"):
        for name in line.storage.names(f"versions/{number}"):
            body = line.storage.read(f"versions/{number}/{name}") or b""
            assert b"a row of a user" not in body and b"a question of a user" not in body, "rows of the user's are nowhere else"


def test_of_two_jobs_at_once_each_has_its_number(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both look before either writes."""
    barrier = threading.Barrier(2, timeout=60)
    kind = type(line.storage)
    claim, waited = kind.claim, threading.local()

    def together(*arguments: Any) -> bool:
        if not getattr(waited, "once", False):
            waited.once = True
            barrier.wait()
        return claim(*arguments)

    monkeypatch.setattr(kind, "claim", together)
    found: dict[str, Any] = {}
    contexts = [line.context(name=name, uid=f"{name * 8}-a") for name in ("k", "l")]
    threads = [threading.Thread(target=lambda c=c: found.update({c.job.name: publish(c)})) for c in contexts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.result["artifacts"][0]["version"] for result in found.values()) == [1, 2]
    assert line.check_whole() == [1, 2] and {line.record(1).job.name, line.record(2).job.name} == {"k", "l"}


_WRITES = ("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "AbortMultipartUpload", "DeleteObject")


class Killer:
    """Ends the process, as it were, before the write of that number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        call = botocore.client.BaseClient._make_api_call

        def asked(client: Any, operation: str, arguments: Any) -> Any:
            if operation in _WRITES:
                self.count()
            return call(client, operation, arguments)

        monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", asked)
        for owner, name in (
            (Path, "rename"),
            (Path, "replace"),
            (Path, "mkdir"),
            (Path, "write_bytes"),
            (shutil, "copyfile"),
            (shutil, "rmtree"),
        ):
            self._watch(monkeypatch, owner, name)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watched(*arguments: Any, **more: Any) -> Any:
            if any("/claim/" in str(argument) for argument in arguments):
                self.count()
            return real(*arguments, **more)

        monkeypatch.setattr(owner, name, watched)

    def count(self) -> None:
        if self.left is None:
            return
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def kills(self, act: Callable[[], Any], after: int) -> bool:
        self.left = after
        try:
            act()
        except KeyboardInterrupt:
            return True
        finally:
            self.left = None
        return False


def test_a_job_that_is_killed_between_any_two_writes(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has a record is whole; another job gets another number; the job itself goes on with its own."""
    killer = Killer(monkeypatch)
    for after in range(100):
        line = lines()
        context = line.context()
        killed = killer.kills(lambda c=context: publish(c), after)
        assert line.check_whole() in ([], [1]), after
        other = _Shelf(line.context(name="k", uid="22222222-b"), line.storage).claim(b'{"job": {"uid": "22222222-b"}}')
        own = publish(context).result["artifacts"][0]["version"]
        assert own != other and line.check_whole() == [own], after
        assert sorted(int(name) for name in line.storage.names("versions")) == sorted((own, other)), f"{after}: a number for each"
        if not killed:
            assert after > 8
            return
    raise AssertionError("there is no end of writes")


def test_forms_of_a_version_that_is_there_already_are_told(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    forms_are_restored(monkeypatch, line.context)


def test_numbers_are_never_given_twice(line: Line) -> None:
    """Also where the files of the highest are gone, a record is damaged, or a job was killed when it had its number."""
    publish(line.context())
    line.storage.remove("versions/1")
    line.storage.write("records/2.json", b"{")
    assert line.storage.claim("versions/3", "finetune.json", b"{}") and not line.storage.claim("versions/3", "finetune.json", b"{}")
    assert publish(line.context(name="k", uid="22222222-b")).result["artifacts"][0]["version"] == 4
    removed = line.record(1).model_copy(update={"removed_at": "2026-11-29T00:00:00Z"})
    line.storage.write("records/1.json", json.dumps(removed.to_wire()).encode())
    assert check(line.context()).reason == "Restored", "it made its version, which was removed since"
    assert publish(line.context()).result["artifacts"][0]["version"] == 5, "trained anew"


def test_targets_that_will_not_take_a_version_are_told_before_gpus_are_taken(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = line.context(publish=[{"model": "sales"}])
    with pytest.raises(UserError, match="FineTunedModel sales is not known here"):
        check(unknown)
    if line.model.storage.startswith("pvc://"):
        line.claim.joinpath("team").write_text("x")
        with pytest.raises(InfrastructureError, match="team in claim versions cannot be written"):
            check(line.context())
    else:
        line.model = line.model.model_copy(update={"storage": "s3://nobodys/team/m"})
        with pytest.raises(UserError, match="there is no bucket nobodys"):
            check(line.context())


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server in the operator's place; keeps what it was told."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told.append((self.path, self.headers["Authorization"], body))
            self.send_response(answers.pop(0) if answers else 204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    told: list[tuple[str, str, bytes]] = []
    answers: list[int] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "token").write_text("t\n")
    monkeypatch.setattr(Mounts, "TOKEN", str(tmp_path / "tokens"))
    monkeypatch.setenv(Env.PROGRESS_URL, f"http://127.0.0.1:{server.server_port}")
    server.told, server.answers = told, answers  # type: ignore[attr-defined]
    yield server
    server.shutdown()
    server.server_close()


def test_the_catalog_writes_states_removes_files_and_reports(line: Line, operator: Any) -> None:
    for name in ("j", "k", "l"):
        publish(line.context(name=name, uid=f"{name * 8}-a"))
    line.storage.write("records/9.json", b'{"number": 9')
    later = {**json.loads(line.storage.read("records/3.json") or b""), "signedBy": "a later release"}
    line.storage.write("records/3.json", json.dumps(later).encode())
    untouched = line.storage.read("records/2.json")
    operator.answers += [503]
    wanted = line.catalog(states={1: "Retired", 2: "Candidate", 3: "Champion", 9: "Retired"}, remove=[1, 9])
    result = catalog(wanted)
    assert result.reason == "Cataloged" and "records/9.json cannot be read" in result.message
    path, token, body = operator.told[-1]
    assert (path, token, len(operator.told)) == (f"/v1/namespaces/n/finetunedmodels/{MODEL}/catalog", "Bearer t", 2)
    report = CatalogReport.model_validate_json(body)
    assert report.done == wanted.digest and len(report.unreadable) == 1 and report.unreadable[0].startswith("records/9.json")
    assert [(r.number, r.state, r.removed_at is None) for r in report.records] == [
        (1, "Retired", False), (2, "Candidate", True), (3, "Champion", True),
    ]  # fmt: skip
    assert line.storage.names("versions") == ["2", "3"] and line.storage.names("probes") == ["2.json", "3.json"]
    assert line.storage.names("prompts") == ["1.bin", "2.bin", "3.bin"], "later ones may descend from it"
    assert line.storage.read("records/2.json") == untouched
    assert json.loads(line.storage.read("records/3.json") or b"")["signedBy"] == "a later release"
    before = {name: line.storage.read(f"records/{name}") for name in line.storage.names("records")}
    catalog(wanted)
    assert {name: line.storage.read(f"records/{name}") for name in before} == before and operator.told[-1][2] == body
    with pytest.raises(UserError, match="was removed at"):
        versions.fetch_version(line.storage, line.record(1), str(line.folder / "cache"))
    context = line.context(name="k", uid="kkkkkkkk-a")
    line.storage.write("records/2.json", json.dumps({**json.loads(untouched or b""), "state": "Champion"}).encode())
    publish(context)
    assert line.record(2).state == "Champion", "a job that publishes again leaves what was decided"


def test_a_catalog_that_is_killed_between_any_two_writes(lines: Lines, operator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    killer = Killer(monkeypatch)
    for after in range(60):
        line = lines()
        publish(line.context())
        line.storage.write("records/2.json", json.dumps(line.record(1).model_copy(update={"number": 2}).to_wire()).encode())
        wanted = line.catalog(states={1: "Retired", 2: "Champion"}, remove=[1])
        killed = killer.kills(lambda w=wanted: catalog(w), after)
        if line.record(1).removed_at is None:
            versions.fetch_version(line.storage, line.record(1), str(line.folder / f"at-{after}"))
        catalog(wanted)
        assert (line.record(1).state, line.record(2).state) == ("Retired", "Champion")
        assert not line.storage.names("versions") and not line.storage.names("probes")
        if line.model.storage.startswith("pvc://"):
            assert not list(line.claim.rglob("*.removed")), after
        if not killed:
            return
    raise AssertionError("there is no end of writes")


def test_an_operator_that_refuses_or_stays_away(lines: Lines, operator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line = lines()
    operator.answers += [403]
    with pytest.raises(InfrastructureError, match=r"127\.0\.0\.1 answers 403"):
        catalog(line.catalog())
    operator.answers += [500] * 9
    with pytest.raises(SourceUnavailable, match="answers 500"):
        catalog(line.catalog())
    monkeypatch.setenv(Env.PROGRESS_URL, "http://127.0.0.1:1")
    with pytest.raises(SourceUnavailable, match="cannot be reached"):
        catalog(line.catalog())


def test_the_stage_from_the_command_line(tmp_path: Path) -> None:
    """Its exit code and last words are those of the other stages."""
    (tmp_path / "model.json").write_text(Line(tmp_path, ModelStorage(storage="pvc://others/m")).catalog(states={3: "Champion"}).dumps())
    env = {
        "PYTHONPATH": ":".join(path for path in sys.path if path),
        "FINETUNE_TERMINATION_LOG": str(tmp_path / "words"),
        "PATH": "/usr/bin",
    }
    command = [sys.executable, "-m", "finetune_trainer", "catalog", "--model", str(tmp_path / "model.json")]
    ended = subprocess.run(command, env=env, capture_output=True, timeout=60)
    words = read_stage_result((tmp_path / "words").read_text())
    assert ended.returncode == ExitCode.USER_ERROR and words is not None, ended.stderr
    assert words.reason == "SourceNotMounted" and "the claim others is not mounted here" in words.message


def test_a_job_that_goes_on_from_a_version(line: Line) -> None:
    """Its files are compared with its record, its base with the job's; what it learned from is noted; its number is the parent."""
    import numpy as np
    from safetensors.numpy import save_file

    first = line.context()
    save_file({"a": np.ones(4, np.float32)}, Path(first.layout.output, "adapter_model.safetensors"))
    publish(first)

    def going_on(version: str = "@1", **blocks: Any) -> Context:
        other = {"messages": [{"role": "user", "content": "another"}, {"role": "assistant", "content": "y"}]}
        return line.context(name="k", uid="22222222-b", rows=(other,), tuning={"continueFrom": f"model://{MODEL}{version}"}, **blocks)

    def fetched(context: Context) -> str:
        return fetch_model(context, "adapter", str(context.spec.tuning.continue_from), config=ADAPTER_CONFIG)

    context = going_on()
    folder = fetched(context)
    assert Path(folder, "adapter_model.safetensors").exists()
    assert Path(context.layout.parent_prompts).read_bytes() == prompt_key(ROW)
    publish(context)
    assert line.record(2).parent == 1
    assert line.storage.read("prompts/2.bin") != prompt_key(ROW)
    learned = versions.learned_prompts(line.storage, 2)
    assert learned is not None and len(learned) == 2 and unseen([ROW, {"prompt": "new"}], learned) == [1]

    Path(context.layout.reference("adapter")).unlink()
    with pytest.raises(UserError, match=rf"continueFrom: model://{MODEL}@7: .* has no such version; there are 1, 2"):
        fetched(going_on("@7"))
    with pytest.raises(UserError, match=rf"names no version, .* write model://{MODEL}@NUMBER"):
        fetched(going_on(""))
    elsewhere = going_on()
    elsewhere.write_json(elsewhere.layout.reference("model"), {"uri": "pvc://x/y", "fingerprint": "sha256:2", "path": "/x"})
    with pytest.raises(UserError, match="was tuned from hf://org/base, whose weights are others than model.uri's"):
        fetched(elsewhere)
    line.storage.write("versions/1/adapter_model.safetensors", b"damaged")
    shutil.rmtree(Path(context.layout.cache, "versions"), ignore_errors=True)
    with pytest.raises(UserError, match=r"version 1 at .*: adapter_model.safetensors is not what SHA256SUMS says"):
        fetched(going_on())
    line.storage.remove("versions/1/adapter_model.safetensors")
    with pytest.raises(UserError, match=r"version 1 at .*: adapter_model.safetensors is not there"):
        fetched(going_on())
    line.storage.write("records/1.json", b"[]")
    with pytest.raises(UserError, match=r"records/1.json cannot be read"):
        fetched(going_on())
    assert versions.learned_prompts(line.storage, 2) is None, "what is not known is not taken for nothing"


def test_what_an_adapter_of_unknown_rows_learned_from_is_not_known(line: Line) -> None:
    context = line.context(tuning={"continueFrom": "pvc://models/adapter"})
    context.write_json(context.layout.reference("adapter"), {"uri": "pvc://models/adapter", "fingerprint": "sha256:3", "path": "/x"})
    publish(context)
    assert line.record(1).parent is None and line.storage.read("prompts/1.bin") is None
    assert versions.learned_prompts(line.storage, 1) is None


def test_a_prompt_is_the_same_in_every_format() -> None:
    asked = [{"role": "user", "content": "what"}]
    pair = {"prompt": asked, "chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}
    same = {prompt_key(row) for row in ({"messages": asked}, {"messages": [*asked, {"role": "assistant", "content": "x"}]}, pair)}
    assert len(same) == 1 and prompt_key({"prompt": "what"}) == prompt_key({"prompt": "what", "completion": "x"}) not in same
    assert prompt_key({"messages": asked, "tools": [{"type": "function"}]}) not in same


@pytest.mark.parametrize(
    ("config", "rank"),
    [({"peft_type": "LORA", "r": 8}, 8), ({"peft_type": "LORA", "r": 8, "rank_pattern": {"a": 64}}, 64), ({"peft_type": "IA3"}, None)],
)
def test_the_rank_of_an_adapter(config: dict[str, Any], rank: int | None) -> None:
    assert lora_rank(config) == rank
