"""The chart: lint-clean, a schema for its values, valid manifests for old and new servers, restricted pods."""

from __future__ import annotations

from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml

from tests.cluster.helm import CHART

VALUES: list[dict[str, Any]] = [
    {},
    {"watchNamespace": "team-a"},
    {
        "crds": {"install": False},
        "image": {"repository": "r/o", "tag": "sha256:" + "0" * 64},
        "priorityClassName": "system-cluster-critical",
    },
    {
        "queueing": {"autoscaled": True},
        "settings": {"workers": 4, "apiQps": 20.5, "snapshotSeconds": 1, "progressUrl": "none", "backoffBaseSeconds": 0.5},
        "trainer": {"image": {"repository": "r/t", "tag": "9"}, "allowCPU": True, "imagePullSecrets": ["a", "b"]},
        "imagePullSecrets": [{"name": "x"}],
        "nodeSelector": {"a": "b"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "podAnnotations": {"a": "b"},
    },
]


def render(values: dict[str, Any]) -> list[dict[str, Any]]:
    with helm.Chart.load(str(CHART)) as chart:
        chart.validate_schema(chart.merge_values(values))
        rendered = chart.render(values, name="finetune-operator", namespace="finetune-system", is_install=True)
    texts = [text for path, text in rendered.items() if path.endswith(".yaml")]
    return [d for text in texts for d in yaml.safe_load_all(text) if d]


def test_lint_is_clean() -> None:
    report = helm.lint(str(CHART), strict=True)
    assert not report["errors"] and all(m["severity"] <= 1 for m in report["messages"]), report


@pytest.mark.parametrize("values", VALUES, ids=range(len(VALUES)))
def test_rendered_manifests_are_valid(values: dict[str, Any]) -> None:
    found = render(values)
    kinds = [d["kind"] for d in found]
    assert kinds.count("Deployment") == 1
    assert ("CustomResourceDefinition" in kinds) == (values.get("crds", {}).get("install", True))
    for version in ("1.25", "1.37"):
        for document in found:
            kubernetes_validate.validate(document, version, strict=True)


def test_the_deployment_is_restricted_and_gets_its_settings() -> None:
    deployment = next(d for d in render(VALUES[3]) if d["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    container = pod["containers"][0]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    env = {e["name"]: e["value"] for e in container["env"]}
    from finetune_operator.settings import from_environment

    settings = from_environment(env)
    assert (settings.workers, settings.backoff_base_seconds, settings.trainer_image) == (4, 0.5, "r/t:9")
    assert settings.allow_cpu and settings.image_pull_secrets == ("a", "b") and settings.endpoint == ""
    from_environment(
        {
            e["name"]: e["value"]
            for e in next(d for d in render({}) if d["kind"] == "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"]
        }
    )


def test_one_namespace_needs_no_cluster_wide_rights_on_objects() -> None:
    found = render({"watchNamespace": "team-a"})
    bound = {d["roleRef"]["name"] for d in found if d["kind"] == "ClusterRoleBinding"}
    wide = [r for d in found if d["kind"] == "ClusterRole" and d["metadata"]["name"] in bound for r in d["rules"]]
    assert [(r["resources"], r["verbs"]) for r in wide] == [(["tokenreviews"], ["create"]), (["nodes"], ["get"])]


def test_rights_are_named_one_by_one() -> None:
    for document in render({}):
        for rule in document.get("rules", []):
            assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
            if "secrets" in rule["resources"]:
                assert rule["resourceNames"] == ["finetune-operator-tls"]


def test_new_servers_get_the_schema_with_cel() -> None:
    """Old ones get the other file; the end-to-end tests install it on one."""
    crds = [d for d in render({}) if d["kind"] == "CustomResourceDefinition"]
    assert len(crds) == 2 and all("x-kubernetes-validations" in yaml.safe_dump(crd) for crd in crds)


@pytest.mark.parametrize(
    "values",
    [{"imag": {}}, {"image": {"repository": ""}}, {"settings": {"worker": 3}}, {"logLevel": "LOUD"}, {"trainer": {"allowCPU": "yes"}}],
)
def test_misspelt_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmError):
        render(values)
