"""The model map: what `gpt-4o-mini-2024-07-18` means here. Read once at start-up from the chart's ConfigMap. Pure but for `read`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from finetune_api.base import APIModel
from finetune_api.spec import FineTuneJobSpec
from finetune_api.validation import InvalidDocument, parse_spec

from ..bodies import Refusal
from ..catalog import near

MethodName = Literal["supervised", "dpo", "reinforcement"]


class Mapped(APIModel):
    """One name."""

    spec: dict[str, Any]
    """Of the FineTuneJobs made by this name: all but `dataset.train` and what a request says. At least `model.uri`."""
    methods: Annotated[list[MethodName], Field(min_length=1)] = ["supervised", "dpo"]
    """What may be asked for."""
    max_epochs: Annotated[int, Field(ge=1, le=50)] = 50
    """Most epochs of a request."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Most rows of a training file. Unset: any number."""

    @property
    def defaults(self) -> FineTuneJobSpec:
        """What `auto` means. Raises InvalidDocument."""
        probe = {"train": {"uri": "s3://bucket/rows.jsonl"}}
        return parse_spec({**self.spec, "dataset": {**self.spec.get("dataset", {}), **probe}})


class ModelMap:
    """All names."""

    def __init__(self, names: dict[str, Mapped]) -> None:
        self.names = names
        self.defaults = {name: mapped.defaults for name, mapped in names.items()}

    def find(self, name: str) -> Mapped:
        """Raises Refusal (404), which says what there is."""
        if name not in self.names:
            known = ", ".join(near(name, self.names)) or "none"
            message = f"the model {name[:80]} cannot be fine-tuned here; an administrator has set {known}"
            raise Refusal(404, message, code="model_not_found", param="model")
        return self.names[name]


def read_map(text: str) -> ModelMap:
    """JSON, as the chart writes it, or YAML: names to entries. Raises ValueError that names the entry and what is wrong with it."""
    try:
        raw = _loaded(text)
    except yaml.YAMLError as failure:
        raise ValueError(f"the model map is no YAML: {failure}") from None
    if not isinstance(raw, dict) or not raw:
        raise ValueError(
            "the model map has no names: write gateway.fineTuning.models, for example {gpt-4o-mini: {spec: {model: {uri: ...}}}}"
        )
    found: dict[str, Mapped] = {}
    for name, entry in raw.items():
        if not isinstance(name, str) or not name or len(name) > 200 or ":" in name:
            raise ValueError(f"the model map's name {name!r}: write at most 200 characters without a colon")
        try:
            found[name] = Mapped.model_validate(entry, extra="forbid", by_alias=True, by_name=False)
            _ = found[name].defaults
        except InvalidDocument as failure:
            raise ValueError(f"the model map's entry {name}: {failure}") from None
        except ValidationError as failure:
            first = failure.errors(include_url=False)[0]
            raise ValueError(f"the model map's entry {name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return ModelMap(found)


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def read(path: str) -> ModelMap:
    """The same of a file. Raises ValueError."""
    try:
        return read_map(Path(path).read_text())
    except OSError as failure:
        raise ValueError(f"the model map cannot be read: {failure}") from None
