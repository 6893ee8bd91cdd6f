"""Hubs and servers that are down, ask for patience or refuse: real servers on this machine, real clients of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from finetune_api.contract import Env, ExitCode, JobFile
from finetune_api.spec import DatasetSource, PublishTarget
from finetune_api.validation import parse_spec
from finetune_trainer.data.fetch import fetch
from finetune_trainer.data.reading import rows
from finetune_trainer.export.hub import publish_to_hub
from finetune_trainer.job.context import Context
from finetune_trainer.models.fetch import fetch_model
from finetune_trainer.process.errors import InfrastructureError, SourceUnavailable, StageError, UserError, classify, combine
from finetune_trainer.remote import retry
from finetune_trainer.remote.retry import retry_after
from finetune_trainer.stages.check import check
from tests.factory import MINIMAL, NOW
from tests.loopback import QuietHandler, serving

DOWN = "http://127.0.0.1:1"


class Server:
    """Answers everything with the codes of `script`, the last one again and again."""

    def __init__(self) -> None:
        self.script: list[tuple[int, dict[str, str]]] = [(503, {})]
        self.asked: list[str] = []
        outer = self

        class Handler(QuietHandler):
            def answer(self) -> None:
                outer.asked.append(f"{self.command} {self.path}")
                code, headers = outer.script[0] if len(outer.script) == 1 else outer.script.pop(0)
                self.send_response(code)
                for name, value in {"Content-Length": "0", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()

            do_GET = do_HEAD = do_POST = answer

        self.handler, self.url = Handler, ""

    def says(self, code: int, **headers: str) -> None:
        self.script = [(code, {name.replace("_", "-"): value for name, value in headers.items()})]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A server that stands for the hub, and whose address data may be fetched from. Nobody sleeps."""
    found = Server()
    with serving(found.handler) as port:
        found.url = f"http://127.0.0.1:{port}"
        the_hub_is(monkeypatch, found.url)
        monkeypatch.setenv(Env.ALLOWED_HOSTS, "127.0.0.1")
        monkeypatch.setattr(retry.time, "sleep", lambda _: None)
        yield found


def the_hub_is(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv(Env.HUB, url)
    for name, value in {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)  # read from the environment once, at import


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(JobFile(name="j", namespace="n", uid="12345678", spec=parse_spec(MINIMAL)), str(tmp_path / "workspace"))


def _model(context: Context, url: str) -> None:
    fetch_model(context, "model", "hf://org/model@v1")


def _rows(context: Context, url: str) -> None:
    list(rows(context, DatasetSource(uri="hf://org/rows"), "train"))


def _publish(context: Context, url: str) -> None:
    target = PublishTarget.model_validate({"uri": "hf://org/out", "secretRef": {"name": "s"}})
    publish_to_hub(context, target, "publish-0", Path(context.workspace))


def _bucket(context: Context, url: str) -> None:
    fetch(context, DatasetSource(uri="s3://bucket/rows.jsonl", s3_endpoint=url), "train")


def _check(context: Context, url: str) -> None:
    spec = parse_spec({**MINIMAL, "publish": [{"uri": "hf://org/out", "secretRef": {"name": "s"}}]})
    check(Context(context.job.model_copy(update={"spec": spec}), context.workspace))


ASKS = {"model": _model, "rows": _rows, "publish": _publish, "check": _check, "bucket": _bucket}


def end(ask: str, context: Context, url: str) -> StageError:
    with pytest.raises(StageError) as caught:
        ASKS[ask](context, url)
    return classify(caught.value)


@pytest.mark.parametrize("code", [429, 500, 503])
@pytest.mark.parametrize("ask", ASKS)
def test_who_is_busy_or_broken_is_waited_for(ask: str, code: int, server: Server, context: Context) -> None:
    server.says(code, Retry_After="77")
    error = end(ask, context, server.url)
    assert (type(error), error.code, error.reason) == (SourceUnavailable, ExitCode.SOURCE_UNAVAILABLE, "WaitingForSource")
    assert error.result().result == {"host": "127.0.0.1", "retryAfterSeconds": 77.0}
    assert f"127.0.0.1 answers {code}" in error.message
    assert len(server.asked) <= 4, "who asks for patience is not asked again at once"


@pytest.mark.parametrize("ask", ASKS)
def test_who_is_not_there_is_waited_for(ask: str, server: Server, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    the_hub_is(monkeypatch, DOWN)
    error = end(ask, context, DOWN)
    assert type(error) is SourceUnavailable and error.host == "127.0.0.1" and "127.0.0.1 cannot be reached" in error.message


@pytest.mark.parametrize("ask", ["model", "rows", "publish"])
def test_a_name_without_address_is_waited_for(ask: str, server: Server, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    the_hub_is(monkeypatch, "http://hub.invalid")
    error = end(ask, context, "")
    assert type(error) is SourceUnavailable and error.host == "hub.invalid"


@pytest.mark.parametrize(("ask", "code"), [(ask, code) for ask in ASKS for code in (401, 403, 404) if (ask, code) != ("check", 404)])
def test_a_refusal_is_the_users_error_at_once(ask: str, code: int, server: Server, context: Context) -> None:
    server.says(code)
    error = end(ask, context, server.url)
    assert type(error) is UserError and error.reason in ("SourceNotFound", "DatasetNotFound", "PublishRefused")
    assert str(code) in error.message
    assert len(server.asked) <= 3


@pytest.mark.parametrize("ask", ["model", "rows"])
def test_a_revision_that_does_not_exist_is_the_users_error(ask: str, server: Server, context: Context) -> None:
    server.says(404, X_Error_Code="RevisionNotFound")
    assert "check the uri and its revision" in end(ask, context, server.url).message


def test_a_short_trouble_is_over_before_anybody_notices(server: Server, context: Context) -> None:
    server.script = [(503, {}), (503, {}), (404, {})]
    assert type(end("rows", context, server.url)) is UserError, "it came as far as the answer"


def test_a_target_that_does_not_exist_yet_is_no_refusal(server: Server, context: Context) -> None:
    """It is made when it is written; a mirror may answer a bare 404, also to the question whose token it is."""
    server.says(404)
    _check(context, server.url)


def test_what_this_job_has_fetched_is_not_asked_for_again(server: Server, context: Context, tmp_path: Path) -> None:
    """A try after a wait goes on where the one before ended, though the hub is down and the branch has moved."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"weight": np.zeros(2)}, folder / "model.safetensors")
    context.write_json(context.layout.reference("model"), {"path": str(folder), "uri": "hf://org/model@v1", "fingerprint": "sha256:0"})
    assert fetch_model(context, "model", "hf://org/model@v1") == str(folder) and not server.asked
    assert type(end("model", Context(context.job.model_copy(update={"uid": "8765432"}), context.workspace), "")) is SourceUnavailable


def test_huggingface_hub_does_not_sleep_for_an_hour(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own retries would sleep as long as Retry-After says."""
    server.says(503, Retry_After="3600")
    factory = huggingface_hub.utils._http._GLOBAL_CLIENT_FACTORY
    retry.cap_hub_retry_wait()
    try:
        began = time.monotonic()
        with pytest.raises(SourceUnavailable) as caught:
            huggingface_hub.utils.http_backoff("GET", f"{server.url}/x")
        assert caught.value.retry_after == 3600 and time.monotonic() - began < 5 and len(server.asked) == 1
    finally:
        huggingface_hub.set_client_factory(factory)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Retry-After": "120"}, 120),
        ({"retry-after": "Sat, 21 Nov 2026 12:01:00 GMT"}, 60),
        ({"retry-after": "Sat, 21 Nov 2026 11:01:00 GMT"}, 0),
        ({"Retry-After": "soon"}, None),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=10;t=55'}, None),
        ({}, None),
    ],
)
def test_the_patience_that_is_asked_for(headers: dict[str, str], expected: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry.time, "time", NOW.timestamp)
    assert retry_after(headers) == expected


def test_several_targets_are_told_together() -> None:
    """What will never go is said at once; what may go by itself is waited for."""
    away = ("hf://org/a", SourceUnavailable("hub", "hub answers 503", 30.0))
    broken, refused = ("pvc://b/c", InfrastructureError("TargetNotWritable", "full")), ("hf://org/d", UserError("PublishRefused", "403"))
    assert type(combine([away, broken, refused], "")) is UserError
    assert combine([away, broken], "").reason == "TargetNotWritable"
    waits = combine([away], "; published: pvc://x/y")
    assert isinstance(waits, SourceUnavailable) and waits.retry_after == 30
    assert waits.message == "hf://org/a: hub answers 503; published: pvc://x/y"


def test_authorities_are_trusted_beside_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE"):
        monkeypatch.setenv(name, "")
    retry.trust_authorities(str(tmp_path / "none"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "own.crt").write_text("OWN")
    (tmp_path / "system.crt").write_text("SYSTEM")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "system.crt"))
    retry.trust_authorities(str(tmp_path / "own.crt"))
    import os

    assert Path(os.environ["REQUESTS_CA_BUNDLE"]).read_text().split() == ["SYSTEM", "OWN"]
    assert len({os.environ[name] for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")}) == 1
