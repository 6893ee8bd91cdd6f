"""The CRD is generated, fresh, structural, and accepts and refuses what the pydantic models do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_api.base import APIModel
from finetune_api.crd import generated, policy, structural_schema
from finetune_api.queue import FineTuneQueueSpec
from finetune_api.reference import reference
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus, Progress
from finetune_api.uris import MODEL
from finetune_api.validation import InvalidDocument
from tests.factory import MINIMAL, merged
from tests.schemas import (
    CRDS,
    PARSERS,
    RULED,
    SPECS,
    bad_defaults,
    filled,
    formatted,
    model_accepts,
    placements,
    refusals,
    refused_by_policy,
    schema,
    server_refusals,
    walk,
    well_typed,
    with_value,
)
from tests.unit.test_validation import BAD

REPO = Path(__file__).parents[2]
KINDS = list(CRDS)


def test_generated_files_are_fresh() -> None:
    stale = [str(p.relative_to(REPO)) for p, text in generated(REPO).items() if not p.exists() or p.read_text() != text]
    assert not stale, f"run `make crds`: {stale}"
    assert (REPO / "docs" / "reference.md").read_text() == reference(), "run `make crds`: docs/reference.md"


def test_generated_files_have_no_anchors() -> None:
    for text in generated(REPO).values():
        assert not [token for token in yaml.scan(text) if isinstance(token, yaml.AnchorToken | yaml.AliasToken)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", ["1.35", "1.37"])
def test_the_crd_is_valid_for_old_and_new_servers(version: str, kind: str) -> None:
    """Both are asked themselves, too, in the component tests."""
    for document in (CRDS[kind], *policy()):
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_keep_their_own_rules(kind: str) -> None:
    """An API server looks at a default as it is written, and refuses the whole definition when a rule is broken."""
    spec = schema(kind)["spec"]
    assert not bad_defaults(spec)
    for path, node in walk(spec):
        if "default" in node:
            assert node["default"] == filled(node, node["default"]), f"{path}: not every default inside is written out"


@pytest.mark.parametrize("change", [{}, *(row[1] for row in BAD)], ids=["good", *(row[0] for row in BAD)])
def test_the_policy_says_what_the_rules_say(change: dict[str, Any]) -> None:
    """Of whatever has the types and bounds of the schema, which a server looks at first."""
    specs = SPECS["FineTuneJob"] if not change else [merged(MINIMAL, **change)]
    for whole in (filled(RULED["FineTuneJob"], spec) for spec in specs):
        if well_typed("FineTuneJob", whole):
            in_place, of_one = (refusals(node, whole) for node in (RULED["FineTuneJob"], schema("FineTuneJob")["spec"]))
            assert {message for _, message in of_one} | set(refused_by_policy({"spec": whole})) == {message for _, message in in_place}


def test_defaults_that_are_not_written_out_are_found() -> None:
    """As they were once, when no server in support took the definition."""
    spec = structural_schema(FineTuneJobSpec)
    for _, node in walk(spec):
        if isinstance(node.get("default"), dict):
            node["default"] = {}
    assert {path for path, _ in bad_defaults(spec)} >= {"tuning", "distribution"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_described_and_structural(kind: str) -> None:
    for root in ("spec", "status"):
        for path, node in walk(schema(kind)[root]):
            assert ("type" in node) != ("x-kubernetes-int-or-string" in node), path
            assert not {"$ref", "anyOf", "oneOf", "allOf"} & set(node), path
            if path and path[-1] not in ("[]", "{}"):
                assert node.get("description"), f"{path} has no description"


@pytest.mark.parametrize("kind", KINDS)
def test_strings_numbers_and_lists_are_bounded(kind: str) -> None:
    unbounded = [
        (root, path)
        for root in ("spec", "status")
        for path, node in walk(schema(kind)[root])
        if (node.get("type", "string") == "string" and "enum" not in node and "maxLength" not in node)
        or (node.get("type") == "array" and "maxItems" not in node)
        or (node.get("type") == "integer" and not {"minimum", "maximum"} <= node.keys())
    ]
    assert not unbounded, "also of what somebody may write into a status by hand"


def test_what_is_told_in_a_status_is_cut_and_refused_nowhere() -> None:
    """Whoever said it: a pod's last words, another scheduler, an older release."""
    long = "x" * 100_000
    status = FineTuneJobStatus.model_validate(
        {
            "queue": {"message": long, "since": "2026-01-01T00:00:00Z"},
            "dataset": {"format": long, "dropped": {long: 1}},
            "restarts": [{"attempt": 1, "reason": long, "message": long, "pod": long, "time": "2026-01-01T00:00:00Z"}],
        }
    ).to_wire()
    [cause], [restart] = status["dataset"]["dropped"], status["restarts"]
    for text, most in ((status["queue"]["message"], 4096), (restart["message"], 32_768), (restart["pod"], 253), (cause, 128)):
        assert len(text) == most and text.endswith("x...")


@pytest.mark.parametrize("kind", KINDS)
def test_maps_and_lists_are_bounded_and_say_how_they_merge(kind: str) -> None:
    """In spec and status: no object grows without end, and server-side apply knows what is whose."""
    for root in ("spec", "status"):
        for path, node in walk(schema(kind)[root]):
            if node.get("type") == "array":
                assert "maxItems" in node and node["x-kubernetes-list-type"] in ("atomic", "set", "map"), (root, path)
                assert ("x-kubernetes-list-map-keys" in node) == (node["x-kubernetes-list-type"] == "map"), (root, path)
            if node.get("type") == "object" and "properties" not in node:
                assert "maxProperties" in node, (root, path)


@pytest.mark.parametrize("kind", KINDS)
def test_floats_are_what_goes_into_the_mathematics_alone(kind: str) -> None:
    """docs/architecture.md says why these: a learning rate is a double to whoever reads and to whoever uses it."""
    floats = {(root, *path[:1]) for root in ("spec", "status") for path, node in walk(schema(kind)[root]) if node.get("type") == "number"}
    assert floats == ({("spec", "dataset"), ("spec", "tuning"), ("spec", "evaluation")} if kind == "FineTuneJob" else set())


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (2, "2"), (2e-5, "2e-05"), (0, "0"), (-1.25, "-1.25"), (123456.789, "123456.789"), (1e300, "1e+300")]
)
def test_a_fraction_in_a_status_is_text(value: float, text: str) -> None:
    """And read back, from text and from the number that earlier versions wrote."""
    wire = Progress(loss=value).to_wire()
    assert wire["loss"] == text
    assert Progress.model_validate(wire).loss == value == Progress.model_validate({"loss": value}).loss
    for bad in ("nan", "inf", "1.2.3", "", "0x1", [], True):
        with pytest.raises(ValueError):
            Progress.model_validate({"loss": bad})


@pytest.mark.parametrize("kind", KINDS)
def test_no_message_is_a_pattern(kind: str) -> None:
    """An API server's word on `pattern` is the pattern, and so it is on a rule without a message."""
    for path, node in walk(schema(kind)["spec"]):
        assert not isinstance(node.get("pattern"), str), path
        assert all(rule["message"] and rule["rule"] not in rule["message"] for rule in node.get("x-kubernetes-validations", [])), path


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


# The schema as an API server applies it, against the models.


@pytest.mark.parametrize("kind", KINDS)
def test_valid_specs_are_accepted_by_both(kind: str) -> None:
    for spec in SPECS[kind]:
        assert not server_refusals(kind, spec)
        PARSERS[kind](spec)


@pytest.mark.parametrize("kind", KINDS)
def test_null_is_absent_to_both(kind: str) -> None:
    """But for what is required, and for items of lists."""
    accepted = []
    for path in placements(kind):
        spec = with_value(kind, path, None)
        server = server_refusals(kind, spec)
        assert model_accepts(kind, spec) == (not server), (path, server)
        if not server:
            accepted.append(path)
            assert PARSERS[kind](spec) == PARSERS[kind](filled(schema(kind)["spec"], spec)), path
    assert len(accepted) > len(placements(kind)) / 2
    assert not model_accepts(kind, {**SPECS[kind][0], "surprise": None}), "a field that is unknown is refused whatever it holds"


@pytest.mark.parametrize("value", ["bad value!", "x/" * 11 + "\u00e9", "a\u202eb", "two\nlines"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_say_the_same_of_a_string_that_looks_wrong(kind: str, value: str) -> None:
    assert formatted(kind)
    for path in formatted(kind):
        spec = with_value(kind, path, value)
        with pytest.raises(InvalidDocument) as refused:
            PARSERS[kind](spec)
        (error,) = refused.value.errors
        assert error.message in [message for _, message in server_refusals(kind, spec)], path
        quoted = f'"{value}"' if value.isprintable() else "this"
        assert error.message.startswith(quoted) and len(error.message) < 300, error


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hf://org/model@main", None),
        (
            "meta-llama/Llama-3.1-8B",
            '"meta-llama/Llama-3.1-8B" has no scheme; did you mean hf://meta-llama/Llama-3.1-8B? A model URI is hf://',
        ),
        ("/models/llama", '"/models/llama" is not a model URI; write hf://'),
        ("https://huggingface.co/a/b", '"https://huggingface.co/a/b" is not a model URI; write hf://'),
        ("x" * 300, f'"{"x" * 77}..." has no scheme; did you mean hf://{"x" * 77}...? A model URI is'),
        ("!" * 300, f'"{"!" * 77}..." is not a model URI'),
    ],
)
def test_a_uri_without_scheme(value: str, message: str | None) -> None:
    told = [text for path, text in server_refusals("FineTuneJob", merged(MINIMAL, model={"uri": value}))]
    assert (MODEL.refusal(value) or "").startswith(message or "") and told == ([MODEL.refusal(value)] if message else [])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4, "4"),
        (0, "0"),
        (1_099_511_627_776, "1099511627776"),
        ("1.5", "1.5"),
        (10**15, str(10**15)),
        (-1, None),
        (10**18, None),
        (1.5, None),
        (True, None),
    ],
)
def test_quantities_may_be_numbers(value: Any, text: str | None) -> None:
    found = [path for path, node in walk(schema("FineTuneJob")["spec"]) if "x-kubernetes-int-or-string" in node]
    places = [path for path in found if path[-1] != "fewShot"]
    assert len(places) == 7
    for path in places:
        spec = with_value("FineTuneJob", path, value)
        assert model_accepts("FineTuneJob", spec) == (not server_refusals("FineTuneJob", spec)) == (text is not None), path
    if text is not None:
        assert PARSERS["FineTuneJob"](merged(MINIMAL, resources={"requests": {"cpu": value}})).resources.requests.cpu == text


def _values(node: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values around a field's own domain: legal ones, ones at and past the bounds, ones of another type."""
    kind = node.get("type", "quantity")
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
    elif kind == "quantity":
        good = st.sampled_from(["4", "16Gi", "1.5", "128e6", "100u", "1Ei", ".5", "5.", "+1", "-1", "1e", 4, 0, -1, 10**17, 10**18, "lots"])
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
        return st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(["", "v", "-bad-", "x" * 64, None]), max_size=2)
    optional = {name: _values(child) for name, child in node["properties"].items() if name not in node.get("required", [])}
    required = {name: _values(node["properties"][name]) for name in node.get("required", [])}
    return st.fixed_dictionaries(required, optional=optional)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_schema_and_models_agree(kind: str, data: st.DataObject) -> None:
    """One to three fields of a valid document take values around their domain: both sides must say the same."""
    spec_schema = schema(kind)["spec"]
    fields = [(path, node) for path, node in walk(spec_schema) if path and not {"[]", "{}"} & set(path)]
    document = copy.deepcopy(data.draw(st.sampled_from(SPECS[kind])))
    for _ in range(data.draw(st.integers(1, 3))):
        path, node = data.draw(st.sampled_from(fields))
        target: Any = document
        for part in path[:-1]:
            target = target.setdefault(part, {}) if isinstance(target, dict) else None
        if isinstance(target, dict):
            target[path[-1]] = data.draw(_values(node))
    if data.draw(st.integers(0, 19)) == 0:
        document["surprise"] = data.draw(st.sampled_from([1, None]))
    server = server_refusals(kind, document)
    assert model_accepts(kind, document) == (not server), f"{document}\nserver: {server[:2]}"


def test_rules_of_queues() -> None:
    for limit in ("borrowingLimit", "lendingLimit"):
        alone = {"flavors": [{"name": "any", "nominalQuota": 8, limit: 2}]}
        assert f"flavors[].{limit} needs a cohort" in server_refusals("FineTuneQueue", alone)[0][1]
        assert not model_accepts("FineTuneQueue", alone)
    for value in ("0", 0, "0.0", "+.0Ki", "0e5", "1", ".5", "10", "500m", "0.05", "1e3"):
        spec = {"flavors": [{"name": "any", "nominalQuota": 8, "teraflops": value}], "weight": value}
        good = value in ("1", ".5", "10", "500m", "0.05", "1e3")
        assert model_accepts("FineTuneQueue", spec) == (not server_refusals("FineTuneQueue", spec)) == good, value
    assert server_refusals("FineTuneQueue", {"flavors": []}) and not model_accepts("FineTuneQueue", {"flavors": []})


def test_every_rule_is_exercised() -> None:
    """Each CEL rule refuses at least one document that the Python rule refuses too, and the same ones."""
    from tests.unit.test_validation import BAD

    told = {message for row in BAD for _, message in server_refusals("FineTuneJob", {**MINIMAL, **row[1]})}
    spec = schema("FineTuneJob")["spec"]
    rules = {r["message"] for _, node in walk(spec) if node.get("type") == "object" for r in node.get("x-kubernetes-validations", [])}
    assert not rules - told, f"no bad document for: {rules - told}"


def test_the_model_has_no_field_without_docstring() -> None:
    assert all(field.description for model in (FineTuneJobSpec, FineTuneQueueSpec) for field in model.model_fields.values())
