"""Results in an MLflow registry and models out of one: MLflow's own server with SQLite, and MLflow's own client as another reader."""

from __future__ import annotations

import hashlib
import http.client
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetune_api.contract import Env
from finetune_api.spec import DatasetSource
from finetune_trainer.data.reading import rows
from finetune_trainer.export import mlflow as target
from finetune_trainer.job.context import Context
from finetune_trainer.models.fetch import fetch_base_model, fetch_model
from finetune_trainer.process.errors import InfrastructureError, SourceUnavailable, UserError
from finetune_trainer.remote import retry
from finetune_trainer.remote.mlflow import Server
from finetune_trainer.stages.check import check
from finetune_trainer.stages.publish import publish
from tests.loopback import QuietHandler, serving
from tests.servers import PASSWORD, mlflow
from tests.unit.test_results import Shelf, forms_are_restored

SECRET = {"name": "tracking"}
EVALUATION = {
    "arms": [{"name": "Base", "metrics": {"loss": 2.5}}, {"name": "Tuned", "metrics": {"loss": 1.25, "exact-match": 0.5}}],
    "gate": "Passed",
    "comparedWith": "Base",
    "improvement": 1.25,
    "examples": 20,
    "prompts": 20,
    "reason": "Improved",
}


class Place:
    """A registered model of its own, and jobs that publish to it and read from it."""

    def __init__(self, host: str, files: Path, folder: Path) -> None:
        self.host, self.files, self.folder, self.shelf = host, files, folder, Shelf(folder)
        self.model = "bot-" + hashlib.sha256(str(folder).encode()).hexdigest()[:8]
        (folder / "secret").mkdir()
        (folder / "secret" / "token").write_text(PASSWORD)

    @property
    def uri(self) -> str:
        return f"mlflow://{self.host}/{self.model}"

    def context(self, uid: str = "11111111-a", name: str = "j", weights: bytes = b"", **blocks: Any) -> Context:
        asked = {"publish": [{"uri": self.uri, "secretRef": SECRET, "plainHTTP": True}]}
        context = self.shelf.context(uid, name=name, **{**asked, **blocks})
        context.job.secrets.update({field: str(self.folder / "secret") for field in ("publish-0", "model", "adapter")})
        file = Path(context.layout.output, "adapter_model.safetensors")
        save_file({"base_model.model.q.lora_A.weight": np.ones((2, 2), np.float32)}, file, {"from": weights.decode()})
        context.write_json(context.layout.evaluation_report, EVALUATION)
        return context

    def reading(self, uri: str = "", uid: str = "11111111-a") -> Context:
        return self.context(uid, model={"uri": uri or self.uri, "secretRef": SECRET, "plainHTTP": True})

    def client(self) -> Any:
        import mlflow

        return mlflow.MlflowClient(tracking_uri=f"http://{self.host}", registry_uri=f"http://{self.host}")

    def versions(self) -> list[Any]:
        return list(self.client().search_model_versions(f"name='{self.model}'"))

    def stored(self, name: str) -> Path:
        return next(self.files.rglob(f"model/{name}"))

    def champion(self) -> str | None:
        return dict(self.client().get_registered_model(self.model).aliases).get("champion")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("mlflow")
    with mlflow(folder) as host:
        yield host, folder / "files"


@pytest.fixture
def place(server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv(Env.ALLOWED_HOSTS, "127.0.0.1")
    monkeypatch.setattr(retry, "_PAUSES", (0.01,))
    yield Place(*server, tmp_path)


def test_a_result_in_a_registry_of_models(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked first, written once, read back by MLflow's client; a run says what it was made from; again changes nothing."""
    import mlflow

    assert check(place.context()).reason == "TargetsReady"
    assert place.client().get_experiment_by_name(place.model) is None, "asking leaves nothing behind"
    result = publish(place.context())
    (version,) = place.versions()
    assert version.tags["finetune.dev/digest"] == result.result["artifacts"][0]["digest"] and version.status == "READY"
    assert json.loads(version.tags["finetune.dev/job"])["uid"] == "11111111-a" and place.champion() == version.version
    run = place.client().get_run(version.run_id)
    assert run.info.status == "FINISHED" and run.data.metrics == {"base.loss": 2.5, "tuned.loss": 1.25, "tuned.exact-match": 0.5}
    assert run.data.params["hyperparameters.learningRate"] == "0.0002" and run.data.params["method"] == "lora"
    lineage = {
        "finetune.dev/base": "pvc://models/tiny",
        "finetune.dev/base-fingerprint": "sha256:1",
        "finetune.dev/data-digest": "sha256:0",
    }
    assert lineage.items() <= run.data.tags.items()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{place.host}")
    folder = mlflow.artifacts.download_artifacts(f"models:/{place.model}@champion", dst_path=str(place.folder / "pulled"))
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    names = {"README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "finetune.json"}
    assert {p.name for p in Path(folder).iterdir()} == names

    assert publish(place.context()) == result and len(place.versions()) == 1
    found = check(place.context(uid="22222222-b"))
    assert (found.reason, found.result) == ("Restored", result.result), "made again from a backup"
    forms_are_restored(monkeypatch, place.context)


def test_what_was_killed_in_the_middle_is_no_version_and_is_gone_on_with(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    upload, tries = Server.upload, iter([None, None, KeyboardInterrupt()])

    def killed(server: Server, file: Path, path: str) -> None:
        if (stop := next(tries)) is not None:
            raise stop
        upload(server, file, path)

    monkeypatch.setattr(Server, "upload", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(place.context())
    assert not place.versions() and check(place.context()).reason == "TargetsReady"
    monkeypatch.setattr(Server, "upload", upload)
    publish(place.context())
    assert len(place.versions()) == 1
    experiment = place.client().get_experiment_by_name(place.model)
    assert len(place.client().search_runs([experiment.experiment_id])) == 1, "its run is gone on with"


def test_versions_of_others_stay_and_the_alias_is_moved_only_where_a_job_put_it(place: Place) -> None:
    publish(place.context())
    publish(place.context("22222222-b", "k", weights=b"k"))
    assert (len(place.versions()), place.champion()) == (2, "2")
    place.client().set_registered_model_alias(place.model, "champion", "1")  # somebody's own word
    publish(place.context("33333333-c", "l", weights=b"l"))
    assert (len(place.versions()), place.champion()) == (3, "1")
    place.client().delete_registered_model_alias(place.model, "champion")
    publish(place.context("44444444-d", "m", weights=b"m"))
    assert (len(place.versions()), place.champion()) == (4, None), "nor is it given again where it was taken away"


def test_of_two_that_make_the_same_model_at_once_both_get_a_version(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other makes experiment and model between the look and the write."""
    find, raced = Server.find, list[str]()

    def late(server: Server, endpoint: str, **query: str) -> Any:
        found = find(server, endpoint, **query)
        if not raced:
            raced.append("yes")
            publish(place.context("22222222-b", "k", weights=b"k"))
        return found

    monkeypatch.setattr(Server, "find", late)
    publish(place.context())
    assert len(place.versions()) == 2 and place.champion() == "2"


def test_its_own_damaged_result_is_mended_and_what_arrives_otherwise_is_no_version(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(place.context())
    experiment = place.client().get_experiment_by_name(place.model)
    stored = next((place.files / experiment.experiment_id).rglob("adapter_config.json"))
    whole = stored.read_bytes()
    stored.write_bytes(b"{}")
    with pytest.raises(UserError, match=r"adapter_config\.json is not what SHA256SUMS says"):
        fetch_model(_going_on(place), "adapter", place.uri, config="adapter_config.json")
    publish(place.context())
    assert stored.read_bytes() == whole and len(place.versions()) == 1
    monkeypatch.setattr(target._Model, "_damaged", lambda *_: "README.md")
    with pytest.raises(InfrastructureError, match=r"README\.md: what was written differs") as found:
        publish(place.context("22222222-b", "k", weights=b"k"))
    assert found.value.reason == "VerificationFailed" and len(place.versions()) == 1


def _going_on(place: Place, uri: str = "", uid: str = "55555555-e") -> Context:
    tuning = {"continueFrom": uri or place.uri, "continueFromSecretRef": SECRET, "continueFromPlainHTTP": True}
    return place.context(uid, "later", tuning=tuning)


@pytest.mark.parametrize(("revision", "expected"), [("", "2"), ("@champion", "1"), ("/1", "1")])
def test_going_on_from_a_version(revision: str, expected: str, place: Place) -> None:
    """By number, by alias, or the newest; noted by number, so that an alias that moves does not move the job."""
    publish(place.context(weights=b"first"))
    publish(place.context("22222222-b", "k", weights=b"k"))
    place.client().set_registered_model_alias(place.model, "champion", "1")
    context = _going_on(place, place.uri + revision)
    folder = Path(fetch_model(context, "adapter", place.uri + revision, config="adapter_config.json"))
    assert context.read_json(context.layout.reference("adapter"))["revision"] == expected
    assert json.loads((folder / "finetune.json").read_text())["job"]["name"] == {"1": "j", "2": "k"}[expected]


def registered(place: Place, files: list[Path], *, logged: bool = False) -> None:
    """What others registered, without digests of ours; of a run, or as MLflow 3 has models beside runs."""
    server = Server(place.context(), "publish-0", target.parse_uri(place.uri), plain=True)
    experiment = server.post("experiments/create", name=place.model)["experiment_id"]
    run = server.post("runs/create", experiment_id=experiment)["run"]["info"]
    root = source = f"{run['artifact_uri']}/base"
    more: dict[str, str] = {}
    if logged:
        info = server.post("logged-models", experiment_id=experiment, name="base", source_run_id=run["run_id"])["model"]["info"]
        root, source, more = info["artifact_uri"], f"models:/{info['model_id']}", {"model_id": info["model_id"]}
    for file in files:
        server.upload(file, f"{server.served(root)}/{file.name}")
    server.post("registered-models/create", name=place.model)
    server.post("model-versions/create", name=place.model, source=source, run_id=run["run_id"], **more)


@pytest.mark.parametrize("logged", [False, True], ids=["of a run", "of a logged model"])
def test_a_base_that_others_registered(logged: bool, place: Place, tiny_model: Path) -> None:
    registered(place, list(tiny_model.iterdir()), logged=logged)
    folder = Path(fetch_base_model(place.reading()))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in tiny_model.iterdir()}


def test_rows_that_others_registered(place: Place) -> None:
    file = place.folder / "rows.jsonl"
    file.write_text('{"text": "one"}\n')
    registered(place, [file])
    source = DatasetSource.model_validate({"uri": place.uri, "plainHTTP": True})
    assert [row.parsed().value for row in rows(place.context(), source, "train")] == [{"text": "one"}]


def test_a_server_that_leads_elsewhere(place: Place) -> None:
    """Files in a bucket or on a disk are not fetched on its word, nor names that lead out of the folder."""
    said: dict[str, Any] = {}

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            version = {"name": "m", "version": "1", "creation_timestamp": 1}
            body = json.dumps(
                {"artifact_uri": said["at"]}
                if "download-uri" in self.path
                else {"files": [{"path": said["file"], "is_dir": False, "file_size": 2}]}
                if "mlflow-artifacts" in self.path
                else {"model_versions": [version]}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with serving(Handler) as port:
        uri = f"mlflow://127.0.0.1:{port}/m"
        for at, file, reason in (
            ("file:///etc", "", "ArtifactsNotServed"),
            ("s3://bucket/x", "", "ArtifactsNotServed"),
            ("mlflow-artifacts://10.96.0.1/x", "", "ArtifactsNotServed"),
            ("mlflow-artifacts:/x/../../y", "", "ArtifactsNotServed"),
            ("mlflow-artifacts:/x", "../../config.json", "PathLeavesVolume"),
            ("mlflow-artifacts:/x", "/etc/config.json", "PathLeavesVolume"),
        ):
            said.update(at=at, file=file)
            with pytest.raises(UserError) as refused:
                fetch_base_model(place.reading(uri))
            assert refused.value.reason == reason, at


def test_the_token_and_what_a_server_refuses(place: Place) -> None:
    """MLflow itself knows no tokens: what stands in front of it does, here a proxy that asks for one."""

    class Proxy(QuietHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            allowed = self.headers.get("Authorization") == f"Bearer {PASSWORD}"
            status, told = (401, b"who are you") if not allowed else self.forward(body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        def forward(self, body: bytes) -> tuple[int, bytes]:
            server = http.client.HTTPConnection(place.host)
            kind = self.headers.get("Content-Type", "application/json")
            server.request(self.command, self.path, body, {"Content-Type": kind})
            answer = server.getresponse()
            return answer.status, answer.read()

        do_GET = do_POST = do_PUT = answer

    with serving(Proxy) as port:
        uri = f"mlflow://127.0.0.1:{port}/{place.model}"
        asked = {"publish": [{"uri": uri, "secretRef": SECRET, "plainHTTP": True}]}
        publish(place.context(**asked))
        assert len(place.versions()) == 1
        (place.folder / "secret" / "token").write_text("wrong")
        for ask in (check, publish):
            with pytest.raises(UserError, match="answers 401: the token in secretRef may not write there") as refused:
                ask(place.context(**asked))
            assert refused.value.reason == "PublishRefused"


def test_a_server_that_is_away_or_may_not_be_asked(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    away = {"uri": "mlflow://127.0.0.1:1/x", "secretRef": SECRET, "plainHTTP": True}
    for ask in (check, publish):
        with pytest.raises(SourceUnavailable, match=r"127\.0\.0\.1 cannot be reached"):
            ask(place.context(publish=[away]))
    with pytest.raises(SourceUnavailable, match=r"127\.0\.0\.1 cannot be reached"):
        fetch_base_model(place.reading("mlflow://127.0.0.1:1/x"))
    with pytest.raises(UserError, match="has no version; check the uri"):
        fetch_base_model(place.reading())
    for revision in ("@nobody", "/7"):
        with pytest.raises(UserError, match=f"has no version or alias {revision[1:]}; check the uri"):
            fetch_base_model(place.reading(place.uri + revision))
    monkeypatch.setenv(Env.ALLOWED_HOSTS, "")
    with pytest.raises(UserError, match="an administrator must allow this host"):
        publish(place.context())
    with pytest.raises(UserError, match="which is not public"):
        publish(place.context(publish=[{"uri": place.uri, "secretRef": SECRET}]))
