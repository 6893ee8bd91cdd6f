"""The CRD is generated, fresh, structural, and accepts and refuses what the pydantic models do."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import celpy
import jsonschema
import kubernetes_validate
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_api.base import APIModel
from finetune_api.crd import crd, generated, queue_crd, structural_schema
from finetune_api.queue import FineTuneQueueSpec
from finetune_api.reference import reference
from finetune_api.spec import FineTuneJobSpec
from finetune_api.validation import InvalidDocument, parse_spec
from tests.factory import FULL, MINIMAL

REPO = Path(__file__).parents[2]
CRDS = {"FineTuneJob": crd(), "FineTuneQueue": queue_crd()}
QUEUE: dict[str, Any] = {
    "cohort": "all",
    "flavours": [{"name": "h100", "nominalQuota": 16, "borrowingLimit": 8, "nodeLabels": {"gpu": "h100"}, "pricePerHour": 2.5}],
    "namespaceSelector": {"matchLabels": {"team": "a"}},
}


def _schema(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = CRDS[kind]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    return found


SPEC, QUEUE_SPEC = _schema("FineTuneJob")["spec"], _schema("FineTuneQueue")["spec"]


def test_generated_files_are_fresh() -> None:
    stale = [str(p.relative_to(REPO)) for p, text in generated(REPO).items() if not p.exists() or p.read_text() != text]
    assert not stale, f"run `make crds`: {stale}"
    assert (REPO / "docs" / "reference.md").read_text() == reference(), "run `make crds`: docs/reference.md"


@pytest.mark.parametrize("kind", CRDS)
@pytest.mark.parametrize("version", ["1.25", "1.37"])
def test_the_crd_is_valid_for_old_and_new_servers(version: str, kind: str) -> None:
    """1.20 is asked itself, in the component tests: no package ships its schemas any more."""
    kubernetes_validate.validate(CRDS[kind], version, strict=True)


def _walk(node: dict[str, Any], path: str = "spec") -> Any:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from _walk(child, f"{path}.{name}")
    if "items" in node:
        yield from _walk(node["items"], f"{path}[]")


@pytest.mark.parametrize("kind", CRDS)
def test_every_field_is_described_and_structural(kind: str) -> None:
    schema = _schema(kind)
    for root in ("spec", "status"):
        for path, node in _walk(schema[root], root):
            assert "type" in node, path
            assert not {"$ref", "anyOf", "oneOf", "allOf"} & set(node), path
            if not path.endswith("[]"):
                assert node.get("description"), f"{path} has no description"


@pytest.mark.parametrize("kind", CRDS)
def test_strings_and_lists_are_bounded(kind: str) -> None:
    unbounded = [
        path
        for path, node in _walk(_schema(kind)["spec"])
        if (node["type"] == "string" and "enum" not in node and "maxLength" not in node)
        or (node["type"] == "array" and "maxItems" not in node)
    ]
    assert not unbounded


def test_what_kubernetes_cannot_express_raises() -> None:
    class Union(APIModel):
        value: int | str

    class Loop(APIModel):
        inner: Loop | None = None

    with pytest.raises(TypeError, match="union"):
        structural_schema(Union)
    Loop.model_rebuild(_types_namespace={"Loop": Loop})
    with pytest.raises(TypeError, match="refers to itself"):
        structural_schema(Loop)


# The schema as an API server applies it: types, bounds, patterns, unknown fields, then CEL.


def _strict(node: dict[str, Any]) -> dict[str, Any]:
    """The structural schema as JSON Schema 2020-12 that refuses unknown fields."""
    node = copy.deepcopy(node)
    for low, high in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if node.get(high) is True:
            node[high] = node.pop(low)
    if "properties" in node:
        node["properties"] = {name: _strict(child) for name, child in node["properties"].items()}
        node["additionalProperties"] = False
    elif isinstance(node.get("additionalProperties"), dict):
        node["additionalProperties"] = _strict(node["additionalProperties"])
    if "items" in node:
        node["items"] = _strict(node["items"])
    if node.get("x-kubernetes-list-type") == "set":
        node["uniqueItems"] = True
    return {key: value for key, value in node.items() if not key.startswith("x-")}


VALIDATOR, QUEUE_VALIDATOR = (jsonschema.Draft202012Validator(_strict(schema)) for schema in (SPEC, QUEUE_SPEC))


@functools.cache
def _program(rule: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def _with_defaults(node: dict[str, Any], value: Any) -> Any:
    if isinstance(value, dict) and "properties" in node:
        filled = dict(value)
        for name, child in node["properties"].items():
            if name not in filled and "default" in child:
                filled[name] = copy.deepcopy(child["default"])
            if name in filled:
                filled[name] = _with_defaults(child, filled[name])
        return filled
    if isinstance(value, list) and "items" in node:
        return [_with_defaults(node["items"], item) for item in value]
    return value


def _cel_holds(node: dict[str, Any], value: Any) -> bool:
    for rule in node.get("x-kubernetes-validations", []):
        if not bool(_program(rule["rule"]).evaluate({"self": celpy.json_to_cel(value)})):
            return False
    if isinstance(value, dict):
        return all(_cel_holds(node["properties"][k], v) for k, v in value.items() if k in node.get("properties", {}))
    if isinstance(value, list):
        return all(_cel_holds(node.get("items", {}), item) for item in value)
    return True


def _server_accepts(document: Any) -> bool:
    if not VALIDATOR.is_valid(document):
        return False
    return _cel_holds(SPEC, _with_defaults(SPEC, document))


def _model_accepts(document: Any) -> bool:
    try:
        parse_spec(document, strict=True)
    except InvalidDocument:
        return False
    return True


def _queue_accepted_by(document: Any) -> tuple[bool, bool]:
    """(by the server, by the model)"""
    server = QUEUE_VALIDATOR.is_valid(document) and _cel_holds(QUEUE_SPEC, _with_defaults(QUEUE_SPEC, document))
    try:
        FineTuneQueueSpec.model_validate(document, extra="forbid", by_alias=True, by_name=False)
    except ValueError:
        return server, False
    return server, True


def test_minimal_and_full_are_accepted_by_both() -> None:
    for document in (MINIMAL, FULL):
        assert _server_accepts(document), list(VALIDATOR.iter_errors(document))
        assert _model_accepts(document)


def _values(node: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values around a field's own domain: legal ones, ones at and past the bounds, ones of another type."""
    kind = node["type"]
    if "enum" in node:
        good: st.SearchStrategy[Any] = st.sampled_from(node["enum"])
    elif kind == "integer":
        low, high = int(node.get("minimum", 0)), int(node.get("maximum", 10**6))
        good = st.one_of(st.integers(low, high), st.sampled_from([low, high, low - 1, high + 1]))
    elif kind == "number":
        low, high = float(node.get("minimum", 0)), float(node.get("maximum", 10))
        good = st.one_of(st.floats(low, high), st.sampled_from([low, high, low - 0.5, high + 0.5]))
    elif kind == "boolean":
        good = st.booleans()
    elif kind == "string":
        samples = [
            "",
            "x",
            "a-b",
            "10m",
            "4Gi",
            "hf://org/model",
            "pvc://claim/path",
            "configmap://name/key",
            "pvc://x/../y",
            "q" * 600,
            "UPPER",
        ]
        good = st.sampled_from(samples)
    elif kind == "array":
        good = st.lists(_values(node["items"]), max_size=3)
    else:
        good = _objects(node)
    return st.one_of(good, good, good, st.sampled_from([None, 7, "seven", True, [], {}])) if kind != "object" else good


def _objects(node: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "properties" not in node:
        return st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(["", "v", "-bad-", "x" * 64]), max_size=2)
    optional = {name: _values(child) for name, child in node["properties"].items() if name not in node.get("required", [])}
    required = {name: _values(node["properties"][name]) for name in node.get("required", [])}
    return st.fixed_dictionaries(required, optional=optional)


def _paths(node: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    found = []
    for name, child in node.get("properties", {}).items():
        found.append(((*prefix, name), child))
        found += _paths(child, (*prefix, name))
    return found


PATHS = _paths(SPEC)


def _null_inside(value: Any) -> bool:
    if isinstance(value, dict):
        return any(v is None or _null_inside(v) for v in value.values())
    return isinstance(value, list) and any(v is None or _null_inside(v) for v in value)


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_schema_and_models_agree(data: st.DataObject) -> None:
    """One to three fields of a valid document take values around their domain: both sides must say the same.

    Null is left out: an API server prunes it where a default exists and refuses it elsewhere; the models take it as absent.
    """
    document = copy.deepcopy(data.draw(st.sampled_from([MINIMAL, FULL])))
    for _ in range(data.draw(st.integers(1, 3))):
        path, node = data.draw(st.sampled_from(PATHS))
        target = document
        for part in path[:-1]:
            if not isinstance(target, dict):
                break
            target = target.setdefault(part, {})
        if isinstance(target, dict):
            target[path[-1]] = data.draw(_values(node))
    if data.draw(st.integers(0, 19)) == 0:
        document["surprise"] = 1
    if _null_inside(document):
        return
    server, model = _server_accepts(document), _model_accepts(document)
    assert server == model, f"server {server}, model {model}: {document}\n{list(VALIDATOR.iter_errors(document))[:2]}"


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_queue_schema_and_model_agree(data: st.DataObject) -> None:
    """The same for FineTuneQueue."""
    document = copy.deepcopy(QUEUE)
    for _ in range(data.draw(st.integers(1, 3))):
        path, node = data.draw(st.sampled_from(_paths(QUEUE_SPEC)))
        target: Any = document
        for part in path[:-1]:
            target = target.setdefault(part, {}) if isinstance(target, dict) else None
        if isinstance(target, dict):
            target[path[-1]] = data.draw(_values(node))
    if _null_inside(document):
        return
    server, model = _queue_accepted_by(document)
    assert server == model, f"server {server}, model {model}: {document}"


def test_rules_of_queues() -> None:
    assert _queue_accepted_by(QUEUE) == (True, True)
    for limit in ("borrowingLimit", "lendingLimit"):
        alone = {"flavours": [{"name": "any", "nominalQuota": 8, limit: 2}]}
        assert QUEUE_VALIDATOR.is_valid(alone) and _queue_accepted_by(alone) == (False, False), limit
    assert _queue_accepted_by({"flavours": []}) == (False, False)


def test_every_rule_is_exercised() -> None:
    """Each CEL rule refuses at least one document that the Python rule refuses too, and the same ones."""
    from tests.unit.test_validation import BAD

    messages = {m for row in BAD for m in [_message(row[1])] if m}
    rules = {rule["message"] for _, node in _walk(SPEC) for rule in node.get("x-kubernetes-validations", [])}
    assert not rules - messages, f"no bad document for: {rules - messages}"


def _message(change: dict[str, Any]) -> str | None:
    document = {**MINIMAL, **change}
    filled = _with_defaults(SPEC, document)
    for _, node, value in _pairs(SPEC, filled):
        for rule in node.get("x-kubernetes-validations", []):
            if isinstance(value, dict) and not bool(_program(rule["rule"]).evaluate({"self": celpy.json_to_cel(value)})):
                return str(rule["message"])
    return None


def _pairs(node: dict[str, Any], value: Any, path: str = "spec") -> Any:
    if VALIDATOR.is_valid(value) or path != "spec":
        yield path, node, value
    if isinstance(value, dict):
        for name, child in node.get("properties", {}).items():
            if name in value:
                yield from _pairs(child, value[name], f"{path}.{name}")
    if isinstance(value, list) and "items" in node:
        for item in value:
            yield from _pairs(node["items"], item, f"{path}[]")


def test_the_model_has_no_field_without_docstring() -> None:
    assert all(field.description for model in (FineTuneJobSpec, FineTuneQueueSpec) for field in model.model_fields.values())
