"""An MLflow tracking server by its REST API (https://mlflow.org/docs/latest/rest-api.html): runs, registered models, their files.

mlflow's own client is not asked: it follows a server's word to other hosts, to buckets and into local folders. Here files come and go
through the server alone, which has to serve them (`--serve-artifacts`, its default).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import requests

from finetune_api.uris import URI

from ..job.context import Context
from ..process.errors import UserError
from .web import CHUNK, SENDING, guard, save, status_of

_MOST_FOLDERS = 1000


class Server:
    """A tracking server. Raises requests.HTTPError for what it refuses, and what `guard` raises."""

    def __init__(self, context: Context, field: str, uri: URI, *, plain: bool) -> None:
        self.host = uri.name
        self._root = f"{'http' if plain else 'https'}://{uri.name}/api/2.0"
        self._session = guard(requests.Session(), plain=plain)
        token = context.secret(field) or os.environ.get("MLFLOW_TRACKING_TOKEN")
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def get(self, endpoint: str, **query: str) -> dict[str, Any]:
        """What the server says."""
        return self._ask("GET", f"mlflow/{endpoint}", params=query)

    def post(self, endpoint: str, **body: Any) -> dict[str, Any]:
        """The same, where something is written or searched."""
        return self._ask("POST", f"mlflow/{endpoint}", json=body)

    def find(self, endpoint: str, **query: str) -> dict[str, Any] | None:
        """What the server says, None where it says that there is no such thing."""
        try:
            return self.get(endpoint, **query)
        except requests.HTTPError as failure:
            if status_of(failure) == 404 and error_code(failure) == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _ask(self, method: str, place: str, **more: Any) -> dict[str, Any]:
        answer = self._session.request(method, f"{self._root}/{place}", **more)
        answer.raise_for_status()
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError("SourceNotFound", f"{self.host} is no MLflow server: it answers with something else; check the uri")
        return found

    def version(self, model: str, revision: str) -> dict[str, Any]:
        """A version of a registered model: of that number, of that alias, or the newest."""
        try:
            if revision.isdigit():
                return dict(self.get("model-versions/get", name=model, version=revision)["model_version"])
            if revision:
                return dict(self.get("registered-models/alias", name=model, alias=revision)["model_version"])
        except requests.HTTPError as failure:
            if error_code(failure) not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise UserError("SourceNotFound", f"mlflow://{self.host}/{model} has no version or alias {revision}; check the uri") from None
        newest = max(self.versions(model), key=lambda version: int(version["version"]), default=None)
        if newest is None:
            raise UserError("SourceNotFound", f"mlflow://{self.host}/{model} has no version; check the uri")
        return newest

    def versions(self, model: str) -> Iterator[dict[str, Any]]:
        """All versions of a registered model."""
        page = ""
        while True:
            found = self.get("model-versions/search", filter=f"name='{model}'", max_results="1000", page_token=page)
            yield from found.get("model_versions", ())
            if not (page := found.get("next_page_token", "")):
                return

    def files_of(self, version: dict[str, Any]) -> str:
        """The folder of a version's files. Raises UserError where the server does not serve them itself."""
        query = {"name": version["name"], "version": str(version["version"])}
        return self.served(str(self.get("model-versions/get-download-uri", **query)["artifact_uri"]))

    def served(self, uri: str) -> str:
        """The path of files that this server serves itself."""
        parts = urlsplit(uri)
        if parts.scheme != "mlflow-artifacts" or (parts.netloc and parts.netloc != self.host) or ".." in parts.path.split("/"):
            raise UserError(
                "ArtifactsNotServed",
                f"{self.host} keeps the files at {parts.scheme}://, where only its own clients reach them; start it with --serve-artifacts and an --artifacts-destination",
            )
        return parts.path.strip("/")

    def list_files(self, root: str) -> Iterator[tuple[str, int]]:
        """Names below a folder, those in its folders too, and their sizes in bytes."""
        folders = [""]
        for looked, folder in enumerate(folders):
            if looked >= _MOST_FOLDERS:
                raise UserError("ModelTooLarge", f"{self.host}: {root} has over {_MOST_FOLDERS} folders")
            listed = self._ask("GET", "mlflow-artifacts/artifacts", params={"path": f"{root}/{folder}".strip("/")})
            for entry in listed.get("files", ()):
                name = f"{folder}/{entry['path']}" if folder else str(entry["path"])
                if entry.get("is_dir"):
                    folders.append(name)
                else:
                    yield name, int(entry.get("file_size") or 0)

    def download(self, path: str, target: Path, most: int) -> str:
        """Write a file here; its SHA-256. Raises UserError when it has more than `most` bytes."""
        with self._session.get(self._file(path), stream=True) as answer:
            answer.raise_for_status()
            return save(answer, target, most=most, host=self.host)

    def read(self, path: str) -> Iterator[bytes]:
        """A file's bytes as they come."""
        with self._session.get(self._file(path), stream=True) as answer:
            answer.raise_for_status()
            yield from answer.iter_content(CHUNK)

    def upload(self, file: Path, path: str) -> None:
        """Send a file."""
        with file.open("rb") as stream:
            headers = {"Content-Type": "application/octet-stream"}
            body = stream if file.stat().st_size else b""
            self._session.put(self._file(path), data=body, headers=headers, timeout=SENDING).raise_for_status()

    def _file(self, path: str) -> str:
        return f"{self._root}/mlflow-artifacts/artifacts/{quote(path)}"


def error_code(failure: requests.HTTPError) -> str:
    """What MLflow calls an error, such as RESOURCE_ALREADY_EXISTS; empty where it is none of MLflow's."""
    try:
        return str(failure.response.json()["error_code"]) if failure.response is not None else ""
    except (ValueError, KeyError, TypeError):
        return ""
