"""A TCP relay between an operator and the API server, which can be cut: the network as a fault."""

from __future__ import annotations

import contextlib
import select
import socket
import socketserver
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml


class Wire:
    """Relays to the server of a kubeconfig; `kubeconfig` is a copy that leads through it."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        self._document: dict[str, Any] = yaml.safe_load(kubeconfig.read_text())
        target = urlsplit(self._document["clusters"][0]["cluster"]["server"])
        self._target = (str(target.hostname), int(target.port or 443))
        self._whole = threading.Event()
        self._whole.set()
        self._open: set[socket.socket] = set()
        wire = self

        class Relay(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                wire._relay(self.request)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Relay)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._document["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{self._server.server_address[1]}"
        self.kubeconfig = folder / "through-the-wire.kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(self._document))

    def _relay(self, near: socket.socket) -> None:
        if not self._whole.is_set():
            return
        with contextlib.suppress(OSError), socket.create_connection(self._target, timeout=5) as far:
            pair = {near: far, far: near}
            self._open |= set(pair)
            try:
                while self._whole.is_set():
                    for ready in select.select(list(pair), [], [], 0.1)[0]:
                        data = ready.recv(65536)
                        if not data:
                            return
                        pair[ready].sendall(data)
            finally:
                self._open -= set(pair)

    def cut(self) -> None:
        """End all connections and take no new ones."""
        self._whole.clear()
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Relay again."""
        self._whole.set()

    def close(self) -> None:
        """Stop."""
        self.cut()
        self._server.shutdown()
        self._server.server_close()
