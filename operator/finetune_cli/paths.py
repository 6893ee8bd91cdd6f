"""Plain paths in a manifest that runs on this machine: files and folders stand for claims, so that nothing else is to be said."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from finetune_api.validation import FieldError, InvalidDocument

_BEGINS = ("./", "../", "/", "~/")
_DATA = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".gz")
_FIELDS = ("uri", "continueFrom")
_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


class LocalPaths:
    """Makes pvc:// URIs of a manifest's paths, which begin at the manifest's own folder; and keeps which folder each claim is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.volumes: dict[str, str] = {}
        """Claim -> folder."""

    def rewrite(self, document: Any) -> Any:
        """The document with URIs in place of paths. Raises InvalidDocument for a source that is not there."""
        if not isinstance(document, dict) or not isinstance(document.get("spec"), dict):
            return document  # told by who parses it
        return {**document, "spec": self._walk(document["spec"], "spec")}

    def _walk(self, value: Any, place: str) -> Any:
        if isinstance(value, dict):
            return {key: self._field(key, inner, f"{place}.{key}") for key, inner in value.items()}
        return [self._walk(inner, f"{place}[{index}]") for index, inner in enumerate(value)] if isinstance(value, list) else value

    def _field(self, key: Any, value: Any, place: str) -> Any:
        if key not in _FIELDS or not isinstance(value, str) or "://" in value:
            return self._walk(value, place)
        path = (self._folder / Path(value).expanduser()).resolve()
        if not (value.startswith(_BEGINS) or value.lower().endswith(_DATA) or path.exists()):
            return value  # org/model: what it lacks is its scheme
        target = place.startswith("spec.publish")
        if not target and not path.exists():
            raise InvalidDocument(
                [FieldError(place, f"{value}: there is no such file or folder ({path}); a path begins at the manifest's folder")]
            )
        if _SEGMENT.fullmatch(path.name):
            return f"pvc://{self._claim(path.parent)}/{path.name}"
        if path.is_dir() and not target:
            return f"pvc://{self._claim(path)}"
        raise InvalidDocument(
            [FieldError(place, f"{value}: a name is made of letters, digits, '.', '_' and '-' here; rename {path.name!r}")]
        )

    def _claim(self, folder: Path) -> str:
        """The claim that a folder stands for, of the same name whenever it is the same folder."""
        words = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")[:40]
        name = f"{words or 'folder'}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
        self.volumes[name] = str(folder)
        return name
