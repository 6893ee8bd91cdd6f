"""`finetune chat` against a server that streams as the gateway does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from rich.console import Console

from finetune_cli.__main__ import main
from finetune_cli.chat import Chat, Talk
from finetune_cli.gateway import ChatError, Gateway, pieces, token_of
from tests.loopback import QuietHandler, serving

HELLO = ["Hel", "lo", " wo\x1b[2Jrld"]
KEY = "secret-key"


class Upstream(QuietHandler):
    """Two models with a base; what a test asks for by the model's name it gets."""

    protocol_version = "HTTP/1.1"
    heard = threading.Event()
    """Set by a test that has read the first piece."""
    asked: list[dict[str, Any]] = []

    def _json(self, status: int, body: Any, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _authorized(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {KEY}":
            return True
        self._json(401, {"error": {"message": "unknown key", "type": "invalid_request_error", "code": "invalid_api_key"}})
        return False

    def do_GET(self) -> None:
        if self._authorized():
            models = [{"id": "chat"}, {"id": "support-bot", "parent": "chat"}, {"id": "support-bot@3", "parent": "chat"}]
            self._json(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._authorized():
            return
        self.asked.append(body)
        errors: dict[str, tuple[int, str, dict[str, str]]] = {
            "support-bott": (404, "The model `support-bott` does not exist", {}),
            "busy": (429, "600 requests a minute", {"Retry_After": "7"}),
            "down": (503, "no verified replica of down", {}),
            "long": (400, "the prompt has 9000 tokens", {}),
        }
        if body["model"] in errors:
            status, message, headers = errors[body["model"]]
            self._json(status, {"error": {"message": message}}, **headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        chunked = body["model"] != "chat"
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Connection", "close")))
        self.end_headers()
        self.close_connection = not chunked

        def send(text: str) -> None:
            data = text.encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)
            self.wfile.flush()

        send(": keep-alive\n\n")
        send('data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n')
        for index, text in enumerate(["base"] if body["model"] == "chat" else HELLO):
            send("data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}) + "\n\n")
            if body["model"] == "patient" and index == 0 and not self.heard.wait(10):
                return
        if body["model"] == "cut":
            self.close_connection = True
            return
        if body["model"] == "broken":
            send('data: {"error": {"message": "the replica is gone"}}\n\n')
        send('data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n')
        if chunked:
            send("")


@pytest.fixture
def url() -> Iterator[str]:
    Upstream.asked.clear()
    Upstream.heard.clear()
    with serving(Upstream) as port:
        yield f"http://127.0.0.1:{port}"


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def chat(url: str, *words: str, key: str = KEY, input: str = "") -> Done:
    """As a script runs it, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("FINETUNE_GATEWAY_URL", url)
        patch.setenv("FINETUNE_API_KEY", key)
        patch.setattr(sys, "argv", ["finetune", "chat", *words])
        patch.setattr(sys, "stdin", io.StringIO(input))
        with pytest.raises(SystemExit) as ended:
            main()
    return Done(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def test_pieces_come_while_the_answer_is_being_made(url: str) -> None:
    """The server does not go on before the first one was read; in chunks as gateways send them, or until the connection ends."""
    gateway = Gateway(f"{url}/v1/", KEY)
    answer = gateway.ask("patient", [{"role": "user", "content": "hi"}], {"max_tokens": 5})
    assert next(answer) == "Hel"
    Upstream.heard.set()
    assert list(answer) == HELLO[1:]
    assert Upstream.asked == [{"model": "patient", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 5}]
    assert list(gateway.ask("chat", [], {})) == ["base"]


def test_one_question_for_scripts(url: str) -> None:
    done = chat(url, "support-bot@3", "-n", "ml", "-m", "hi", "--system", "be brief", "--temperature", "0", "--max-tokens", "9")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello wo\ufffd[2Jrld\n", ""), "and no escape sequence reaches the terminal"
    (asked,) = Upstream.asked
    assert asked["model"] == "ml/support-bot@3" and (asked["temperature"], asked["max_tokens"]) == (0.0, 9)
    assert [(m["role"], m["content"]) for m in asked["messages"]] == [("system", "be brief"), ("user", "hi")]
    assert chat(url, "support-bot", input="from a pipe\n").returncode == 0 and Upstream.asked[1]["messages"][0]["content"] == "from a pipe"


@pytest.mark.parametrize(
    ("model", "code", "told"),
    [
        ("support-bott", 2, "`support-bott` does not exist; did you mean support-bot"),
        ("busy", 1, "(429: 600 requests a minute); try again in 7 s"),
        ("down", 1, "no replica can answer now (503: no verified replica of down)"),
        ("long", 2, "refused (400: the prompt has 9000 tokens)"),
        ("broken", 1, "broke off: the replica is gone"),
        ("cut", 1, "broke off"),
    ],
)
def test_failures_are_told_in_one_line(url: str, model: str, code: int, told: str) -> None:
    done = chat(url, model, "-m", "hi")
    assert done.returncode == code and told in done.stderr and done.stderr.count("\n") == 1, done


def test_wrong_keys_and_addresses(url: str, tmp_path: Path) -> None:
    wrong = chat(url, "support-bot", "-m", "hi", key="another")
    assert wrong.returncode == 2 and "(401: unknown key)" in wrong.stderr and "FINETUNE_API_KEY" in wrong.stderr
    assert "another" not in wrong.stderr
    nowhere = chat("http://127.0.0.1:1", "support-bot", "-m", "hi")
    assert nowhere.returncode == 1 and "does not answer" in nowhere.stderr and "port-forward" in nowhere.stderr
    assert "Traceback" not in nowhere.stderr and nowhere.stderr.count("\n") == 1
    unsaid = chat("", "support-bot", "-m", "hi")
    assert unsaid.returncode == 2 and "kubectl port-forward" in unsaid.stderr
    assert chat("ftp://x", "support-bot", "-m", "hi").returncode == 2
    assert "no question" in chat(url, "support-bot", input="").stderr


def test_base_and_tuned_side_by_side(url: str) -> None:
    """On a pipe one after the other; the gateway says which base it is."""
    done = chat(url, "support-bot", "--compare", "-m", "hi")
    assert done.stdout == "chat:\nbase\n\nsupport-bot:\nHello wo\ufffd[2Jrld\n\n" and done.returncode == 0, done
    assert {asked["model"] for asked in Upstream.asked} == {"chat", "support-bot"}
    half = chat(url, "broken", "--compare", "--base", "chat", "-m", "hi")
    assert half.returncode == 1 and "broken: the answer broke off" in half.stderr and "base" in half.stdout
    unknown = chat(url, "other", "--compare", "-m", "hi", "--kubeconfig", "/nonexistent")
    assert unknown.returncode == 2 and "--base" in unknown.stderr


@pytest.mark.timeout(120)
def test_a_conversation_in_a_terminal(url: str) -> None:
    """Two columns; the second question carries what both had answered, and /new forgets it."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "FINETUNE_GATEWAY_URL": url, "FINETUNE_API_KEY": KEY, "COLUMNS": "80", "TERM": "xterm"}
    command = [sys.executable, "-m", "finetune_cli", "chat", "support-bot", "--compare"]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True)
    os.close(follower)
    screen = b""
    lines = iter([b"one\n", b"two\n", b"/new\n", b"three\n", b"\x04"])
    prompts = 0
    try:
        with contextlib.suppress(OSError):  # of a terminal whose other end is closed
            while part := os.read(leader, 65536):
                screen += part
                while screen.count(b"> ") > prompts:
                    prompts += 1
                    os.write(leader, next(lines, b"\x04"))
        assert process.wait(30) == 0, screen
    finally:
        process.kill()
        os.close(leader)
    text = screen.decode()
    assert "│ base" in text and "Hello wo\ufffd[2Jrld" in text
    tuned = [[m["content"] for m in asked["messages"]] for asked in Upstream.asked if asked["model"] == "support-bot"]
    assert tuned == [["one"], ["one", "Hello wo\ufffd[2Jrld", "two"], ["three"]]
    base = [[m["content"] for m in asked["messages"]] for asked in Upstream.asked if asked["model"] == "chat"]
    assert base == [["one"], ["one", "base", "two"], ["three"]]


def test_of_long_answers_the_end_is_seen_while_they_are_made() -> None:
    console = Console(width=60, height=12, file=io.StringIO(), record=True)
    talks = [Talk("chat", answer="word " * 400 + "the end"), Talk("support-bot", answer="short")]
    shown = Chat(Gateway("http://localhost", None), talks, {}, console)
    console.print(shown._columns(tail=True))
    lines = console.export_text().splitlines()
    assert len(lines) <= 12 and "the end" in "".join(lines) and "short" in "".join(lines)
    console.print(shown._columns())
    assert console.export_text().count("word") == 400, "and all of it when they are whole"


def test_events_of_a_stream() -> None:
    assert list(pieces(['data: {"choices":[]}', "", "event: x", 'data:{"choices":[{"delta":{"content":"a"}}]}', "data: [DONE]"])) == ["a"]
    for bad in ("data: {", 'data: ["x"]', 'data: {"choices": 3}'):
        with pytest.raises(ChatError, match="is none that OpenAI"):
            list(pieces([bad]))
    with pytest.raises(ChatError, match="closed before its end"):
        list(pieces(['data: {"choices":[{"delta":{"content":"a"}}]}']))


def test_a_kubeconfigs_token_goes_over_tls_only(tmp_path: Path) -> None:
    path = tmp_path / "config"
    entry = {"cluster": {"server": "https://127.0.0.1:1"}, "user": {"token": "of-the-cluster"}, "context": {"cluster": "c", "user": "u"}}
    document = {
        "apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{"name": "c", "cluster": entry["cluster"]}], "users": [{"name": "u", "user": entry["user"]}],
        "contexts": [{"name": "x", "context": entry["context"]}],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(document))
    for url in ("https://models.example.org", "http://localhost:8080", "http://127.0.0.1:8080"):
        assert token_of(str(path), None, url) == "of-the-cluster"
    assert token_of(str(path), None, "http://models.example.org") is None
    assert token_of(str(tmp_path / "none"), None, "https://models.example.org") is None
