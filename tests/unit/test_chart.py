"""The chart: lint-clean, a schema for its values, valid manifests for the oldest and the newest servers, restricted pods."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import helm_python as helm
import kubernetes_validate
import pytest
import yaml
from prometheus_client import REGISTRY

from finetune_gateway import metrics as gateway_metrics
from finetune_gateway.settings import from_environment as gateway_settings
from finetune_gateway.tuning.models import read_map
from finetune_operator import metrics
from finetune_operator.cluster.inventory import InventoryWatch
from finetune_operator.cluster.resources import plural_of
from finetune_operator.settings import Settings
from tests.cluster.helm import CHART
from tests.cluster.helm import rendered as render

VALUES: list[dict[str, Any]] = [
    {},
    {"watchNamespaces": ["team-a", "team-b"]},
    {
        "crds": {"install": False},
        "image": {"repository": "r/o", "tag": "sha256:" + "0" * 64},
        "priorityClassName": "system-cluster-critical",
    },
    {"webhook": {"certManager": True}, "queueing": {"backend": "kueue"}},
    {"webhook": {"enabled": False}, "queueing": {"backend": "volcano"}, "replicas": 2},
    {
        "replicas": 2,
        "tracing": {"endpoint": "http://collector:4318/v1/traces"},
        "metrics": {
            "labels": {"release": "prometheus"},
            "serviceMonitor": {"enabled": True},
            "rules": {"enabled": True},
            "dashboard": {"enabled": True},
        },
        "networkPolicy": {
            "enabled": True,
            "egress": [{"ports": [{"port": 4318, "protocol": "TCP"}]}],
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}],
        },
    },
    {"watchNamespaces": ["team-a"], "rbac": {"cluster": False}, "webhook": {"certManager": True, "failurePolicy": "Ignore"}},
    {
        "serving": {
            "image": {"repository": "r/vllm", "tag": "1"},
            "args": ["--enforce-eager", "--seed=1,2"],
            "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
        },
        "queueing": {"autoscaled": True},
        "settings": {"workers": 4, "apiQps": 20.5, "snapshotSeconds": 1, "progressUrl": "none", "backoffBaseSeconds": 0.5},
        "trainer": {
            "image": {"repository": "r/t", "tag": "9"},
            "allowCPU": True,
            "imagePullSecrets": ["a", "b"],
            "hubEndpoint": "https://hub.example.com",
            "s3Endpoint": "http://minio.storage:9000",
            "caBundle": {"configMap": "company", "key": "bundle.pem"},
            "proxy": {"https": "http://proxy:3128", "noProxy": ".example.com"},
        },
        "imagePullSecrets": [{"name": "x"}],
        "nodeSelector": {"a": "b"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "podAnnotations": {"a": "b"},
    },
    {"gateway": {"enabled": True}, "metrics": {"serviceMonitor": {"enabled": True}}},
    {
        "watchNamespaces": ["team-a", "team-b"],
        "gateway": {
            "enabled": True,
            "replicas": 3,
            "autoscaling": {"enabled": True},
            "networkPolicy": {"from": [{"podSelector": {}}]},
            "httpRoute": {"parentRefs": [{"name": "public"}], "hostnames": ["models.example.com"]},
        },
        "networkPolicy": {"metricsFrom": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}]},
    },
    {"gateway": {"enabled": True, "replicas": 1, "database": {"kind": "sqlite", "claim": {"storageClassName": "fast"}}}},
    {"gateway": {"enabled": True, "database": {"kind": "postgresql", "urlSecret": {"name": "db"}, "port": 6432}}},
]
GATEWAY = {"gateway": {"enabled": True}}
TUNING: dict[str, Any] = {
    "enabled": True,
    "models": {
        "gpt-4o-mini": {
            "spec": {"model": {"uri": "hf://org/base"}, "tuning": {"hyperparameters": {"learningRate": 1e-5}}},
            "maxEpochs": 5,
            "maxRows": 50_000_000,
        }
    },
    "storage": {"uri": "s3://files/openai", "endpoint": "http://minio.storage:9000", "secret": {"name": "bucket"}, "port": 9000},
}
VALUES.append({"gateway": {"enabled": True, "replicas": 1, "database": {"kind": "sqlite"}, "fineTuning": TUNING}})
VALUES.append({"watchNamespaces": ["team-a"], **VALUES[-1]})


def test_services_set_nobody_s_environment() -> None:
    """A Service finetune-gateway would set FINETUNE_GATEWAY_PORT in every pod of its namespace that does not say otherwise."""
    pods = [d["spec"]["template"]["spec"] for d in render(GATEWAY) if d["kind"] in ("Deployment", "Job")]
    assert len(pods) == 3 and all(pod["enableServiceLinks"] is False for pod in pods)


def test_lint_is_clean() -> None:
    report = helm.lint(str(CHART), strict=True)
    assert not report["errors"] and all(m["severity"] <= 1 for m in report["messages"]), report


@pytest.mark.parametrize("values", VALUES, ids=range(len(VALUES)))
def test_rendered_manifests_are_valid(values: dict[str, Any]) -> None:
    found = render(values)
    kinds = [d["kind"] for d in found]
    assert kinds.count("Deployment") == 1 + values.get("gateway", {}).get("enabled", False)
    assert ("CustomResourceDefinition" in kinds) == (values.get("crds", {}).get("install", True))
    for document in found:
        if not document["apiVersion"].startswith(("cert-manager.io/", "monitoring.coreos.com/")):
            for version in ("1.35", "1.37"):
                kubernetes_validate.validate(document, version, strict=True)


def test_the_deployment_is_restricted_and_gets_its_settings() -> None:
    deployment = next(d for d in render(VALUES[7]) if d["kind"] == "Deployment")
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
    assert (settings.hub_endpoint, settings.s3_endpoint) == ("https://hub.example.com", "http://minio.storage:9000")
    assert (settings.http_proxy, settings.https_proxy, settings.no_proxy) == ("", "http://proxy:3128", ".example.com")
    mount = next(m for m in container["volumeMounts"] if m["name"] == "authorities")
    volume = next(v for v in pod["volumes"] if v["name"] == "authorities")["configMap"]
    assert volume == {"name": "company", "items": [{"key": "bundle.pem", "path": "bundle.pem"}]}
    assert (settings.serving_image, settings.serving_args) == ("r/vllm:1", ("--enforce-eager", "--seed=1,2"))
    assert (settings.serving_env, settings.serving_gateways) == (("VLLM_CPU_KVCACHE_SPACE=1",), "")
    assert settings.authorities_file == f"{mount['mountPath']}/bundle.pem"
    from_environment(
        {
            e["name"]: e["value"]
            for e in next(d for d in render({}) if d["kind"] == "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"]
        }
    )


def _of_the_gateway(values: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(d["kind"], d["metadata"]["name"]): d for d in render(values) if d["metadata"]["name"].startswith("finetune-gateway")}


def test_the_gateway_is_restricted_and_knows_its_limits() -> None:
    """Off unless asked for; its pods are selected by no Service or policy of the operator's."""
    assert not _of_the_gateway({})
    found = _of_the_gateway({"gateway": {"enabled": True, "limits": {"bodyBytes": 20_000_000}}})
    template = found["Deployment", "finetune-gateway"]["spec"]["template"]
    pod, (container,) = template["spec"], template["spec"]["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True and container["securityContext"]["capabilities"] == {
        "drop": ["ALL"]
    }
    env = {e["name"]: e["value"] for e in container["env"]}
    settings = gateway_settings(env)
    assert (settings.replicas, settings.body_bytes, settings.namespace) == (2, 20_000_000, "finetune-system")
    assert pod["terminationGracePeriodSeconds"] > settings.leave_seconds + settings.drain_seconds
    known = {f"FINETUNE_GATEWAY_{name.upper()}" for name in vars(settings)}
    assert {name for name in env if name.startswith("FINETUNE_GATEWAY_")} <= known
    for document in render(GATEWAY):
        selector = document.get("spec", {}).get("selector") or document.get("spec", {}).get("podSelector")
        if document["kind"] in ("Service", "NetworkPolicy", "PodDisruptionBudget") and "gateway" not in document["metadata"]["name"]:
            assert not selector.items() <= template["metadata"]["labels"].items()
    rights = {d["metadata"]["name"]: d["rules"] for (kind, _), d in found.items() if kind in ("Role", "ClusterRole")}
    assert {name: [(rule["resources"], rule["verbs"]) for rule in rules] for name, rules in rights.items()} == {
        "finetune-gateway": [(["secrets"], ["list", "watch"])],
        "finetune-gateway-endpoints": [(["finetuneendpoints"], ["list", "watch"])],
        "finetune-gateway-reviews": [(["tokenreviews"], ["create"]), (["subjectaccessreviews"], ["create"])],
        "finetune-gateway-use": [(["finetuneendpoints"], ["use"])],
    }


def test_the_gateways_store_is_a_claim_or_a_url_in_a_secret() -> None:
    """The Secret's value is in no manifest; its port is let out. A file has one gateway, and two are refused."""

    def rendered_of(database: dict[str, Any], replicas: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        found = _of_the_gateway({"gateway": {"enabled": True, "replicas": replicas, "database": database}})
        deployment = found["Deployment", "finetune-gateway"]["spec"]
        env = {e["name"]: e for e in deployment["template"]["spec"]["containers"][0]["env"]}
        return found, deployment, env

    assert "FINETUNE_GATEWAY_DATABASE" not in rendered_of({}, 2)[2]
    found, deployment, env = rendered_of({"kind": "sqlite", "usageDays": 7}, 1)
    (volume,), (mount,) = (deployment["template"]["spec"]["volumes"], deployment["template"]["spec"]["containers"][0]["volumeMounts"])
    settings = gateway_settings({name: env[name]["value"] for name in ("FINETUNE_GATEWAY_DATABASE", "FINETUNE_GATEWAY_USAGE_DAYS")})
    assert Path(settings.database.removeprefix("sqlite:///")).parent == Path(mount["mountPath"]) and settings.usage_days == 7
    assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in found
    assert deployment["strategy"]["type"] == "Recreate" and deployment["template"]["spec"]["securityContext"]["fsGroup"] == 1000
    found, deployment, env = rendered_of({"kind": "postgresql", "urlSecret": {"name": "db"}, "port": 6432}, 3)
    assert env["FINETUNE_GATEWAY_DATABASE"]["valueFrom"] == {"secretKeyRef": {"name": "db", "key": "url"}}
    assert "volumes" not in deployment["template"]["spec"] and deployment["strategy"]["type"] == "RollingUpdate"
    out = [port["port"] for rule in found["NetworkPolicy", "finetune-gateway"]["spec"]["egress"] for port in rule["ports"]]
    assert 6432 in out
    for database, replicas, why in (
        ({"kind": "sqlite"}, 2, "gateway.replicas=1"),
        ({"kind": "postgresql"}, 2, "urlSecret.name is missing"),
    ):
        with pytest.raises(Exception, match=why):
            rendered_of(database, replicas)


def test_fine_tuning_is_off_unless_asked_for_and_may_act_as_one_account() -> None:
    """Nothing of it is there by default; the map is read as it was written; to act as anybody is another switch."""

    def rendered_of(**more: Any) -> dict[tuple[str, str], dict[str, Any]]:
        values = {"replicas": 1, "database": {"kind": "sqlite"}, **more}
        return _of_the_gateway({"gateway": {"enabled": True, **values}})

    def impersonated(found: dict[tuple[str, str], dict[str, Any]]) -> list[tuple[str, Any, Any]]:
        rules = [(name, rule) for (_, name), document in found.items() for rule in document.get("rules") or ()]
        return [(name, rule["resources"], rule.get("resourceNames")) for name, rule in rules if "impersonate" in rule["verbs"]]

    plain, found = rendered_of(), rendered_of(fineTuning=TUNING)
    assert ("ConfigMap", "finetune-gateway-models") not in plain and impersonated(plain) == []
    assert impersonated(found) == [("finetune-gateway-endpoints", ["serviceaccounts"], ["finetune-keys"])]
    everybody = impersonated(rendered_of(fineTuning={**TUNING, "impersonateUsers": True}))
    assert ("finetune-gateway-reviews", ["users", "groups", "serviceaccounts"], None) in everybody
    container = found["Deployment", "finetune-gateway"]["spec"]["template"]["spec"]["containers"][0]
    env = {e["name"]: e.get("value", "") for e in container["env"]}
    settings = gateway_settings(env)
    assert (settings.fine_tuning_storage, settings.fine_tuning_file_bytes) == ("s3://files/openai", 512 * 2**20)
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert settings.fine_tuning_models == f"{mounts['models']}/models.json"
    models = read_map(found["ConfigMap", "finetune-gateway-models"]["data"]["models.json"])
    assert (models.find("gpt-4o-mini").max_epochs, models.find("gpt-4o-mini").max_rows) == (5, 50_000_000)
    assert models.defaults["gpt-4o-mini"].tuning.hyperparameters.learning_rate == 1e-5
    assert 9000 in [port["port"] for rule in found["NetworkPolicy", "finetune-gateway"]["spec"]["egress"] for port in rule["ports"]]
    for more, why in (
        ({"database": {"kind": "none"}, "fineTuning": TUNING}, "need a database"),
        ({"fineTuning": {**TUNING, "models": {}}}, "set gateway.fineTuning.models"),
        ({"fineTuning": {**TUNING, "storage": {}}}, "s3://BUCKET/PREFIX"),
    ):
        with pytest.raises(Exception, match=why):
            rendered_of(**more)


def test_an_http_route_is_made_where_gateway_api_is(tmp_path: Path) -> None:
    """Helm's library has no servers' kinds of its own to offer: a copy of the chart asks for one that every server has."""
    values = {"gateway": {"enabled": True, "httpRoute": {"parentRefs": [{"name": "public"}]}}}
    assert ("HTTPRoute", "finetune-gateway") not in _of_the_gateway(values)
    template = shutil.copytree(CHART, tmp_path / "chart") / "templates" / "gateway.yaml"
    template.write_text(template.read_text().replace('Has "gateway.networking.k8s.io/v1/HTTPRoute"', 'Has "v1"'))
    (route,) = [d for d in render(values, tmp_path / "chart") if d["kind"] == "HTTPRoute"]
    assert route["spec"]["rules"][0]["backendRefs"] == [{"name": "finetune-gateway", "port": 80}]


def test_one_namespace_needs_no_cluster_wide_rights_on_objects() -> None:
    found = render({"watchNamespaces": ["team-a", "team-b"]})
    bound = {d["roleRef"]["name"] for d in found if d["kind"] == "ClusterRoleBinding"}
    wide = [r for d in found if d["kind"] == "ClusterRole" and d["metadata"]["name"] in bound for r in d["rules"]]
    look = ["get", "list", "watch"]
    assert [(r["resources"], r["verbs"]) for r in wide] == [
        (["tokenreviews"], ["create"]),
        (["nodes"], look),
        (["namespaces"], look),
        (["priorityclasses"], look),
        (["finetunequeues"], look),
        (["finetunequeues/status"], ["update"]),
    ]


@pytest.mark.parametrize("values", [{}, {"watchNamespaces": ["team-a"]}], ids=["everywhere", "some namespaces"])
def test_what_the_operator_asks_for_is_what_the_chart_grants(values: dict[str, Any]) -> None:
    bound = {d["roleRef"]["name"] for d in render(values) if d["kind"] == "ClusterRoleBinding"}
    rules = [r for d in render(values) if d["kind"] == "ClusterRole" and d["metadata"]["name"] in bound for r in d["rules"]]
    granted = {
        (verb, f"{plural}.{group}".rstrip("."))
        for r in rules
        for group in r["apiGroups"]
        for plural in r["resources"]
        for verb in r["verbs"]
    }
    watch = InventoryWatch(Mock(), Settings(watch_namespaces=tuple(values.get("watchNamespaces", ()))))
    watched = {plural_of(r.kind) for r in watch.reflectors if r.kind != "Pod" or not values}  # of some namespaces, by Roles
    assert {(verb, plural) for plural in watched for verb in ("list", "watch")} <= granted


def test_who_may_edit_a_namespace_may_edit_and_scale_everything_of_ours_in_it() -> None:
    (role,) = [d for d in render({}) if d["kind"] == "ClusterRole" and d["metadata"]["name"].endswith("-edit")]
    assert [r["resources"] for r in role["rules"]] == [
        ["finetunejobs", "finetunedmodels", "finetuneendpoints"],
        ["finetuneendpoints/scale"],
    ]


def test_the_hook_that_stops_the_operator_runs_before_it_is_uninstalled() -> None:
    [job] = [d for d in render({"watchNamespaces": ["team-a"]}) if d["kind"] == "Job"]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-delete"
    pod = job["spec"]["template"]["spec"]
    env = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    assert pod["containers"][0]["args"] == ["leave"] and env["FINETUNE_WATCH_NAMESPACES"] == "team-a"
    rules = [r for d in render({}) if d["kind"] == "Role" for r in d["rules"] if r["resources"] == ["deployments"]]
    assert [(r["resourceNames"], r["verbs"]) for r in rules] == [([env["FINETUNE_SERVICE_NAME"]], ["patch"])]


@pytest.mark.parametrize(("values", "kind"), [({}, "ClusterRole"), ({"watchNamespaces": ["team-a"]}, "Role")])
def test_where_replicas_of_others_are_is_seen_by_their_service_alone(values: dict[str, Any], kind: str) -> None:
    rules = [r for d in render(values) if (d["kind"], d["metadata"]["name"]) == (kind, "finetune-operator") for r in d["rules"]]
    slices = [r["verbs"] for r in rules if "endpointslices" in r["resources"]]
    assert slices == [["list"]] and ["get"] in [r["verbs"] for r in rules if r["resources"] == ["services"]]


def test_rights_are_named_one_by_one() -> None:
    for document in render(GATEWAY):
        for rule in document.get("rules") or [] if "Role" in document["kind"] else []:
            assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
            if "secrets" in rule["resources"] and rule["verbs"] != ["create"]:  # of tenants' it can read none
                allowed = {"finetune-gateway": ["finetune-gateway-keys"]}
                usual = (["finetune-operator-tls"], ["finetune-operator-seal"], ["finetune-operator-serving"])
                assert rule["resourceNames"] in (
                    [allowed[document["metadata"]["name"]]] if document["metadata"]["name"] in allowed else usual
                )


@pytest.mark.parametrize("backend", ["builtin", "kueue", "volcano"])
def test_another_schedulers_objects_are_touched_only_where_it_decides(backend: str) -> None:
    rules = [rule for document in render({"queueing": {"backend": backend}}) for rule in document.get("rules") or []]
    found = {group: rule["verbs"] for rule in rules for group in rule["apiGroups"] if group in ("kueue.x-k8s.io", "scheduling.volcano.sh")}
    assert (
        found
        == {
            "builtin": {},
            "kueue": {"kueue.x-k8s.io": ["get", "list", "create", "patch", "delete"]},
            "volcano": {"scheduling.volcano.sh": ["get", "create", "patch"]},
        }[backend]
    )


def _name(document: dict[str, Any]) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def test_the_chart_brings_the_definitions() -> None:
    kinds = ("CustomResourceDefinition", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
    found = [d for d in render({}) if d["kind"] in kinds]
    written = [d for path in (CHART.parent.parent / "crds").glob("*.yaml") for d in yaml.safe_load_all(path.read_text())]
    assert sorted(found, key=_name) == sorted(written, key=_name)


@pytest.mark.parametrize(
    "values",
    [{"imag": {}}, {"image": {"repository": ""}}, {"settings": {"worker": 3}}, {"logLevel": "LOUD"}, {"trainer": {"allowCPU": "yes"}}],
)
def test_misspelt_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmError):
        render(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"watchNamespaces": ["Team_A"]}, 'watchNamespaces: "Team_A" is not a namespace, for example team-a'),
        ({"trainer": {"remoteCodeNamespaces": ["*", "a b"]}}, 'trainer.remoteCodeNamespaces: "a b" is not a namespace'),
        ({"trainer": {"allowedHosts": ["http://minio"]}}, 'trainer.allowedHosts: "http://minio" is not a host'),
        ({"metrics": {"serviceMonitor": {"interval": "often"}}}, 'metrics.serviceMonitor.interval: "often" is not a duration'),
        ({"tracing": {"endpoint": "collector:4318"}}, 'tracing.endpoint: "collector:4318" is not a URL'),
    ],
)
def test_values_that_look_wrong_are_quoted_with_the_fix(values: dict[str, Any], message: str) -> None:
    with pytest.raises(helm.HelmError) as refused:
        render(values)
    assert message in str(refused.value) and "[a-z0-9]" not in str(refused.value)
    assert "pattern" not in (CHART / "values.schema.json").read_text(), "Helm's word on a pattern is the pattern"


@pytest.mark.parametrize(("value", "text"), [(2, "2"), (0.5, "0.5"), (17_179_869_184, "17179869184"), ("16Gi", "16Gi")])
def test_quantities_may_be_numbers(value: Any, text: str) -> None:
    (deployment,) = [d for d in render({"trainer": {"stageResources": {"memory": value}}}) if d["kind"] == "Deployment"]
    env = {e["name"]: e["value"] for e in deployment["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["FINETUNE_STAGE_MEMORY"] == text


def test_a19_no_webhook_can_hold_up_a_deletion_or_another_kind() -> None:
    found = [d for d in render({}) if d["kind"].endswith("WebhookConfiguration")]
    assert len(found) == 2
    for configuration in found:
        for webhook in configuration["webhooks"]:
            (rule,) = webhook["rules"]
            assert rule["apiGroups"] == ["finetune.dev"] and set(rule["resources"]) <= {"finetunejobs", "finetunequeues"}
            assert webhook["sideEffects"] == "None", "dry runs work"
            if rule["operations"] == ["UPDATE"]:  # the garbage collector takes finalizers away by updates
                assert webhook["matchConditions"]
            else:
                assert rule["operations"] == ["CREATE"]
            assert webhook["failurePolicy"] == "Fail"


@pytest.mark.parametrize("more", [{"rbac": {"queueing": False}}, {"queueing": {"backend": "none"}}, {"queueing": {"backend": "kueue"}}])
def test_one_namespace_needs_no_right_in_the_cluster_beyond_reviews_and_nodes(more: dict[str, Any]) -> None:
    """Where an administrator takes away what queues need, or they are not asked."""
    found = render({"watchNamespaces": ["team-a", "team-b"], **more})
    assert not [d for d in found if d["kind"].endswith("WebhookConfiguration")]
    (role,) = [d for d in found if d["kind"] == "ClusterRole" and d["metadata"]["name"].endswith("-cluster")]
    assert [(r["resources"], r["verbs"]) for r in role["rules"]] == [(["tokenreviews"], ["create"]), (["nodes"], ["get"])]


def _exported() -> set[str]:
    """Names of all series that the operator and the gateway export."""
    found = set()
    for family in (*REGISTRY.collect(), *gateway_metrics.REGISTRY.collect()):
        names = [family.name]
        if family.type == "counter":
            names = [f"{family.name}_total"]
        if family.type == "histogram":
            names = [f"{family.name}_{part}" for part in ("bucket", "count", "sum")]
        found.update(name for name in names if name.startswith("finetune_"))
    return found


def test_alerts_and_dashboard_ask_for_metrics_that_exist() -> None:
    alerts = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    dashboard = json.loads((CHART / "files" / "dashboard.json").read_text())
    asked = [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    asked += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = {name for expr in asked for name in re.findall(r"\bfinetune_[a-z_]+", expr)}
    assert used <= _exported(), used - _exported()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)) and all(panel["datasource"]["uid"] == "${datasource}" for panel in dashboard["panels"])


def test_what_alerts_on_absence_is_there_while_an_operator_acts_on_an_empty_cluster() -> None:
    alerts = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    asked = [found for group in alerts["groups"] for rule in group["rules"] for found in re.findall(r"absent\((.*?)\)", rule["expr"])]
    assert asked == ["finetune_leader == 1"]

    def shown() -> set[str]:
        return {f"{s.name} == {s.value:.0f}" for family in REGISTRY.collect() for s in family.samples}

    metrics.export(acts=True, phases={})
    assert set(asked) <= shown()
    metrics.export(acts=False, phases={"Training": 3})
    assert not set(asked) & shown(), "nobody acts"


def test_every_alert_has_a_runbook() -> None:
    alerts = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    runbooks = (CHART.parent.parent / "docs" / "runbooks.md").read_text()
    for rule in (rule for group in alerts["groups"] for rule in group["rules"]):
        assert f"## {rule['alert']}\n" in runbooks
        assert rule["annotations"]["runbook"].endswith(f"runbooks.md#{rule['alert'].lower()}")
        assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_some_namespaces_need_no_cluster_role_at_all() -> None:
    found = render({"watchNamespaces": ["team-a", "team-b"], "rbac": {"cluster": False}})
    assert not [d for d in found if d["kind"] in ("ClusterRole", "ClusterRoleBinding")]
    roles = {d["metadata"]["namespace"] for d in found if d["kind"] == "Role"}
    assert roles == {"team-a", "team-b", "finetune-system"}
    deployment = next(d for d in found if d["kind"] == "Deployment")
    env = {e["name"]: e["value"] for e in deployment["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["FINETUNE_WATCH_NAMESPACES"] == "team-a,team-b" and env["FINETUNE_PROGRESS_URL"] == "none"


def test_kube_state_metrics_reads_fields_that_exist() -> None:
    """Every path of the configuration leads to a field of the CustomResourceDefinition."""
    repo = CHART.parent.parent
    wanted = yaml.safe_load((repo / "examples" / "monitoring" / "kube-state-metrics.yaml").read_text())
    definitions = [
        d
        for path in (repo / "crds").glob("*.yaml")
        for d in yaml.safe_load_all(path.read_text())
        if d["kind"] == "CustomResourceDefinition"
    ]
    schemas = {d["spec"]["names"]["kind"]: d["spec"]["versions"][0]["schema"]["openAPIV3Schema"] for d in definitions}
    for resource in wanted["spec"]["resources"]:
        for metric in resource["metrics"]:
            (each,) = [value for value in metric["each"].values() if isinstance(value, dict)]
            node = schemas[resource["groupVersionKind"]["kind"]]
            for part in each["path"]:
                node = node["properties"][part]
            if "list" in each:
                assert sorted(each["list"]) == sorted(node["enum"])
            inner = node.get("items", {}).get("properties", {})
            assert all(path[0] in inner for path in each.get("labelsFromPath", {}).values())
