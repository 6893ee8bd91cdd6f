"""All CustomResourceDefinitions, and the policy of what may change, on real API servers of the oldest and of the newest Kubernetes in support."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, config

from finetune_api import API_VERSION, GROUP, PLURAL, VERSION
from finetune_api.crd import crd, policy, structural_schema
from finetune_api.lenient import read_status
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.transitions import HOLDS
from finetune_api.validation import InvalidDocument
from tests.cluster import binaries
from tests.cluster.local import LocalCluster
from tests.cluster.shell import REPO
from tests.component.conftest import control_plane, until
from tests.factory import MINIMAL, merged
from tests.schemas import CRDS, PARSERS, SPECS, bad_defaults, formatted, model_accepts, placements, walk, with_value
from tests.unit.test_transitions import ALWAYS, EVALUATED, FREE, WHILE_HELD
from tests.unit.test_validation import BAD

KINDS = list(SPECS)
OWN_WORDS = {
    "unknown field": 'unknown field "spec.tunning"',
    "snake case": 'unknown field "spec.tuning.hyperparameters.learning_rate"',
    "wrong type": "spec.distribution.nodes in body must be of type integer",
    "number as a string": "spec.tuning.hyperparameters.learningRate in body must be of type number",
    "misspelt enum": 'spec.tuning.method: Unsupported value: "lorra": supported values: "full", "partial", "lora"',
    "negative": "spec.distribution.nodes in body should be greater than or equal to 1",
    "NaN": "invalid character 'N'",
    "infinity": "invalid character 'I'",
    "bool as a number": "spec.distribution.nodes in body must be of type integer",
    "metric twice": 'spec.evaluation.metrics[1]: Duplicate value: "loss"',
    "gguf type twice": 'spec.output.gguf[1]: Duplicate value: "F16"',
    "missing": "spec.model.uri: Required value",
    "secret of another namespace": 'unknown field "spec.model.secretRef.namespace"',
}
"""What an API server says where types and bounds, which are its own, speak before any rule; else its words are ours."""


class Server:
    """An API server with the definitions."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.connection = config.new_client_from_config(str(cluster.kubeconfig))
        self.custom = client.CustomObjectsApi(self.connection)

    def create(self, kind: str, spec: Any) -> dict[str, Any]:
        """As it would be stored. Raises ApiException."""
        body, more = document(kind, "probe", spec), {"dry_run": "All", "field_validation": "Strict"}
        defined = CRDS[kind]["spec"]
        plural = defined["names"]["plural"]
        if defined["scope"] == "Cluster":
            return dict(self.custom.create_cluster_custom_object(GROUP, VERSION, plural, body, **more))
        return dict(self.custom.create_namespaced_custom_object(GROUP, VERSION, "default", plural, body, **more))

    def refusal(self, kind: str, spec: Any) -> str:
        """Why it would not be stored; empty when it would."""
        try:
            self.create(kind, spec)
        except client.ApiException as failure:
            return str(json.loads(failure.body)["message"])
        return ""


def document(kind: str, name: str, spec: Any) -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}


@pytest.fixture(scope="module", params=[binaries.OLDEST, binaries.NEWEST])
def server(request: pytest.FixtureRequest, cluster: LocalCluster) -> Iterator[Server]:
    if cluster.kubernetes == request.param:
        yield Server(cluster)
        return
    with control_plane("other", request.param) as other:
        yield Server(other)


def test_both_are_established(server: Server) -> None:
    found = client.ApiextensionsV1Api(server.connection).list_custom_resource_definition().items
    conditions = {item.spec.names.kind: {c.type: c.status for c in item.status.conditions} for item in found}
    assert conditions == {kind: {"NamesAccepted": "True", "Established": "True"} for kind in KINDS}
    assert client.VersionApi(server.connection).get_code().git_version == binaries.version(server.cluster.kubernetes)


def test_defaults_are_held_against_their_rules_as_they_are_written(server: Server) -> None:
    """What the unit test finds in a definition is what the server refuses it for."""
    broken = crd()
    spec = structural_schema(FineTuneJobSpec)  # with the rules that the policy has in their place
    broken["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"] = spec
    for _, node in walk(spec):
        if isinstance(node.get("default"), dict):
            node["default"] = {}
    with pytest.raises(client.ApiException) as refused:
        client.ApiextensionsV1Api(server.connection).create_custom_resource_definition(broken, dry_run="All")
    assert refused.value.status == 422
    for path, _ in bad_defaults(spec):
        assert ".".join(f"properties[{part}]" for part in path.split(".")) in refused.value.body, path


def test_every_example_is_accepted(server: Server) -> None:
    texts = [path.read_text() for path in sorted((REPO / "examples").rglob("*.yaml"))]
    ours = [d for text in texts if "kind: FineTune" in text for d in yaml.safe_load_all(text) if d and d["kind"] in KINDS]
    assert {d["kind"] for d in ours} == set(KINDS)
    for example in ours:
        assert not server.refusal(example["kind"], example["spec"]), example["metadata"]


@pytest.mark.parametrize(("name", "change", "expected"), BAD, ids=[row[0] for row in BAD])
def test_a1_a2_refused_in_the_words_of_the_command_line(server: Server, name: str, change: dict[str, Any], expected: str) -> None:
    assert OWN_WORDS.get(name, expected) in server.refusal("FineTuneJob", merged(MINIMAL, **change))


@pytest.mark.parametrize("kind", KINDS)
def test_null_is_absent_to_server_and_models(server: Server, kind: str) -> None:
    for path in placements(kind):
        spec = with_value(kind, path, None)
        refusal = server.refusal(kind, spec)
        assert model_accepts(kind, spec) == (not refusal), (path, refusal)
        if not refusal:
            assert PARSERS[kind](server.create(kind, spec)["spec"]) == PARSERS[kind](spec), path


@pytest.mark.parametrize("kind", KINDS)
def test_a_string_that_looks_wrong_is_quoted_with_the_fix(server: Server, kind: str) -> None:
    """And never answered with a pattern."""
    for path in formatted(kind):
        for value in ("bad value!", "x/" * 11 + "\u00e9", "a\u202eb"):
            spec = with_value(kind, path, value)
            with pytest.raises(InvalidDocument) as refused:
                PARSERS[kind](spec)
            refusal = server.refusal(kind, spec)
            assert refused.value.errors[0].message in refusal, path
            assert not [part for part in ("a-z", "A-Z", "0-9") if part in refusal], refusal


@pytest.mark.parametrize("flags", [(), ("--server-side",)], ids=["client-side", "server-side"])
def test_what_is_applied_again_changes_nothing(server: Server, flags: tuple[str, ...]) -> None:
    """The same manifests, and what the server made of them."""

    def stored() -> list[dict[str, Any]]:
        kinds = ",".join(CRDS[kind]["spec"]["names"]["plural"] for kind in KINDS)
        return list(json.loads(server.cluster.kubectl("get", kinds, "-n", "default", "-o", "json"))["items"])

    def both(manifest: str) -> None:
        """Diff, then apply. `kubectl diff` fails when there is a difference."""
        server.cluster.kubectl("diff", *flags, "-f", "-", input=manifest)
        server.cluster.kubectl("apply", *flags, "-f", "-", input=manifest)

    def listed(items: list[dict[str, Any]]) -> str:
        return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})

    items = [document(kind, f"again-{index}", spec) for kind in KINDS for index, spec in enumerate(SPECS[kind])]
    manifest = listed(items)
    server.cluster.kubectl("apply", *flags, "-f", "-", input=manifest)
    try:
        first = stored()
        assert len(first) == len(items)
        both(manifest)
        assert stored() == first, "not even a resourceVersion"
        both(listed([document(item["kind"], item["metadata"]["name"], item["spec"]) for item in first]))
        assert [item["spec"] for item in stored()] == [item["spec"] for item in first]
        for item in first:
            original = next(i for i in items if (i["kind"], i["metadata"]["name"]) == (item["kind"], item["metadata"]["name"]))
            assert PARSERS[item["kind"]](item["spec"]) == PARSERS[item["kind"]](original["spec"])
    finally:
        server.cluster.kubectl("delete", "-f", "-", input=manifest)


@pytest.fixture
def stored(server: Server) -> Iterator[Callable[..., dict[str, Any]]]:
    """Writes a job, whole, with its status where one is given, and gives back what is stored. Raises ApiException."""
    where = (GROUP, VERSION, "default", PLURAL)

    def write(spec: dict[str, Any], status: dict[str, Any] | None = None) -> dict[str, Any]:
        body = document("FineTuneJob", "changing", spec)
        try:
            meta = server.custom.get_namespaced_custom_object(*where, "changing")["metadata"]
            body["metadata"]["resourceVersion"] = meta["resourceVersion"]
            found = dict(server.custom.replace_namespaced_custom_object(*where, "changing", body))
        except client.ApiException as failure:
            if failure.status != 404:
                raise
            found = dict(server.custom.create_namespaced_custom_object(*where, body))
        if status is not None:
            found = dict(server.custom.replace_namespaced_custom_object_status(*where, "changing", {**found, "status": status}))
        return found

    yield write
    with contextlib.suppress(client.ApiException):
        server.custom.delete_namespaced_custom_object(*where, "changing")


def holding(*types: str) -> dict[str, Any]:
    """A status in which these conditions are True."""
    rest = {"status": "True", "reason": "Test", "message": "", "lastTransitionTime": "2026-11-21T12:00:00Z"}
    return {"conditions": [{"type": type_, **rest} for type_ in types]}


def test_f24_what_may_change_is_said_by_the_policy(stored: Callable[..., dict[str, Any]]) -> None:
    """Each refusal names the field and what to do; what was applied before passes again, defaults or not."""

    def refusal(spec: dict[str, Any]) -> str:
        with pytest.raises(client.ApiException) as refused:
            stored(spec)
        assert refused.value.status == 422
        return str(json.loads(refused.value.body)["message"])

    first = stored(EVALUATED)
    for field, change in ALWAYS:
        told = refusal(merged(EVALUATED, **change))
        assert f"denied request: spec.{field} cannot change: undo the change, or create another job" in told
    stored(merged(EVALUATED, **dict(WHILE_HELD)["distribution"]))
    stored(EVALUATED, holding("DataReady"))
    for _, change in WHILE_HELD:
        stored(merged(EVALUATED, **change))
        stored(EVALUATED)
    for type_ in HOLDS:
        stored(EVALUATED, holding(type_))
        for field, change in WHILE_HELD:
            assert f"spec.{field} can change only while the job holds no GPUs" in refusal(merged(EVALUATED, **change))
        for change in FREE:
            stored(merged(EVALUATED, **change))
        stored(EVALUATED)
        assert stored(first["spec"])["spec"] == first["spec"]
    stored(EVALUATED, {})
    stored(merged(EVALUATED, **dict(WHILE_HELD)["resources"]))


def test_f33_objects_of_an_earlier_definition_stay_and_may_be_written(tmp_path: Path) -> None:
    """A status with numbers where text is now, and the definition renewed under it: its owner goes on, and so does the operator."""
    earlier = crd()
    progress = earlier["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]["progress"]["properties"]
    progress["loss"] = {"type": "number"}
    with control_plane("earlier", binaries.OLDEST, definitions=[]) as cluster:
        definition = tmp_path / "earlier.yaml"
        definition.write_text(json.dumps(earlier))
        cluster.define(definition)
        server = Server(cluster)
        where = (GROUP, VERSION, "default", PLURAL)
        made = server.custom.create_namespaced_custom_object(*where, document("FineTuneJob", "old", MINIMAL))
        status = {**holding("Admitted"), "phase": "Training", "progress": {"loss": 1.5}}
        server.custom.replace_namespaced_custom_object_status(*where, "old", {**made, "status": status})
        cluster.kubectl("apply", "--server-side", "-f", "-", input=yaml.safe_dump_all([crd(), *policy()]))

        def message(spec: dict[str, Any]) -> str:
            try:
                server.custom.patch_namespaced_custom_object(*where, "old", {"spec": spec})
            except client.ApiException as failure:
                return str(json.loads(failure.body)["message"])
            return ""

        tries = itertools.count()  # one that came before it was taken, and is no change any more
        until("the policy is there", lambda: "cannot change" in message({"model": {"uri": f"pvc://models/another-{next(tries)}"}}))
        assert message({"runPolicy": {"maxRestarts": 7}}) == "", "what it does not touch is not held against it"
        found = server.custom.get_namespaced_custom_object(*where, "old")
        read = read_status(found["status"])
        assert read.progress is not None and read.progress.loss == 1.5 and read.is_true("Admitted")
        written = server.custom.replace_namespaced_custom_object_status(*where, "old", {**found, "status": read.to_wire()})
        assert written["status"]["progress"]["loss"] == "1.5"
