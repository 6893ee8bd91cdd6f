"""Documents of ours in YAML files, checked as strictly as an API server does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune_api import KIND
from finetune_api.base import APIModel
from finetune_api.spec import FineTuneJobSpec
from finetune_api.validation import FieldError, InvalidDocument, parse_document


class _Loader(yaml.SafeLoader):
    """YAML as kubectl reads it: 2e-4 is a number, not a string; a key may stand once."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = {str(key) for key in keys if keys.count(key) > 1}
    if twice:
        raise InvalidDocument([FieldError(", ".join(sorted(twice)), f"stands twice in one mapping (line {node.start_mark.line + 1})")])
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


@dataclass(frozen=True)
class Document:
    """One of a file, checked."""

    kind: str
    metadata: dict[str, Any]
    spec: APIModel

    @property
    def name(self) -> str:
        """Its name, or what its name is to begin with."""
        return str(self.metadata.get("name") or self.metadata.get("generateName"))


def read_documents(path: Path, rewrite: Callable[[Any], Any] = lambda document: document) -> list[Document]:
    """All documents of ours of a file, checked strictly; `rewrite` has each job before. Raises InvalidDocument."""
    try:
        documents = [d for d in yaml.load_all(path.read_text(), Loader=_Loader) if d is not None]
    except OSError as failure:
        raise InvalidDocument([FieldError("", f"{path}: {failure.strerror}")]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as failure:
        raise InvalidDocument([FieldError("", f"{path} is no YAML: {failure}")]) from None
    ours = [d for d in documents if not isinstance(d, dict) or str(d.get("kind", "")).lower().startswith("finetune")]
    if not ours:
        raise InvalidDocument([FieldError("", f"{path} holds no {KIND}")])
    found = [parse_document(rewrite(d) if isinstance(d, dict) and d.get("kind") == KIND else d) for d in ours]
    return [Document(*parts) for parts in found]


def read_jobs(path: Path, rewrite: Callable[[Any], Any] = lambda document: document) -> list[tuple[dict[str, Any], FineTuneJobSpec]]:
    """All FineTuneJobs of a file; whatever else of ours is in it is checked. Raises InvalidDocument."""
    return [(d.metadata, d.spec) for d in read_documents(path, rewrite) if isinstance(d.spec, FineTuneJobSpec)]
