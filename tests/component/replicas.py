"""Replicas of an endpoint without engines: small HTTPS servers that want the operator's certificate and answer its orders, and a gateway."""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client

from finetune_api import GROUP, VERSION, names
from finetune_api.endpoint import ENDPOINT_PLURAL, ReplicaModel
from finetune_api.serving import AGENT_PORT, EngineReport, ReplicaOrder, ReplicaReport
from tests.component.conftest import Api

AWAY = (client.ApiException, urllib3.exceptions.HTTPError)
STAMP = "%Y-%m-%dT%H:%M:%SZ"


class Replica:
    """At an address of its own. What is ordered is loaded when it is heard of first, and asked its probes then."""

    def __init__(self, address: str, tls: dict[str, str], folder: Path, base: ReplicaModel | None = None) -> None:
        """`base`: the whole model that it serves."""
        self.address, self.order, self.base = address, ReplicaOrder(), base
        self.states: dict[str, str] = {}
        """Of versions that do not turn out as they should"""
        self.keeps = False
        """What it serves stays loaded, whatever is ordered"""
        self.served: dict[str, ReplicaModel] = {}
        folder.mkdir()
        for name, text in tls.items():
            (folder / name).write_text(text)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "ca.crt"))
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
        replica = self

        class Agent(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                order = ReplicaOrder.model_validate_json(self.rfile.read(int(self.headers["Content-Length"])))
                body = json.dumps(replica.takes(order).to_wire()).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer((address, AGENT_PORT), Agent)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def takes(self, order: ReplicaOrder) -> ReplicaReport:
        """As an agent does: at once, with what is so now."""
        self.order = order
        wanted = {model.name for model in order.models}
        now = time.strftime(STAMP, time.gmtime())
        for name in wanted:
            if name in self.served and self.served[name].state == "Loaded":
                state = self.states.get(name, "Verified")
                self.served[name] = ReplicaModel(name=name, state=state, message=f"as {state} as can be", verified_at=now)  # type: ignore[arg-type]
            self.served.setdefault(name, ReplicaModel(name=name, state="Loaded"))
        if not self.keeps:
            self.served = {name: model for name, model in self.served.items() if name in wanted}
        models = [*([self.base] if self.base is not None else []), *self.served.values()]
        addresses = order.external.addresses if order.external is not None else []
        engines = [EngineReport(address=address, ready=True, engine="played", models=models) for address in addresses]
        ready = self.base is None or self.base.state == "Verified"
        return ReplicaReport(generation=order.generation, ready=ready, engine="played", models=[] if engines else models, engines=engines)

    @property
    def answers(self) -> dict[str, str]:
        """Which version has which name of its own."""
        return {alias: model.name for model in self.order.models for alias in model.aliases}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Replicas:
    """Gives each pod of a namespace's endpoints an address and a replica behind it, as a node would."""

    def __init__(self, api: Api, folder: Path) -> None:
        self.api, self._folder = api, folder
        self.by_pod: dict[str, Replica] = {}
        self.whole: dict[str, str] = {}
        """States of whole models that do not turn out as they should"""
        self._next = int(time.time()) % 200
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            with contextlib.suppress(*AWAY):
                self._look()

    def _look(self) -> None:
        pods = {p.metadata.name: p for p in self.api.pods() if names.LABEL_ENDPOINT in p.metadata.labels}
        for gone in self.by_pod.keys() - pods.keys():
            self.by_pod.pop(gone).close()
        for name, pod in pods.items():
            if name not in self.by_pod and pod.metadata.deletion_timestamp is None:
                volume = next(v for v in pod.spec.volumes if v.name == "tls")
                secret = self.api.core.read_namespaced_secret(volume.secret.secret_name, self.api.namespace)
                tls = {key: base64.b64decode(text).decode() for key, text in secret.data.items()}
                self._next += 1
                address = f"127.77.{self._next // 250}.{self._next % 250 + 1}"
                version = (pod.metadata.annotations or {}).get(names.ANNOTATION_VERSION)
                state: Any = self.whole.get(version or "", "Verified")
                base = ReplicaModel(name=version, state=state, message=f"as {state} as can be") if version is not None else None
                self.by_pod[name] = Replica(address, tls, self._folder / name, base)
                self.api.set_pod(name, self.running(address, ready=state == "Verified"))

    @staticmethod
    def running(address: str, restarts: int = 0, *, ready: bool = True) -> dict[str, Any]:
        said = {"type": "Ready", "status": str(ready)}
        containers = [
            {"name": name, "image": "i", "imageID": "i", "ready": True, "restartCount": restarts, "state": {"running": {}}}
            for name in ("vllm", "agent", "proxy")
        ]
        return {"phase": "Running", "podIP": address, "conditions": [said], "containerStatuses": containers}

    @property
    def all(self) -> list[Replica]:
        return [self.by_pod[name] for name in sorted(self.by_pod)]

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for replica in self.by_pod.values():
            replica.close()


class Gateway:
    """Counts as `counts` says, for every canary of a namespace's endpoints."""

    def __init__(self) -> None:
        self.api: Api
        self.counts: Callable[[], tuple[dict[str, Any], dict[str, Any]]] = lambda: ({"requests": 100}, {"requests": 100})
        gateway = self

        class Metrics(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(list(gateway.told(gateway.api))).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Metrics)
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def told(self, api: Api) -> Any:
        for endpoint in api.custom.list_namespaced_custom_object(GROUP, VERSION, api.namespace, ENDPOINT_PLURAL)["items"]:
            for model in endpoint.get("status", {}).get("models", []):
                canary = model.get("canary", {})
                if "since" in canary:
                    old, new = self.counts()
                    whose = {"namespace": api.namespace, "endpoint": endpoint["metadata"]["name"], "model": model["name"]}
                    yield {**whose, "version": canary["version"], "since": canary["since"], "old": old, "new": new}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
