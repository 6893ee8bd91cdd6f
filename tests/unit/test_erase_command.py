"""`finetune erase`: where it looks, when it refuses, and what it tells; the processes behind it are real."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import WSMsgType, web

from finetune_api.probing import Probes
from finetune_cli import erase as asking
from finetune_cli import pods
from finetune_cli.__main__ import main
from finetune_cli.options import NotPossible
from finetune_cli.output import console
from finetune_cli.runs import Lock
from finetune_trainer.data.prompts import prompt_key
from finetune_trainer.stages.erase import read_request
from tests.factory import MINIMAL
from tests.unit.test_erasure import MINE, SHARED, left, make_folder, probe_of


def job(name: str, phase: str = "Succeeded", uid: str = "", **spec: Any) -> dict[str, Any]:
    meta = {"name": name, "namespace": "ml", "uid": uid or f"{name:0<8}-1", "creationTimestamp": "2026-11-23T10:00:00Z"}
    moment = "2026-11-23T10:00:00Z"
    ended = [{"type": phase, "status": "True", "reason": "Completed", "lastTransitionTime": moment}] if phase == "Succeeded" else []
    artifacts = [{"uri": f"pvc://models/{name}", "digest": "sha256:1", "bytes": 1}]
    return {"metadata": meta, "spec": {**MINIMAL, **spec}, "status": {"phase": phase, "artifacts": artifacts, "conditions": ended}}


OWN = {"workspace": {"persistentVolumeClaim": {"claimName": "team"}}}
BOT = {
    "metadata": {"name": "bot", "namespace": "ml", "creationTimestamp": "2026-11-23T10:00:00Z"},
    "spec": {"storage": "s3://bucket/bot", "secretRef": {"name": "keys"}, "s3Endpoint": "https://s3"},
}


@pytest.mark.parametrize(
    ("choice", "jobs", "words"),
    [
        (asking.Choice(), [], "nothing says where to look"),
        (asking.Choice(jobs=["a"]), [job("b")], "no FineTuneJob a.*there are: b.*--claim CLAIM"),
        (asking.Choice(models=["bott"]), [], "no FineTunedModel bott; did you mean bot"),
        (asking.Choice(jobs=["a"]), [job("a", "Training")], r"have not ended use .*: a \(its own workspace\)"),
        (asking.Choice(jobs=["a"]), [job("a", "Suspended")], "have not ended"),
        (asking.Choice(claims=["team"]), [job("a", **OWN), job("b", "Queued", **OWN)], r"b \(claim team\)"),
        (asking.Choice(models=["bot"]), [job("a", "Training", publish=[{"model": "bot"}])], r"a \(model bot\)"),
        (asking.Choice(models=["bot"]), [job("a", "Queued", tuning={"continueFrom": "model://bot@3"})], r"a \(model bot\)"),
        (asking.Choice(everything=True), [job("a"), job("b", "Evaluating")], r"b \(claim b-workspace\)"),
    ],
)
def test_nothing_is_erased_beside_a_job_at_work(choice: asking.Choice, jobs: list[Any], words: str) -> None:
    with pytest.raises(NotPossible, match=words):
        asking.places(choice, jobs, [BOT])


def test_workspaces_come_first_and_each_claim_once() -> None:
    jobs = [job("a", **OWN), job("b", **OWN), job("c"), job("busy", "Training")]
    found = asking.places(asking.Choice(jobs=["a", "b", "c"], models=["bot"]), jobs, [BOT])
    assert [(one.shown, one.folders) for one in found] == [
        ("claim team", ["ml-a-a0000000", "ml-b-b0000000"]), ("claim c-workspace", ["ml-c-c0000000"]), ("model bot", None),
    ]  # fmt: skip
    everything = asking.places(asking.Choice(everything=True), jobs[:3], [BOT])
    assert [(one.shown, one.folders) for one in everything] == [("claim c-workspace", None), ("claim team", None), ("model bot", None)]
    ways = asking.readings([*jobs, job("d", dataset={"train": {"uri": "x"}, "columns": {"q": "prompt"}})], {"frage": "prompt"})
    assert [way.columns for way in ways] == [{"frage": "prompt"}, {"q": "prompt"}]


def test_jobs_whose_messages_quote_it_are_named() -> None:
    quoting = job("quoting")
    quoting["status"]["conditions"] = [{"type": "Failed", "message": "train row 3: content is empty [Jane  Roe]"}]
    assert asking.mentioned([job("a"), quoting], ["jane roe"]) == ["quoting"]


class Cluster:
    """Plays the API server and the kubelet behind it, in the client library's own protocol; in a pod's place is a process of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pods, self.bodies, self.claims = folder, [], [], {"team", "models"}
        self.jobs: list[Any] = []
        self.models: list[Any] = []
        self.cut = False
        """The connection of an exec breaks off before the answer."""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    async def _serve(self) -> None:
        app = web.Application()
        core, ours = "/api/v1/namespaces/ml", "/apis/finetune.dev/v1alpha1/namespaces/ml"
        app.router.add_get(f"{ours}/finetunejobs", lambda _: self._list(self.jobs))
        app.router.add_get(f"{ours}/finetunedmodels", lambda _: self._list(self.models))
        app.router.add_get(f"{core}/persistentvolumeclaims/{{name}}", self._claim)
        app.router.add_get(f"{core}/pods", lambda _: self._list([TEMPLATE]))
        app.router.add_post(f"{core}/pods", self._create)
        app.router.add_get(f"{core}/pods/{{name}}", self._pod)
        app.router.add_delete(f"{core}/pods/{{name}}", self._delete)
        app.router.add_get(f"{core}/pods/{{name}}/exec", self._exec)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._end.wait()
        await runner.cleanup()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def _list(self, items: list[Any]) -> web.Response:
        return web.json_response({"items": items, "metadata": {}})

    async def _claim(self, request: web.Request) -> web.Response:
        return web.json_response({}, status=200 if request.match_info["name"] in self.claims else 404)

    async def _create(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        self.pods.append(self.bodies[-1]["metadata"]["name"])
        return web.json_response(self.bodies[-1], status=201)

    async def _pod(self, request: web.Request) -> web.Response:
        return web.json_response({"metadata": {"name": request.match_info["name"]}, "status": {"phase": "Running"}})

    async def _delete(self, request: web.Request) -> web.Response:
        self.pods.remove(request.match_info["name"])
        return web.json_response({})

    async def _exec(self, request: web.Request) -> web.WebSocketResponse:
        """Channels 0 to 3: standard input, output, error, and how it ended. Standard input is never closed, as here."""
        wire = web.WebSocketResponse(protocols=("v4.channel.k8s.io",))
        await wire.prepare(request)
        line = b""
        while not line.endswith(b"\n"):
            message = await wire.receive()
            assert message.type == WSMsgType.BINARY and message.data[:1] == b"\0" and len(message.data) <= 32 * 1024
            line += message.data[1:]
        for mounted in ("/workspace", "/targets"):
            line = line.replace(f'"{mounted}'.encode(), f'"{self.folder}{mounted}'.encode())
        command = [sys.executable, *request.query.getall("command")[1:]]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        piped = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
        process = await asyncio.create_subprocess_exec(*command, env=env, **piped)
        out, problem = await process.communicate(line)
        if not self.cut:
            await wire.send_bytes(b"\2" + problem)
            await wire.send_bytes(b"\1" + out[:100])
            await wire.send_bytes(b"\1" + out[100:])
            causes = {"details": {"causes": [{"message": str(process.returncode)}]}}
            ended = {"status": "Success"} if process.returncode == 0 else {"status": "Failure", **causes}
            await wire.send_bytes(b"\3" + json.dumps(ended).encode())
        await wire.close()
        return wire


TEMPLATE = {
    "metadata": {"name": "support-publish-0", "creationTimestamp": "2026-11-23T10:00:00Z"},
    "spec": {
        "containers": [
            {"name": "trainer", "image": "trainer:1", "env": [{"name": "HF_ENDPOINT", "value": "http://hub"}, {"name": "X", "value": "y"}]}
        ]
    },
}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    played = Cluster(tmp_path)
    yield played
    played.stop()


@pytest.fixture
def finetune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The command line in this process: its exit code, and what it prints."""
    monkeypatch.setattr(console, "width", 300)

    def run(*words: str, cluster: Cluster | None = None) -> tuple[Any, str]:
        more: list[str] = []
        if cluster is not None:
            at = {"cluster": "c", "user": "u", "namespace": "ml"}
            config = {
                "current-context": "x", "contexts": [{"name": "x", "context": at}], "users": [{"name": "u", "user": {}}],
                "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{cluster.port}"}}],
            }  # fmt: skip
            (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
            more = ["--kubeconfig", str(tmp_path / "kubeconfig")]
        monkeypatch.setattr(sys, "argv", ["finetune", "erase", *words, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return ended.value.code or 0, told.out + told.err

    return run


def test_a_workspace_and_a_model_in_a_cluster(cluster: Cluster, finetune: Any, tmp_path: Path) -> None:
    """What the workspace tells is taken to the model; pods are gone afterwards; what was looked for stands in no object."""
    folder = make_folder(tmp_path / "workspace")
    folder = folder.rename(folder.with_name("ml-job-12345678"))
    storage = tmp_path / "targets/pvc/models/bot"
    made_by = {"name": "job", "namespace": "ml", "uid": "12345678-1"}
    record = {
        "number": 1,
        "job": made_by,
        "uri": "pvc://models/bot/versions/1",
        "digest": "sha256:1",
        "bytes": 1,
        "base": {"uri": "hf://b"},
    }
    record["createdAt"] = "2026-11-23T10:00:00Z"
    for name, body in (
        ("prompts/1.bin", b"".join(sorted(map(prompt_key, (MINE, SHARED))))),
        ("probes/1.json", json.dumps(Probes(probes=[probe_of("Jane Roe?"), probe_of("q")]).to_wire()).encode()),
        ("records/1.json", json.dumps(record).encode()),
    ):
        (storage / name).parent.mkdir(parents=True, exist_ok=True)
        (storage / name).write_bytes(body)
    cluster.jobs = [job("job", uid="12345678-1", **OWN), job("gone"), job("other", "Training", **{**OWN})]
    cluster.models = [{**BOT, "spec": {"storage": "pvc://models/bot"}}]

    words = ("--containing", "Jane Roe", "--job", "job", "--job", "gone", "--model", "bot")
    code, told = finetune(*words, "--dry-run", cluster=cluster)
    assert code == 0 and "2 rows would be removed: jobs/ml-job-12345678/data/train.parquet" in told, told
    assert "data/train.parquet" in left(folder)
    code, told = finetune(*words, cluster=cluster)
    assert code == 0 and left(folder) == ["output/README.md"], told
    assert "claim gone-workspace: the claim is gone" in told
    assert "weights are left: job ml-job-12345678 learned from it (2 now); published at pvc://models/job" in told
    assert "1 prompt digests removed: prompts/1.bin" in told and "1 probes removed: probes/1.json" in told
    assert "weights are left: version 1 (job ml/job) learned from it (2 now)" in told and "Not removed: weights" in told
    assert not cluster.pods and "Jane" not in json.dumps(cluster.bodies)
    spec = cluster.bodies[0]["spec"]
    assert spec["containers"][0]["image"] == "trainer:1" and [one["name"] for one in spec["containers"][0]["env"]] == ["HF_ENDPOINT"]
    assert spec["volumes"][0]["persistentVolumeClaim"] == {"claimName": "team", "readOnly": False}

    code, told = finetune("--containing", "Jane Roe", "--all", cluster=cluster)
    assert code == 2 and "jobs that have not ended use what is to be looked into: other (claim team)" in told
    code, told = finetune("--where", "user_id=4", "--job", "job", cluster=cluster)
    assert code == 2 and "prepared rows keep no column user_id" in told
    cluster.cut = True
    code, told = finetune(*words[:4], cluster=cluster)
    assert code == 2 and "it is not known what was removed: run it again" in told and not cluster.pods


def test_the_pod_has_what_the_place_needs_and_no_more() -> None:
    wanted = asking.pod_at(asking.Place("model bot", model=BOT), "image:1")
    pod = pods.manifest("p", wanted)["spec"]
    assert [(m["mountPath"], m["readOnly"]) for m in pod["containers"][0]["volumeMounts"]] == [
        ("/var/run/finetune/secrets/storage", False), ("/etc/finetune/job", False),
    ]  # fmt: skip
    assert pod["automountServiceAccountToken"] is False and pod["volumes"][0]["secret"]["secretName"] == "keys"
    request = asking.request_at(asking.Place("model bot", model=BOT), read_request('{"containing": ["Jane Roe"]}'), [])
    assert request.storage is not None and (request.storage.s3_endpoint, request.keys) == (
        "https://s3",
        "/var/run/finetune/secrets/storage",
    )
    assert "Jane" not in json.dumps(pods.manifest("p", wanted)), "what is looked for stands in no object"


def test_runs_on_this_machine(finetune: Any, tmp_path: Path) -> None:
    folder, where = make_folder(tmp_path), ("--local", "--workspace", str(tmp_path))
    held = Lock(folder)
    code, told = finetune(*where, "--containing", "Jane Roe")
    assert code == 2 and "goes on in another process" in told and "data/train.parquet" in left(folder)
    held.close()
    assert finetune(*where, "--job", "other", "--containing", "Jane Roe")[1].startswith("--job other: there is no such run")
    assert "leave --claim, --model and --all out" in finetune(*where, "--all", "--containing", "Jane Roe")[1]
    code, told = finetune(*where, "--containing", "Jane Roe")
    assert code == 0 and "2 rows removed: jobs/n-job-12345678/data/train.parquet" in told and "Not removed: weights" in told
    assert left(folder) == ["output/README.md"]
    code, told = finetune(*where, "--containing", "Jane Roe", "-o", "json")
    assert json.loads(told)[0]["learned"][0]["earlier"] == 2
