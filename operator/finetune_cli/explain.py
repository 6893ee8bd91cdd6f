"""`finetune explain`: a field of the API with its type, default and documentation, without a cluster."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from finetune_api.endpoint import FineTuneEndpointSpec, FineTuneEndpointStatus
from finetune_api.queue import FineTuneQueueSpec, FineTuneQueueStatus
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_api.tuned_model import FineTunedModelSpec, FineTunedModelStatus

_ROOTS: dict[str, type[BaseModel]] = {
    "spec": FineTuneJobSpec,
    "status": FineTuneJobStatus,
    "queue.spec": FineTuneQueueSpec,
    "queue.status": FineTuneQueueStatus,
    "model.spec": FineTunedModelSpec,
    "model.status": FineTunedModelStatus,
    "endpoint.spec": FineTuneEndpointSpec,
    "endpoint.status": FineTuneEndpointStatus,
}


class NoSuchField(ValueError):
    """A path that leads nowhere."""


def explain(path: str, console: Console) -> None:
    """Print what stands at the path. Raises NoSuchField, which says what is near."""
    root = next((r for r in sorted(_ROOTS, key=len, reverse=True) if path == r or path.startswith(f"{r}.")), None)
    if root is None:
        raise NoSuchField(f"{path}: begin with {', '.join(_ROOTS)}, for example spec.tuning.method")
    schema = _ROOTS[root].model_json_schema(by_alias=True)
    node, so_far = schema, root
    for part in filter(None, path[len(root) :].split(".")):
        fields = _fields(node, schema)
        if part not in fields:
            near = difflib.get_close_matches(part, fields, n=1)
            raise NoSuchField(f"{so_far} has no field {part}" + (f"; did you mean {near[0]}?" if near else f"; it has {', '.join(fields)}"))
        node, so_far = fields[part], f"{so_far}.{part}"
    console.print(f"{so_far}  <{_type(node, schema)}>", style="bold", highlight=False, markup=False)
    if "default" in node and node["default"] not in (None, {}, []):
        console.print(f"default: {node['default']}", highlight=False, markup=False)
    text = node.get("description") or _resolved(node, schema).get("description")
    if text:
        console.print(text, highlight=False, markup=False)
    fields = _fields(node, schema)
    if fields:
        console.print("\nFields:", style="bold")
    for name, field in fields.items():
        required = " (required)" if name in _resolved(node, schema).get("required", ()) else ""
        first = str(field.get("description") or _resolved(field, schema).get("description") or "").split(". ")[0]
        console.print(f"  {name}  <{_type(field, schema)}>{required}  {first}", highlight=False, markup=False, soft_wrap=True)


def _resolved(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """References, optional values and lists looked through."""
    while True:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        elif "anyOf" in node:
            node = next((option for option in node["anyOf"] if option.get("type") != "null"), {})
        elif node.get("type") == "array" and isinstance(node.get("items"), dict):
            node = node["items"]
        else:
            return node


def _fields(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = _resolved(node, schema).get("properties", {})
    return found


def _type(node: dict[str, Any], schema: dict[str, Any]) -> str:
    many = "[]" if node.get("type") == "array" or any(o.get("type") == "array" for o in node.get("anyOf", ())) else ""
    inner = _resolved(node, schema)
    if "enum" in inner:
        return " | ".join(map(str, inner["enum"])) + many
    if "const" in inner:
        return str(inner["const"]) + many
    return str(inner.get("type", "object")) + many
