"""A CustomResourceDefinition's spec as an API server reads it, and documents that reach every field of it."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from typing import Any

import celpy
import celpy.celtypes
import jsonschema

from finetune_api.crd import definitions, policy, structural_schema
from finetune_api.endpoint import FineTuneEndpointSpec
from finetune_api.queue import FineTuneQueueSpec
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.transitions import FROZEN
from finetune_api.tuned_model import FineTunedModelSpec
from finetune_api.validation import parse_endpoint, parse_model, parse_queue, parse_spec
from tests.factory import FULL, MINIMAL, merged

Path = tuple[str, ...]
"""Names of fields; `[]` is an item of a list, `{}` a value of a map."""
PARSERS = {
    "FineTuneJob": parse_spec,
    "FineTuneQueue": lambda spec: parse_queue({"spec": spec}),
    "FineTunedModel": lambda spec: parse_model({"spec": spec}),
    "FineTuneEndpoint": lambda spec: parse_endpoint({"spec": spec}),
}
CRDS = {document["spec"]["names"]["kind"]: document for document in definitions()}
POLICY = policy()[0]["spec"]
RULED = {
    "FineTuneJob": structural_schema(FineTuneJobSpec),
    "FineTuneQueue": structural_schema(FineTuneQueueSpec),
    "FineTunedModel": structural_schema(FineTunedModelSpec),
    "FineTuneEndpoint": structural_schema(FineTuneEndpointSpec),
}
"""Schemas of the specs with all rules where they were declared, also those of jobs that a policy says in their place."""


def schema(kind: str) -> dict[str, Any]:
    """The schemas of spec and status by these names."""
    found: dict[str, Any] = CRDS[kind]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    return found


def walk(node: dict[str, Any], path: Path = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every node below and at this one."""
    yield path, node
    inner = dict(node.get("properties", {}))
    if "items" in node:
        inner["[]"] = node["items"]
    if isinstance(node.get("additionalProperties"), dict):
        inner["{}"] = node["additionalProperties"]
    for name, child in inner.items():
        yield from walk(child, (*path, name))


def filled(node: dict[str, Any], value: Any) -> Any:
    """The value with null taken for absent, and with defaults. An unknown field stays, to be refused."""
    if isinstance(value, dict):
        fields, others = node.get("properties", {}), node.get("additionalProperties")
        kept = {name: item for name, item in value.items() if item is not None or (name not in fields and not others)}
        kept = {**{name: copy.deepcopy(child["default"]) for name, child in fields.items() if "default" in child}, **kept}
        return {name: filled(fields.get(name, others or {}), item) for name, item in kept.items()}
    if isinstance(value, list):
        return [filled(node.get("items", {}), item) for item in value]
    return float(value) if node.get("type") == "number" and type(value) is int else value


def _as_json_schema(node: dict[str, Any]) -> dict[str, Any]:
    """The structural schema as JSON Schema 2020-12 that refuses unknown fields."""
    found = {key: value for key, value in node.items() if not key.startswith("x-")}
    for low, high in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if found.get(high) is True:
            found[high] = found.pop(low)
    if "properties" in node:
        found["properties"] = {name: _as_json_schema(child) for name, child in node["properties"].items()}
        found["additionalProperties"] = False
    elif isinstance(node.get("additionalProperties"), dict):
        found["additionalProperties"] = _as_json_schema(node["additionalProperties"])
    if "items" in node:
        found["items"] = _as_json_schema(node["items"])
    if node.get("x-kubernetes-list-type") == "set":
        found["uniqueItems"] = True
    if node.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    return found


@functools.cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_as_json_schema(schema(kind)["spec"]))


def _substring(text: str, start: int, end: int) -> Any:
    return celpy.celtypes.StringType(str(text)[start:end])


@functools.cache
def _program(expression: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(expression), functions={"substring": _substring})


@functools.cache
def _evaluate(expression: str, value: str) -> Any:
    return _program(expression).evaluate({"self": celpy.json_to_cel(json.loads(value))})


def refused_by_policy(new: dict[str, Any], old: dict[str, Any] | None = None) -> Iterator[str]:
    """Messages of what the policy has against a job, as it is with its defaults, in the place of another."""
    seen = {"object": celpy.json_to_cel(new), "oldObject": celpy.json_to_cel(old)}
    if all(_program(condition["expression"]).evaluate(seen) for condition in POLICY["matchConditions"]):
        yield from (v["message"] for v in POLICY["validations"] if not _program(v["expression"]).evaluate(seen))


def refused_changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """What the policy has against a write of a whole job: message by field."""
    before, after = ({**raw, "spec": filled(schema("FineTuneJob")["spec"], raw["spec"])} for raw in (old, new))
    told = set(refused_by_policy(after, before))
    return {field.path: field.message for field in FROZEN if field.message in told}


def refusals(node: dict[str, Any], value: Any, path: str = "spec") -> Iterator[tuple[str, str]]:
    """Path and message of every rule that the value, as it is, breaks."""
    text = json.dumps(value, sort_keys=True)
    for rule in node.get("x-kubernetes-validations", []):
        try:
            holds = bool(_evaluate(rule["rule"], text))
        except celpy.CELEvalError as failure:
            yield path, f"rule evaluation error: {failure}"
            continue
        if not holds:
            yield path, str(_evaluate(rule["messageExpression"], text) if "messageExpression" in rule else "") or rule["message"]
    if isinstance(value, dict):
        fields, others = node.get("properties", {}), node.get("additionalProperties", {})
        for name, item in value.items():
            yield from refusals(fields.get(name, others), item, f"{path}.{name}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from refusals(node.get("items", {}), item, f"{path}[{index}]")


def well_typed(kind: str, spec: Any) -> bool:
    """Whether types and bounds hold, and there is no unknown field."""
    return not list(_validator(kind).iter_errors(spec))


def server_refusals(kind: str, spec: Any) -> list[tuple[str, str]]:
    """What an API server has against a spec: rules are looked at when types and bounds hold."""
    whole = filled(schema(kind)["spec"], spec)
    errors = list(_validator(kind).iter_errors(whole))
    wrong = [(error.json_path.replace("$", "spec", 1), error.message) for error in errors]
    if any(error.validator != "uniqueItems" for error in errors):
        return wrong
    return [*wrong, *refusals(RULED[kind], whole)]


def model_accepts(kind: str, spec: Any) -> bool:
    """Whether webhook and command line take it."""
    try:
        PARSERS[kind](spec)
    except ValueError:
        return False
    return True


def bad_defaults(node: dict[str, Any]) -> list[tuple[str, str]]:
    """Defaults that break a rule as they are written: an API server fills nothing in before it looks, and refuses the definition."""
    return [
        (".".join(path), message)
        for path, child in walk(node)
        if "default" in child
        for _, message in refusals(child, child["default"], "default")
    ]


QUEUE: dict[str, Any] = {
    "cohort": "all",
    "flavors": [
        {
            "name": "h100",
            "nominalQuota": 16,
            "borrowingLimit": 8,
            "lendingLimit": 8,
            "nodeLabels": {"gpu": "h100"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "pricePerHour": "2.5",
            "teraflops": 989,
        }
    ],
    "namespaceSelector": {
        "matchLabels": {"team": "a"},
        "matchExpressions": [{"key": "stage", "operator": "In", "values": ["test"]}],
    },
    "preemption": {},
    "limits": {},
}
_SECRET = {"secretRef": {"name": "token"}}
_ENDPOINT = {"url": "http://vllm.models.svc:8000/v1", "model": "judge", **_SECRET}
_EVERYTHING = merged(
    FULL,
    dataset={
        "train": {"uri": "hf://org/rows", **_SECRET},
        "mix": [{"uri": "s3://bucket/rows.jsonl", "s3Endpoint": "https://minio.example", **_SECRET}],
        "eval": {"uri": "hf://org/rows", "groupBy": "customer"},
        "columns": {"question": "prompt"},
        "checks": {},
    },
    tuning={
        "lora": {"targetModules": ["q_proj"]},
        "hyperparameters": {"globalBatchSize": 32, "earlyStopping": {}},
        "tracking": {
            "mlflow": {"trackingUri": "http://mlflow.tracking.svc:5000/", **_SECRET},
            "wandb": {"project": "support", **_SECRET},
        },
    },
    resources={"requests": {"cpu": 16, "memory": 214748364800}, "limits": {"memory": "200Gi"}, "gpuMemory": 80_000_000_000},
    scheduling={"nodeSelector": {"gpu": "h100"}, "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]},
    checkpoint={"every": "10m"},
    runPolicy={
        "failurePolicy": {
            "rules": [{"action": "FailJob", "onCauses": ["Hang"], "onReasons": ["NonFiniteLoss"], "onExitCodes": {"values": [3]}}]
        }
    },
    workspace={"template": {"storage": 21474836480, "accessMode": "ReadWriteMany"}},
    evaluation={
        "metrics": ["loss", "json-schema", "regex", "judge-win-rate"],
        "gate": {"metric": "loss", "compareWith": "instructed", "onInconclusive": "publish"},
        "baseline": {"systemPrompt": "Answer in JSON.", "fewShot": 4},
        "jsonSchema": "{}",
        "regex": "a+",
        "judge": _ENDPOINT,
        "forgetting": {"uri": "pvc://texts/general.jsonl", "maxIncrease": 0.1},
        "harnessTasks": ["arc_easy"],
    },
    output={"gguf": ["Q4_K_M"], "onnx": ["q4"]},
    publish=[{"uri": "hf://org/support", **_SECRET}],
)
TUNED_MODEL: dict[str, Any] = {
    "storage": "s3://models/support-bot",
    "secretRef": {"name": "s3-keys"},
    "s3Endpoint": "http://minio.storage.svc:9000",
    "promotion": "Manual",
    "champion": 3,
    "retention": {"versions": 5, "age": "90d"},
}
SERVED: dict[str, Any] = {
    "base": {"uri": "hf://org/base", "secretRef": {"name": "hub-token"}},
    "models": [{"name": "support-bot", "versions": [2]}],
    "modelSelector": {"matchLabels": {"served": "here"}, "matchExpressions": [{"key": "tier", "operator": "In", "values": ["gold"]}]},
    "resources": {"requests": {"cpu": "4", "memory": "16Gi"}, "limits": {"cpu": "8", "memory": "16Gi"}, "sharedMemory": "2Gi"},
    "scheduling": {"queue": "shared", "tolerations": [{"key": "gpu", "operator": "Exists"}], "nodeSelector": {"pool": "gpu"}},
    "replicas": 2,
    "gpusPerReplica": 0,
    "rollout": {"steps": [10, 50], "interval": "5m", "minRequests": 500},
}
EXTERNAL: dict[str, Any] = {
    "engine": "external",
    "base": {"uri": "hf://org/model"},
    "external": {"service": "vllm", "port": 8000, "adaptersPath": "/adapters"},
}
SPECS: dict[str, list[dict[str, Any]]] = {
    "FineTuneJob": [
        MINIMAL,
        FULL,
        _EVERYTHING,
        merged(
            MINIMAL,
            tuning={"method": "partial", "partial": {"modules": ["mlp"]}},
            workspace={"persistentVolumeClaim": {"claimName": "shared"}},
        ),
        merged(MINIMAL, tuning={"method": "prompt", "virtualTokens": {"count": 8}}),
        merged(MINIMAL, tuning={"continueFrom": "oci://registry.example/team/bot:v1", "continueFromSecretRef": {"name": "pull"}}),
        merged(MINIMAL, tuning={"objective": "dpo", "preference": {"beta": 0.2}}),
        merged(MINIMAL, tuning={"objective": "grpo", "grpo": {"rewards": [{"type": "regex", "pattern": "a+"}]}}),
        merged(MINIMAL, tuning={"objective": "distill", "distillation": {"teacher": {"uri": "hf://org/teacher", **_SECRET}}}),
        merged(MINIMAL, tuning={"objective": "distill", "distillation": {"mode": "generate", "endpoint": _ENDPOINT}}),
    ],
    "FineTuneQueue": [QUEUE],
    "FineTunedModel": [TUNED_MODEL, {"storage": "pvc://models/support-bot"}],
    "FineTuneEndpoint": [SERVED, {"base": {"uri": "hf://org/model"}}, EXTERNAL],
}
"""Valid ones; together they have every block."""


def _reached(value: Any, path: Path) -> Any:
    for part in path:
        if part == "{}":
            value = next(iter(value.values()), None) if isinstance(value, dict) else None
        elif part == "[]":
            value = value[0] if isinstance(value, list) and value else None
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def with_value(kind: str, path: Path, value: Any) -> dict[str, Any]:
    """A valid spec but for the field at the path, which has this value. Raises StopIteration where no spec has its block."""
    spec = json.loads(json.dumps(next(s for s in SPECS[kind] if isinstance(_reached(s, path[:-1]), dict | list))))
    target = _reached(spec, path[:-1])
    if path[-1] == "[]":
        target[:1] = [value]
    elif path[-1] == "{}":
        target[next(iter(target), "key")] = value
    else:
        target[path[-1]] = value
    return spec


def placements(kind: str) -> list[Path]:
    """Every place of a spec that can hold a value."""
    return [path for path, _ in walk(schema(kind)["spec"]) if path]


def formatted(kind: str) -> list[Path]:
    """Every place of a spec where a string must look in some way."""
    found = walk(schema(kind)["spec"])
    return [path for path, node in found if node.get("type") != "object" and "x-kubernetes-validations" in node]
