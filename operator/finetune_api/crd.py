"""The CustomResourceDefinitions, and the policy of what may change, generated from the models: `python -m finetune_api.crd ROOT`.

pydantic's JSON Schema is turned into the structural subset that Kubernetes accepts; what has no equivalent
there raises instead of being dropped.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from . import GROUP, KIND, PLURAL, VERSION
from .base import APIModel
from .endpoint import ENDPOINT_KIND, ENDPOINT_PLURAL, FineTuneEndpointSpec, FineTuneEndpointStatus
from .queue import QUEUE_KIND, QUEUE_PLURAL, FineTuneQueueSpec, FineTuneQueueStatus
from .spec import FineTuneJobSpec
from .spec.transitions import FROZEN
from .status import FineTuneJobStatus
from .tuned_model import MODEL_KIND, MODEL_PLURAL, FineTunedModelSpec, FineTunedModelStatus

HEADER = "# Generated from operator/finetune_api by `make crds`. Do not edit.\n"
_DROPPED = {"title", "examples", "discriminator", "$defs", "propertyNames"}  # the model bounds keys: servers cannot
_ALLOWED = {
    "type", "format", "description", "default", "enum", "pattern", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems", "maxProperties", "minProperties", "items",
    "properties", "required", "additionalProperties", "nullable",
    "x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-map-type",
    "x-kubernetes-preserve-unknown-fields", "x-kubernetes-int-or-string",
}  # fmt: skip


def structural_schema(model: type[APIModel]) -> dict[str, Any]:
    """The structural OpenAPI v3 schema of a model. Raises TypeError on what Kubernetes cannot express."""
    schema = model.model_json_schema(by_alias=True)
    return _convert(schema, schema.get("$defs", {}), ())


def _convert(node: dict[str, Any], definitions: dict[str, Any], seen: tuple[str, ...]) -> dict[str, Any]:
    node = dict(node)
    if "$ref" in node:
        name = node.pop("$ref").rsplit("/", 1)[1]
        if name in seen:
            raise TypeError(f"{name} refers to itself: no structural schema can say that")
        # the field's own description wins over the one of its type
        return _convert({**definitions[name], **node}, definitions, (*seen, name))
    if "anyOf" in node:
        inner = [option for option in node.pop("anyOf") if option.get("type") != "null"]
        if len(inner) != 1:
            raise TypeError(f"a union of {len(inner)} types: use optional sibling blocks with an exactly-one rule")
        if node.get("default", ...) is None:
            del node["default"]
        return _convert({**inner[0], **node}, definitions, seen)
    if "const" in node:
        node["enum"] = [node.pop("const")]
    for bound in ("Minimum", "Maximum"):
        exclusive = f"exclusive{bound}"
        if isinstance(node.get(exclusive), int | float):
            node[bound.lower()] = node[exclusive]
            node[exclusive] = True
    if "properties" in node:
        required = set(node.get("required", []))
        node["properties"] = {
            name: _property(child, definitions, seen, optional=name not in required) for name, child in node["properties"].items()
        }
        if node.get("additionalProperties") is False:
            del node["additionalProperties"]
    elif isinstance(node.get("additionalProperties"), dict):
        node["additionalProperties"] = _convert(node["additionalProperties"], definitions, seen)
    elif node.get("type") == "object":
        node.pop("additionalProperties", None)
        node["x-kubernetes-preserve-unknown-fields"] = True
    if "items" in node:
        node.setdefault("x-kubernetes-list-type", "atomic")
        node["items"] = _convert(node["items"], definitions, seen)
    if node.get("default") == "":  # says nothing
        del node["default"]
    for key in _DROPPED & set(node):
        del node[key]
    if isinstance(node.get("description"), str):
        node["description"] = " ".join(node["description"].split())
    unknown = set(node) - _ALLOWED
    if unknown:
        raise TypeError(f"no structural equivalent for {sorted(unknown)} in {node}")
    return node


def _property(child: dict[str, Any], definitions: dict[str, Any], seen: tuple[str, ...], *, optional: bool) -> dict[str, Any]:
    nullable_default = "anyOf" in child
    converted = _convert(child, definitions, seen)
    if optional and not nullable_default and "properties" in converted and "default" not in converted:
        # an API server holds a default against its rules as it is written here, before it fills in those inside
        converted["default"] = {name: inner["default"] for name, inner in converted["properties"].items() if "default" in inner}
    return converted


def printer_columns() -> list[dict[str, Any]]:
    """Columns of `kubectl get`; priority 1 shows with `-o wide`."""

    def column(name: str, path: str, type_: str = "string", **more: Any) -> dict[str, Any]:
        return {"name": name, "type": type_, "jsonPath": path, **more}

    return [
        column("Phase", ".status.phase"),
        column("Progress", ".status.progress.percent", "integer", description="Percent of the training steps"),
        column("Loss", ".status.progress.loss", description="Training loss"),
        column("Queue", ".spec.scheduling.queue"),
        column("GPUs", ".status.totalGpus", "integer"),
        column("Restarts", ".status.attempt", "integer"),
        column("Age", ".metadata.creationTimestamp", "date"),
        column("Model", ".spec.model.uri", priority=1),
        column("Method", ".spec.tuning.method", priority=1),
        column("ETA", ".status.progress.eta", priority=1),
        column("Nodes", ".spec.distribution.nodes", "integer", priority=1),
    ]


def queue_columns() -> list[dict[str, Any]]:
    """Columns of `kubectl get finetunequeues`: who has the GPUs, and who waits."""

    def column(name: str, path: str, type_: str = "integer", **more: Any) -> dict[str, Any]:
        return {"name": name, "type": type_, "jsonPath": path, **more}

    return [
        column("Cohort", ".spec.cohort", "string"),
        column("Used", ".status.used", description="Units that its jobs and endpoints hold"),
        column("Quota", ".status.nominal", description="Units that belong to it"),
        column("Borrowed", ".status.borrowed"),
        column("Serving", ".status.serving", description="Of the units used, what endpoints hold"),
        column("Admitted", ".status.admitted", description="Jobs and endpoints that hold units"),
        column("Pending", ".status.pending", description="Jobs that wait, and endpoints that wait for replicas"),
        column("Oldest", ".status.oldestWaiting.since", "date", description="Since when the oldest of them has waited"),
        column("Active", ".status.conditions[?(@.type=='Active')].status", "string"),
        column("Share", ".status.share", "string", priority=1),
        column("Waiting", ".status.oldestWaiting.job", "string", priority=1),
        column("Age", ".metadata.creationTimestamp", "date"),
    ]


def crd() -> dict[str, Any]:
    """The CustomResourceDefinition of FineTuneJob."""
    text = "FineTuneJob turns a base model and a data set into a fine-tuned, evaluated and published model."
    spec = without(structural_schema(FineTuneJobSpec), "x-kubernetes-validations", beside="properties")  # the policy's
    return _definition(KIND, PLURAL, ["ftj"], "Namespaced", text, spec, FineTuneJobStatus, printer_columns(), ["all", "finetune"])


def policy() -> list[dict[str, Any]]:
    """What holds between fields of a FineTuneJob, and what of it may change: a ValidatingAdmissionPolicy and its binding (KEP-3488).

    Not as rules of the definition: those are evaluated at each write of a status, too, where no spec can change. As with those,
    what was stored before a rule came is not held against it while the spec stays as it is.
    """
    api, name = "admissionregistration.k8s.io/v1", f"{PLURAL}.{GROUP}"
    rule = {"apiGroups": [GROUP], "apiVersions": ["*"], "operations": ["CREATE", "UPDATE"], "resources": [PLURAL], "scope": "*"}
    # with defaults written out: what is one value to a server is then the same to whoever else applies it
    spec = {
        "failurePolicy": "Fail",
        "matchConstraints": {"matchPolicy": "Equivalent", "namespaceSelector": {}, "objectSelector": {}, "resourceRules": [rule]},
        "matchConditions": [{"name": "spec-is-new", "expression": "oldObject == null || object.spec != oldObject.spec"}],
        "validations": [*_rules(structural_schema(FineTuneJobSpec), "object.spec"), *(field.to_cel() for field in FROZEN)],
    }
    binding = {"policyName": name, "validationActions": ["Deny"]}
    return [
        {"apiVersion": api, "kind": "ValidatingAdmissionPolicy", "metadata": _metadata(name), "spec": spec},
        {"apiVersion": api, "kind": "ValidatingAdmissionPolicyBinding", "metadata": _metadata(name), "spec": binding},
    ]


def _rules(node: dict[str, Any], here: str, guard: str = "{}") -> Iterator[dict[str, str]]:
    """Rules that hold between fields, bound to where they are in an object. `guard`: what lets them hold where that is absent."""
    for rule in node.get("x-kubernetes-validations", []) if "properties" in node else []:
        yield {"expression": guard.format(re.sub(r"\bself\b", here, rule["rule"])), "message": rule["message"]}
    for name, child in node.get("properties", {}).items():
        inner = f"{here}.{name}"
        there = "default" in child or name in node.get("required", [])
        yield from _rules(child, inner, guard if there else guard.format(f"!has({inner}) || ({{}})"))
    if "items" in node:
        yield from _rules(node["items"], "item", guard.format(f"{here}.all(item, {{}})"))


def queue_crd() -> dict[str, Any]:
    """The CustomResourceDefinition of FineTuneQueue."""
    text = "FineTuneQueue says how many GPUs of which kind the jobs of some namespaces may use, and who goes first."
    spec = structural_schema(FineTuneQueueSpec)
    return _definition(QUEUE_KIND, QUEUE_PLURAL, ["ftq"], "Cluster", text, spec, FineTuneQueueStatus, queue_columns(), ["finetune"])


def model_columns() -> list[dict[str, Any]]:
    """Columns of `kubectl get finetunedmodels`: what is served under the name, and how good it is."""

    def column(name: str, path: str, type_: str = "string", **more: Any) -> dict[str, Any]:
        return {"name": name, "type": type_, "jsonPath": path, **more}

    return [
        column("Champion", ".status.champion", "integer", description="Version that is served under the model's name"),
        column("Versions", ".status.count", "integer", description="Versions that are kept"),
        column("Score", ".status.score", description="The champion's first metric, and its base's"),
        column("Served", ".status.served", description="Endpoints that serve it"),
        column("Latest", ".status.latest", "integer", priority=1),
        column("Promotion", ".spec.promotion", priority=1),
        column("Storage", ".spec.storage", priority=1),
        column("Age", ".metadata.creationTimestamp", "date"),
    ]


def endpoint_columns() -> list[dict[str, Any]]:
    """Columns of `kubectl get finetuneendpoints`: what answers, and whether it is what was evaluated."""

    def column(name: str, path: str, type_: str = "string", **more: Any) -> dict[str, Any]:
        return {"name": name, "type": type_, "jsonPath": path, **more}

    return [
        column("Ready", ".status.readyReplicas", "integer", description="Replicas that answer"),
        column("Replicas", ".spec.replicas", "integer"),
        column("Verified", ".status.modelsVerified", description="Models that every replica was found to serve as evaluated"),
        column("Base", ".spec.base.uri"),
        column("Engine", ".spec.engine", priority=1),
        column("Age", ".metadata.creationTimestamp", "date"),
    ]


def model_crd() -> dict[str, Any]:
    """The CustomResourceDefinition of FineTunedModel."""
    text = "FineTunedModel is a line of versions, of which one is the champion."
    spec = structural_schema(FineTunedModelSpec)
    return _definition(
        MODEL_KIND, MODEL_PLURAL, ["ftm"], "Namespaced", text, spec, FineTunedModelStatus, model_columns(), ["all", "finetune"]
    )


def endpoint_crd() -> dict[str, Any]:
    """The CustomResourceDefinition of FineTuneEndpoint."""
    text = "FineTuneEndpoint serves a base and tuned models, and says what each replica was found to answer as."
    spec, columns = structural_schema(FineTuneEndpointSpec), endpoint_columns()
    found = _definition(
        ENDPOINT_KIND, ENDPOINT_PLURAL, ["fte"], "Namespaced", text, spec, FineTuneEndpointStatus, columns, ["all", "finetune"]
    )
    found["spec"]["versions"][0]["subresources"]["scale"] = {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    }
    return found


def definitions() -> list[dict[str, Any]]:
    """All of them."""
    return [crd(), queue_crd(), model_crd(), endpoint_crd()]


def _definition(
    kind: str,
    plural: str,
    short: list[str],
    scope: str,
    description: str,
    spec: dict[str, Any],
    status: type[APIModel],
    columns: list[dict[str, Any]],
    categories: list[str],
) -> dict[str, Any]:
    schema = {
        "description": description,
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": "API version of this object."},
            "kind": {"type": "string", "description": "Kind of this object."},
            "metadata": {"type": "object"},
            "spec": spec,
            # the operator writes it in full: no defaults, and one owner, since servers would keep who wrote which of its fields,
            # more than half of what they store of a job, and read it at each write
            "status": {**without(structural_schema(status), "default"), "x-kubernetes-map-type": "atomic"},
        },
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": _metadata(f"{plural}.{GROUP}"),
        "spec": {
            "group": GROUP,
            "scope": scope,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": short,
                "categories": categories,
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": columns,
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }


def _metadata(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "labels": {"app.kubernetes.io/part-of": "finetune-operator"},
        "annotations": {"helm.sh/resource-policy": "keep"},  # uninstalling the chart never deletes jobs
    }


class _Dumper(yaml.SafeDumper):
    """Writes what stands twice twice: no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def render(*documents: dict[str, Any]) -> str:
    """The YAML text."""
    return HEADER + yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)


def without(node: Any, keyword: str, *, beside: str | None = None) -> Any:
    """A schema without a keyword: anywhere, or in those nodes that have another one beside it."""
    if isinstance(node, dict):
        drops = beside is None or beside in node
        return {key: without(value, keyword, beside=beside) for key, value in node.items() if not (drops and key == keyword)}
    return [without(item, keyword, beside=beside) for item in node] if isinstance(node, list) else node


def generated(root: Path) -> dict[Path, str]:
    """Every generated file below the root of the repository, with what it must hold."""
    texts = {
        f"{PLURAL}.yaml": render(crd(), *policy()),
        f"{QUEUE_PLURAL}.yaml": render(queue_crd()),
        f"{MODEL_PLURAL}.yaml": render(model_crd()),
        f"{ENDPOINT_PLURAL}.yaml": render(endpoint_crd()),
    }
    folders = (root / "crds", root / "charts" / "finetune-operator" / "files")
    return {folder / name: text for folder in folders for name, text in texts.items()}


def main() -> None:
    """Write all generated files below the folder given."""
    for path, text in generated(Path(sys.argv[1])).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
