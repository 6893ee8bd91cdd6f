"""A Hugging Face hub for tests: one model repository out of a folder, and a switch that breaks it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tests.loopback import QuietHandler, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What was asked, and what is broken: requests whose path contains that are answered with the code."""

    def __init__(self, folder: Path) -> None:
        self.files = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}
        self.url, self.asked = "", list[str]()
        self.broken: tuple[str, int] | None = None

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if self.broken is not None and self.broken[0] in path:
            return self.broken[1], {"Retry-After": "77"}, b""
        if path.startswith("/api/models/org/model/revision/"):
            return 200, {}, json.dumps({"id": "org/model", "sha": COMMIT, "siblings": []}).encode()
        if path.startswith(f"/api/models/org/model/tree/{COMMIT}"):
            tree = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in self.files.items()]
            return 200, {}, json.dumps(tree).encode()
        body = self.files.get(path.removeprefix(f"/org/model/resolve/{COMMIT}/"))
        if body is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}, body


@contextlib.contextmanager
def hub(folder: Path) -> Iterator[Hub]:
    """Serve the folder as hf://org/model."""
    served = Hub(folder)

    class Handler(QuietHandler):
        def answer(self) -> None:
            served.asked.append(f"{self.command} {self.path}")
            code, headers, body = served.answer(self.path)
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = answer

    with serving(Handler) as port:
        served.url = f"http://127.0.0.1:{port}"
        yield served
