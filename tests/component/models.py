"""FineTunedModels as a user has them, and pods that publish versions to a played storage and catalog it."""

from __future__ import annotations

import json
import ssl
import threading
import urllib.error
import urllib.request
from typing import Any

from finetune_api import GROUP, VERSION, names
from finetune_api.contract import CatalogFile, CatalogReport, ExitCode, StageResult, catalog_audience, catalog_path
from finetune_api.tuned_model import MODEL_KIND, MODEL_PLURAL
from finetune_api.versions import BaseModelReference, VersionJob, VersionRecord
from tests.component.conftest import Api
from tests.factory import COMPARED, MINIMAL, NOW, ended, merged, stamp

STORAGE = "pvc://models/bot"


def publishing(**changes: Any) -> dict[str, Any]:
    """A job that adds a version to bot."""
    held_out = {"train": {"uri": "configmap://rows/train.jsonl"}, "eval": {"splitFraction": 0.1}}
    return merged(MINIMAL, dataset=held_out, evaluation={}, publish=[{"model": "bot"}], **changes)


class Models:
    """FineTunedModels of a namespace."""

    def __init__(self, api: Api) -> None:
        self.api = api

    def create(self, name: str = "bot", **spec: Any) -> None:
        body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": MODEL_KIND, "metadata": {"name": name}, "spec": {"storage": STORAGE, **spec}}
        self.api.custom.create_namespaced_custom_object(GROUP, VERSION, self.api.namespace, MODEL_PLURAL, body)

    def patch(self, spec: dict[str, Any], name: str = "bot") -> None:
        self.api.custom.patch_namespaced_custom_object(GROUP, VERSION, self.api.namespace, MODEL_PLURAL, name, {"spec": spec})

    def delete(self, name: str = "bot") -> None:
        self.api.custom.delete_namespaced_custom_object(GROUP, VERSION, self.api.namespace, MODEL_PLURAL, name)

    def status(self, name: str = "bot") -> dict[str, Any]:
        found = self.api.custom.get_namespaced_custom_object(GROUP, VERSION, self.api.namespace, MODEL_PLURAL, name)
        return dict(found.get("status") or {})

    def states(self) -> dict[int, str]:
        return {v["number"]: v["state"] for v in reversed(self.status().get("versions", []))}

    def condition(self, type_: str) -> dict[str, Any]:
        return next((c for c in self.status().get("conditions", []) if c["type"] == type_), {})


class Storage:
    """Records of versions, as publish writes them and catalog keeps them. An override of the played kubelet."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.records: dict[int, VersionRecord] = {}
        self.verdicts: list[str] = []
        """What the next evaluations say of the champion."""
        self.champions: list[dict[str, Any]] = []
        """What evaluations were told to compare with."""
        self.catalogs: list[CatalogFile] = []
        self.refuses = 0
        """Catalog pods that are to fail."""
        self._lock = threading.Lock()

    def __call__(self, pod: Any) -> dict[str, Any] | None:
        if pod.status.phase != "Running":
            return None
        act = {"evaluate": self._evaluate, "publish": self._publish, "catalog": self._catalog}.get(pod.metadata.labels[names.LABEL_STAGE])
        with self._lock:
            return act(pod) if act is not None else None

    def _evaluate(self, pod: Any) -> dict[str, Any]:
        result, told = dict(COMPARED.result), _env(pod).get("FINETUNE_CHAMPION")
        if told is not None:
            champion = json.loads(told)
            self.champions.append(champion)
            result["champion"] = {"version": champion["number"], "prompts": 50, "metric": "loss", "result": self.verdicts.pop(0)}
        return ended(0, StageResult(reason="Compared", message="compared", result=result).dumps())

    def _publish(self, pod: Any) -> dict[str, Any] | None:
        uid, name = pod.metadata.labels[names.LABEL_JOB_UID], pod.metadata.labels[names.LABEL_JOB]
        number = next((n for n, r in self.records.items() if r.job.uid == uid), None) or max(self.records, default=0) + 1
        uri = f"{STORAGE}/versions/{number}"
        artifact = {"uri": uri, "digest": f"sha256:{number:02}", "bytes": 10, "model": "bot", "version": number, "rank": 8}
        self.records.setdefault(
            number,
            VersionRecord(
                number=number,
                job=VersionJob(name=name, uid=uid),
                uri=uri,
                digest=f"sha256:{number:02}",
                bytes=10,
                base=BaseModelReference(uri="pvc://models/tiny"),
                created_at=stamp(NOW),
            ),
        )
        return ended(0, StageResult(reason="Published", message="published", result={"artifacts": [artifact]}).dumps())

    def _catalog(self, pod: Any) -> dict[str, Any] | None:
        """As the trainer's stage: records are written, then what is there is told with the pod's own token."""
        if self.refuses:
            self.refuses -= 1
            return ended(int(ExitCode.INFRASTRUCTURE), StageResult(reason="StorageRefused", message="access denied").dumps())
        config = next(v.config_map.name for v in pod.spec.volumes if v.config_map is not None)
        data = self.api.core.read_namespaced_config_map(config, self.api.namespace).data
        file = CatalogFile.model_validate_json(data["model.json"])
        for number, record in self.records.items():
            changes: dict[str, Any] = {"state": file.states[number]} if number in file.states else {}
            if number in file.remove and record.removed_at is None:
                changes["removed_at"] = stamp(NOW)
            self.records[number] = record.model_copy(update=changes)
        report = CatalogReport(done=file.digest, records=list(self.records.values()))
        try:
            self.post(_env(pod)["FINETUNE_PROGRESS_URL"], file.name, pod, report.model_dump_json(by_alias=True, exclude_none=True))
        except (urllib.error.URLError, OSError):
            return ended(int(ExitCode.INFRASTRUCTURE), StageResult(reason="OperatorAway", message="nobody listens").dumps())
        self.catalogs.append(file)
        return ended(0, StageResult(reason="Cataloged", message="done", result={"done": file.digest}).dumps())

    def post(self, url: str, model: str, pod: Any, body: str, audience: str | None = None) -> int:
        """Send a report as a pod does: with a token that is bound to it. The status; raises URLError."""
        bound = {"kind": "Pod", "apiVersion": "v1", "name": pod.metadata.name, "uid": pod.metadata.uid}
        spec = {"audiences": [audience or catalog_audience(self.api.namespace, model)], "boundObjectRef": bound, "expirationSeconds": 600}
        token = self.api.core.create_namespaced_service_account_token("default", self.api.namespace, {"spec": spec}).status.token
        request = urllib.request.Request(f"{url}{catalog_path(self.api.namespace, model)}", body.encode(), method="POST")
        request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=5, context=ssl._create_unverified_context()) as answer:
            return int(answer.status)


def _env(pod: Any) -> dict[str, str]:
    return {entry.name: entry.value for entry in pod.spec.containers[0].env}
