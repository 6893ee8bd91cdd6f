"""docs/reference.md, generated from the CRD: `python -m finetune_api.reference PATH`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import KIND
from .crd import definitions, policy

_INTRO = """# Reference

Generated from `operator/finetune_api` by `make crds`. `kubectl explain finetunejob.spec` shows the same.
"""


def _fields(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    required = set(node.get("required", []))
    for name, child in node.get("properties", {}).items():
        here = f"{path}.{name}"
        yield here, child, name in required
        yield from _fields(child, here)
        if "items" in child:
            yield from _fields(child["items"], f"{here}[]")


def _type(node: dict[str, Any]) -> str:
    if "enum" in node:
        return " \\| ".join(f"`{value}`" if value else '`""`' for value in node["enum"])
    if "x-kubernetes-int-or-string" in node:
        return "quantity"
    if node["type"] == "array":
        return f"list of {_type(node['items'])}"
    if node["type"] == "object" and "additionalProperties" in node:
        return f"map to {_type(node['additionalProperties'])}"
    bounds = []
    for low, symbol in (("minimum", "≥"), ("maximum", "≤")):
        if low in node:
            strict = node.get(f"exclusive{low.capitalize()}")
            bounds.append(f"{symbol if not strict else symbol.replace('≥', '>').replace('≤', '<')} {node[low]:g}")
    return str(node["type"]) + (f" ({', '.join(bounds)})" if bounds else "")


def _default(node: dict[str, Any], required: bool) -> str:
    if required:
        return "required"
    value = node.get("default")
    if value is None or isinstance(value, dict):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _rules(node: dict[str, Any]) -> Iterator[str]:
    if node.get("type") == "object":
        yield from (rule["message"] for rule in node.get("x-kubernetes-validations", []))
    for child in node.get("properties", {}).values():
        yield from _rules(child)
    if "items" in node:
        yield from _rules(node["items"])


def reference() -> str:
    """The Markdown text."""
    between = [validation["message"] for validation in policy()[0]["spec"]["validations"]]
    lines = [_INTRO]
    for document in definitions():
        spec = document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
        lines += [*_chapter(document, between if document["spec"]["names"]["kind"] == KIND else _rules(spec)), ""]
    return "\n".join(lines[:-1]) + "\n"


def _chapter(document: dict[str, Any], rules: Iterable[str]) -> list[str]:
    named, version = document["spec"]["names"], document["spec"]["versions"][0]
    schema = version["schema"]["openAPIV3Schema"]
    fields = schema["properties"]
    group = document["spec"]["group"]
    lines = [f"# {named['kind']}", "", schema["description"], ""]
    lines += [f"`apiVersion: {group}/{version['name']}`, `kind: {named['kind']}`, short name `{named['shortNames'][0]}`.", ""]
    for root in ("spec", "status"):
        lines += [f"## {named['kind']} {root}", "", "| Field | Type | Default | |", "|---|---|---|---|"]
        for path, node, required in _fields(fields[root], root):
            description = node["description"].replace("|", "\\|")
            lines.append(f"| `{path}` | {_type(node)} | {_default(node, required)} | {description} |")
        lines.append("")
    lines += [f"## Rules over several fields of a {named['kind']}", ""]
    return [*lines, *(f"- {message}" for message in dict.fromkeys(rules))]


def main() -> None:
    """Write the page to the path given."""
    Path(sys.argv[1]).write_text(reference())


if __name__ == "__main__":
    main()
