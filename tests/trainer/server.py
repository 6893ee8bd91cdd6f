"""A server of chat completions for tests, in place of a real model behind vLLM or Ollama: its answers are a function."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from tests.loopback import QuietHandler, serving


class Chat:
    """What was asked, and where."""

    def __init__(self, url: str) -> None:
        self.url, self.asked, self.keys = url, list[list[dict[str, Any]]](), list[str | None]()


@contextlib.contextmanager
def chat_server(answer: Callable[[list[dict[str, Any]]], str], *, failures: list[int] | None = None) -> Iterator[Chat]:
    """Serve `answer(messages)`; the first requests fail with the given codes."""
    left = list(failures or [])
    chat = Chat("")

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if left:
                self.send_response(left.pop(0))
                self.end_headers()
                return
            chat.asked.append(body["messages"])
            chat.keys.append(self.headers.get("Authorization"))
            text = json.dumps({"choices": [{"message": {"content": answer(body["messages"])}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    with serving(Handler) as port:
        chat.url = f"http://127.0.0.1:{port}/v1"
        yield chat
