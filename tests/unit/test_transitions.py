"""What of a job's spec may change, and when: said by the policy, held by the operator where the policy could not."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.contract import JobFile
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.transitions import FROZEN, HOLDS
from finetune_api.validation import parse_spec
from finetune_operator.reconcile.job.immutability import ignored_changes, may_have_changed
from finetune_operator.reconcile.plan import Apply
from finetune_operator.resources.common import JobRef
from finetune_operator.resources.shared import digests
from tests.factory import MINIMAL, PREPARED, UID, job, merged
from tests.schemas import SPECS, filled, refused_changes, schema
from tests.unit.test_kueue import KueueWorld
from tests.unit.test_reconcile import World, granted

FREE_FIELDS = {"runPolicy"}
EVALUATED = merged(MINIMAL, dataset={**MINIMAL["dataset"], "eval": {"splitFraction": 0.1}}, evaluation={"metrics": ["loss"]})
ALWAYS = [
    ("model", {"model": {"uri": "pvc://models/other"}}),
    ("dataset", {"dataset": {"train": {"uri": "configmap://rows/other.jsonl"}, "eval": {"splitFraction": 0.1}}}),
    ("tuning", {"tuning": {"method": "dora"}}),
    ("checkpoint", {"checkpoint": {"keep": 3}}),
    ("workspace", {"workspace": {"persistentVolumeClaim": {"claimName": "shared"}}}),
    ("evaluation", {"evaluation": {"metrics": ["perplexity"]}}),
    ("output", {"output": {"merged": True}}),
    ("publish", {"publish": [{"uri": "pvc://published/support"}]}),
    ("managedBy", {"managedBy": "example.com/another"}),
]
WHILE_HELD = [
    ("distribution", {"distribution": {"nodes": 2, "gpusPerNode": 0}}),
    ("resources", {"resources": {"requests": {"cpu": "4"}}}),
    ("scheduling", {"scheduling": {"nodeSelector": {"gpu": "h100"}}}),
    ("scheduling", {"scheduling": {"tolerations": [{"key": "gpu", "operator": "Exists"}]}}),
    ("scheduling", {"scheduling": {"topologyKey": "rack"}}),
]
FREE = [
    {"runPolicy": {"suspend": True}},
    {"runPolicy": {"ttlAfterFinished": "1h", "maxRestarts": 9}},
    {"scheduling": {"queue": "research", "priorityClassName": "high"}},
]


def with_conditions(*true: str) -> dict[str, Any]:
    return {"conditions": [{"type": "Accepted", "status": "True"}, *({"type": type_, "status": "True"} for type_ in true)]}


def told(old: dict[str, Any], new: dict[str, Any], status: dict[str, Any] | None = None) -> dict[str, str]:
    return refused_changes(job(old, status), job(new, status))


def test_every_field_is_frozen_or_free() -> None:
    assert {field.field for field in FROZEN} | FREE_FIELDS == set(schema("FineTuneJob")["spec"]["properties"])
    for field in FROZEN:
        inner = set(schema("FineTuneJob")["spec"]["properties"][field.field].get("properties", {}))
        assert not field.parts or {*field.parts, *field.but} == inner


@pytest.mark.parametrize("status", [None, with_conditions("Admitted")], ids=["new", "runs"])
@pytest.mark.parametrize(("field", "change"), ALWAYS, ids=[row[0] for row in ALWAYS])
def test_what_never_changes(field: str, change: dict[str, Any], status: dict[str, Any] | None) -> None:
    new = merged(EVALUATED, **change)
    found = told(EVALUATED, new, status)
    assert list(found) == [f"spec.{field}"] and list(told(new, EVALUATED, status)) == [f"spec.{field}"]
    message = found[f"spec.{field}"]
    assert message.startswith(f"spec.{field} cannot change") and "another job" in message and "continueFrom" in message
    assert f"spec.{field}" in ignored_changes(parse_spec(EVALUATED), parse_spec(new), held=False)


def test_an_evaluation_neither_comes_nor_goes() -> None:
    without = {key: value for key, value in EVALUATED.items() if key != "evaluation"}
    assert list(told(EVALUATED, without)) == list(told(without, EVALUATED)) == ["spec.evaluation"]


@pytest.mark.parametrize(("field", "change"), WHILE_HELD, ids=[next(iter(row[1][row[0]])) for row in WHILE_HELD])
def test_the_shape_changes_only_while_nothing_is_held(field: str, change: dict[str, Any]) -> None:
    new = merged(MINIMAL, **change)
    for free in (None, {}, with_conditions(), with_conditions("Suspended", "DataReady")):
        assert told(MINIMAL, new, free) == {}
    assert ignored_changes(parse_spec(MINIMAL), parse_spec(new), held=False) == ""
    for type_ in HOLDS:
        found = told(MINIMAL, new, with_conditions(type_))
        assert list(found) == [f"spec.{field}"] and "runPolicy.suspend" in found[f"spec.{field}"]
    assert ignored_changes(parse_spec(MINIMAL), parse_spec(new), held=True).startswith(f"spec.{field} cannot change any more")


@pytest.mark.parametrize("change", FREE)
def test_what_may_always_change(change: dict[str, Any]) -> None:
    for status in (None, with_conditions("Admitted"), with_conditions("Succeeded"), with_conditions("Failed")):
        assert told(MINIMAL, merged(MINIMAL, **change), status) == {}
    assert ignored_changes(parse_spec(MINIMAL), parse_spec(merged(MINIMAL, **change)), held=True) == ""


@pytest.mark.parametrize("spec", SPECS["FineTuneJob"])
def test_what_is_applied_again_is_no_change(spec: dict[str, Any]) -> None:
    """As the user wrote it, and as the server keeps it with its defaults."""
    whole = filled(schema("FineTuneJob")["spec"], spec)
    for old, new in ((spec, spec), (spec, whole), (whole, spec)):
        assert told(old, new, with_conditions("Admitted")) == {}
        assert ignored_changes(parse_spec(old), parse_spec(new), held=True) == ""


# The operator, with what was changed before its job held anything, and with what got past the policy.


class Changing(World):
    """A job whose spec is changed; the operator remembers the old one in its ConfigMap until it applies another."""

    begun: FineTuneJobSpec | None = None

    def _carry_out(self, action: Any) -> None:
        if isinstance(action, Apply) and action.manifest["kind"] == "ConfigMap":
            self.begun = JobFile.model_validate_json(action.manifest["data"]["job.json"]).spec
        super()._carry_out(action)

    def change(self, **blocks: Any) -> None:
        self.job["spec"] = merged(self.job["spec"], **blocks)
        self.job["metadata"]["generation"] += 1

    def observed(self) -> Any:
        self.handed["accepted"] = self.begun if may_have_changed(self.job) else None
        return super().observed()

    def reason(self, type_: Any) -> str:
        found = self.status.condition(type_)
        return found.reason if found is not None else ""


def test_a_waiting_job_is_planned_anew() -> None:
    """Its old prepare goes, and nothing that was decided for its old shape counts."""
    world = Changing(merged(MINIMAL, distribution={"nodes": 2, "gpusPerNode": 0}))
    decided, world.decision = world.decision, None
    world.settle()
    world.succeed("prepare", PREPARED)
    world.settle()
    assert world.status.phase == "Queued" or world.status.is_true("DataReady")
    world.decision = decided
    world.change(distribution={"nodes": 1, "gpusPerNode": 0})
    plan = world.step()
    assert not plan.actions, "on record first"
    assert world.reason("DataReady") == "SpecChanged" and not world.status.is_true("Admitted") and world.status.plan is None
    world.settle()
    assert list(world.jobs) == ["support-prepare-1"]
    now = digests(JobRef("support", "team-a", UID, parse_spec(world.job["spec"])), world.settings)
    assert world.applied["ConfigMap", "support-job"] == now["ConfigMap", "support-job"], "job.json says the new shape"
    world.decision = granted(1)
    world.succeed("prepare-1", PREPARED)
    world.settle()
    assert world.status.is_true("Admitted") and [p.rank for p in world.pods.values() if p.stage == "train"] == [0]
    assert world.status.stages["prepare"].retries == 0, "no failure"


def test_prepare_starts_anew_while_it_runs() -> None:
    """It plans for the shape that its job.json says."""
    world = Changing()
    world.settle()
    world.change(resources={"gpuMemory": "80Gi"})
    world.settle()
    assert list(world.jobs) == ["support-prepare-1"] and not world.status.is_true("DataReady")


def test_a_selector_of_a_prepared_job_changes_without_another_prepare() -> None:
    world = Changing()
    decided, world.decision = world.decision, None
    world.settle()
    world.succeed("prepare", PREPARED)
    world.settle()
    world.change(scheduling={"nodeSelector": {"pool": "h100"}})
    world.decision = decided
    world.step()
    assert not world.status.is_true("Admitted"), "decided for nodes of the old selector"
    world.settle()
    assert world.status.is_true("Admitted") and world.status.is_true("DataReady") and list(world.jobs) == ["support-prepare-0"]


def test_a_suspended_job_goes_on_in_another_shape() -> None:
    world = Changing()
    world.to_training()
    world.change(runPolicy={"suspend": True})
    world.settle()
    world.settle()
    assert world.status.phase == "Suspended" and not [p for p in world.pods.values() if p.stage == "train"]
    world.change(distribution={"nodes": 2, "gpusPerNode": 0})
    world.settle()
    world.change(runPolicy={"suspend": False})
    world.decision = granted(2)
    world.settle()
    world.succeed("prepare-1", PREPARED)
    world.settle()
    assert sorted(p.rank for p in world.pods.values() if p.stage == "train") == [0, 1]
    assert {p.attempt for p in world.pods.values() if p.stage == "train"} == {1}


@pytest.mark.parametrize("wiped", [False, True], ids=["there is no policy", "the status was wiped"])
def test_what_got_past_the_policy_is_ignored_while_a_gang_runs(wiped: bool) -> None:
    world = Changing()
    world.to_training()
    if wiped:
        del world.job["status"]
    world.change(distribution={"nodes": 4, "gpusPerNode": 0}, model={"uri": "pvc://models/other"}, runPolicy={"maxRestarts": 7})
    world.step()
    assert world.reason("Accepted") == "ChangeIgnored"
    message = world.status.condition("Accepted").message  # type: ignore[union-attr]
    assert message.startswith("spec.model, spec.distribution cannot change any more")
    world.step()
    assert [p.rank for p in world.pods.values() if p.stage == "train"] == [0]
    assert world.status.total_gpus == 0 and "SpecChanged" not in world.events


def test_a_change_past_the_policy_beside_an_allowed_one_is_acted_on_once() -> None:
    world = Changing()
    world.settle()
    world.change(model={"uri": "pvc://models/other"}, distribution={"nodes": 2, "gpusPerNode": 0})
    world.settle()
    assert world.reason("Accepted") == "ChangeIgnored" and list(world.jobs) == ["support-prepare-1"]


class ChangingInKueue(Changing, KueueWorld):
    """The same where Kueue decides."""


def test_a_gang_that_waits_in_kueues_line_is_made_anew_in_its_new_shape() -> None:
    """Its pods are there already, and would count as another group."""
    world = ChangingInKueue(merged(MINIMAL, distribution={"nodes": 2, "gpusPerNode": 0}, scheduling={"queue": "research"}))
    world.settle()
    world.succeed("prepare", PREPARED)
    world.settle()
    assert [p.attempt for p in world.pods.values() if p.stage == "train"] == [0, 0] and not world.status.is_true("Admitted")
    world.change(distribution={"nodes": 1, "gpusPerNode": 0})
    world.settle()
    assert not [p for p in world.pods.values() if p.stage == "train"], "Kueue could let them start"
    world.succeed("prepare-1", PREPARED)
    world.settle()
    assert [(p.rank, p.attempt) for p in world.pods.values() if p.stage == "train"] == [(0, 1)]
    assert (world.status.restarts[-1].reason, world.status.restarts_counted) == ("SpecChanged", 0)
