"""Hostile input that no other test's subject covers: what pods say (A11, A16), what a spec smuggles (A9, A12, A17). docs/security.md lists all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune_api import names
from finetune_api.contract import StageResult, read_stage_result
from finetune_api.scalars import printable
from finetune_api.status import Condition, FineTuneJobStatus
from finetune_api.validation import InvalidDocument, parse_spec
from finetune_operator.model.job import ChildJobView, Observed, PodView
from finetune_operator.reconcile.job import reconcile
from finetune_operator.settings import Settings
from tests.factory import FULL, MINIMAL, NOW, PLAN, TRAINED, job, merged, stamp
from tests.unit.test_resources import manifests, pods

EVALUATED = merged(
    MINIMAL,
    dataset={"train": {"uri": "configmap://rows/train.jsonl"}, "eval": {"splitFraction": 0.1}},
    evaluation={},
    publish=[{"uri": "pvc://out/x"}],
)
STAGES = ("prepare", "check", "train", "evaluate", "publish")
ESCAPES = "\x1b[2J\x1b]0;owned\x07<script>alert(1)</script>\u202egnp.exe\x00"


def done(*types: str) -> list[dict[str, Any]]:
    return [
        {"type": t, "status": "True", "reason": "Done", "message": "", "lastTransitionTime": stamp(NOW), "observedGeneration": 1}
        for t in types
    ]


def told(stage: str, message: str, phase: str = "Succeeded", code: int = 0) -> FineTuneJobStatus:
    """The status after a pod of that stage ended with these last words."""
    before = {"prepare": (), "train": ("DataReady", "Admitted"), "evaluate": ("DataReady", "Admitted", "Trained")}
    types = before.get(stage, ("DataReady", "Admitted", "Trained", "Evaluated"))
    status: dict[str, Any] = {"observedGeneration": 1, "conditions": done(*types), "plan": PLAN}
    if stage != "prepare":
        status["admission"] = {"nodes": 1, "admittedAt": stamp(NOW)}
    if stage == "train":
        status["gang"] = {"attempt": 0, "podUIDs": ["p"], "startedAt": stamp(NOW), "runningSince": stamp(NOW)}
    name = names.stage_name("support", stage, 0) if stage != "train" else ""  # type: ignore[arg-type]
    pod = PodView(
        name=names.worker_name("support", 0) if stage == "train" else f"{name}-x",
        uid="p",
        stage="train" if stage == "train" else "",
        job_uid="" if stage == "train" else "j",
        phase=phase,
        created=NOW,
        exit_code=code,
        finished=NOW,
        running=True,
        message=message,
    )
    jobs = () if stage == "train" else (ChildJobView(name=name, uid="j", stage=stage, created=NOW),)
    raw = job(EVALUATED, status)
    applied = {("ConfigMap", "support-job"): "", ("PersistentVolumeClaim", "support-workspace"): ""}
    plan = reconcile(Observed(job=raw, pods=(pod,), jobs=jobs, applied=applied, now=NOW), Settings())
    for event in plan.events:
        assert printable(event.message) == event.message and len(event.message) <= 1000
    return plan.status or FineTuneJobStatus.model_validate(raw["status"])


def leaves(value: Any, kind: type) -> list[Any]:
    if isinstance(value, kind):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [leaf for one in inner for leaf in leaves(one, kind)]


def strings(value: Any) -> list[str]:
    return leaves(value, str)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
KNOWN = st.dictionaries(
    st.sampled_from(
        ["steps", "loss", "epoch", "checkpointStep", "tokensPerSecond", "dataset", "plan", "base", "tuned", "gate", "interval", "artifacts"]
    ),
    JSON,
    max_size=6,
)


@given(stage=st.sampled_from(STAGES), reason=st.text(max_size=30) | st.just("Fine"), result=KNOWN | JSON, failed=st.booleans())
@example(stage="train", reason="Fine", result={"checkpointStep": False}, failed=False)
@settings(max_examples=400, deadline=None)
def test_a16_whatever_a_pod_says_the_job_goes_on_or_fails_with_a_status_that_is_valid(
    stage: str, reason: str, result: Any, failed: bool
) -> None:
    """A status that the API server refuses would hold the job up for ever."""
    message = json.dumps({"reason": reason, "message": ESCAPES, "result": result})
    status = told(stage, message, *(("Failed", 12) if failed else ("Succeeded", 0)))
    wire = status.to_wire()
    text = json.dumps(wire, allow_nan=False)
    assert all(printable(string) == string for string in strings(wire["conditions"]) + strings(wire.get("restarts")))
    FineTuneJobStatus.model_validate_json(text)
    assert all(abs(number) <= 2**63 for number in leaves(wire, int))
    for condition in wire["conditions"]:
        Condition.model_validate(condition)


@pytest.mark.parametrize(
    "message", ["[" * 4096, '{"reason": "a b", "message": ""}', '{"reason": "X", "result": {"loss": NaN}}', "", "\x00"]
)
def test_a16_words_that_are_none(message: str) -> None:
    found = read_stage_result(message)
    assert found is None or found.result != found.result or "loss" in found.result


def test_a16_a_result_of_nan_fails_the_job_with_the_stage_named() -> None:
    words = json.dumps({"reason": "Compared", "result": {"arms": [{"name": "Base", "metrics": {"loss": float("nan")}}], "gate": "Passed"}})
    status = told("evaluate", words)
    failed = status.condition("Failed")
    assert status.phase == "Failed" and failed is not None and failed.reason == "EvaluateFailed"
    assert told("train", TRAINED.dumps()).is_true("Trained"), "good words go through the same door"


def test_a16_control_characters_do_not_reach_a_terminal() -> None:
    status = told("prepare", StageResult(reason="BadRows", message=ESCAPES).dumps(), "Failed", 10)
    assert status.phase == "Failed"
    shown = strings(status.to_wire())
    assert any("<script>" in string for string in shown), "text stays text"
    assert all(printable(string) == string for string in shown)
    assert printable("a\tb\nc – ü 漢字 🙂") == "a\tb\nc – ü 漢字 🙂"


SMUGGLED: list[tuple[str, dict[str, Any]]] = [
    ("podTemplate", {"podTemplate": {"spec": {"hostNetwork": True}}}),
    ("hostNetwork", {"scheduling": {"hostNetwork": True}}),
    ("nodeName", {"scheduling": {"nodeName": "control-plane"}}),
    ("serviceAccountName", {"scheduling": {"serviceAccountName": "admin"}}),
    ("securityContext", {"resources": {"securityContext": {"privileged": True}}}),
    ("volumes", {"workspace": {"volumes": [{"hostPath": {"path": "/"}}]}}),
    ("env", {"tuning": {"env": [{"name": "LD_PRELOAD", "value": "/workspace/evil.so"}]}}),
    ("namespace", {"model": {"uri": "hf://org/m", "secretRef": {"name": "token", "namespace": "kube-system"}}}),
    ("image", {"resources": {"image": "evil"}}),
]


@pytest.mark.parametrize(("field", "change"), SMUGGLED, ids=[field for field, _ in SMUGGLED])
def test_a9_there_is_nothing_to_override_in_a_pod(field: str, change: dict[str, Any]) -> None:
    """Strict readers refuse the field, lenient ones do not see it."""
    with pytest.raises(InvalidDocument, match=rf"{field}: unknown field"):
        parse_spec(merged(MINIMAL, **change))
    known = {
        block: {k: v for k, v in value.items() if k != field}
        for block, value in change.items()
        if block != field and isinstance(value, dict)
    }
    if field == "namespace":
        known = {"model": {"uri": "hf://org/m", "secretRef": {"name": "token"}}}
    assert manifests(parse_spec_wire(change)) == manifests(parse_spec_wire(known))


def parse_spec_wire(change: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = parse_spec(merged(MINIMAL, **change), strict=False).to_wire()
    return spec


def test_a12_a_spec_sets_no_environment_and_no_argument() -> None:
    """The variables are the operator's own, and what runs is fixed: nothing of a spec comes near a shell or a loader."""
    for spec in (MINIMAL, FULL):
        for pod in pods(spec):
            container = pod["containers"][0]
            for variable in container["env"]:
                assert re.fullmatch(r"FINETUNE_[A-Z_]+|HOME|OMP_NUM_THREADS", variable["name"])
            assert "command" not in container and len(container["args"]) == 5 and container["args"][0] in STAGES
            assert pod.get("initContainers") is None and len(pod["containers"]) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"scheduling": {"tolerations": [{"key": f"k{n}"} for n in range(10_000)]}},
        {"scheduling": {"nodeSelector": {f"k{n}": "v" for n in range(10_000)}}},
        {"dataset": {"train": {"uri": "https://example.com/" + "a" * 1_000_000}}},
        {"publish": [{"uri": f"pvc://c/{n}"} for n in range(10_000)]},
        {"tuning": {"lora": {"targetModules": ["x" * 1000] * 10_000}}},
        {"evaluation": {"regex": "(" * 100_000}},
    ],
    ids=["tolerations", "nodeSelector", "uri", "publish", "targetModules", "regex"],
)
def test_a17_bombs_are_bounded_by_the_schema(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidDocument) as refused:
        parse_spec(merged(EVALUATED, **change))
    assert len(str(refused.value)) < 20_000, "and the answer is no bomb either"


LEAKY = """
import logging, sys
from finetune_trainer.process import redaction
from finetune_trainer.process.errors import UserError
redaction.add_secrets([sys.argv[1]])
redaction.configure_logging()
secret = open(sys.argv[1] + "/token").read().strip()
print("printed", secret)
sys.stderr.write(f"written {secret}\\n")
logging.getLogger("x").info("logged %s", secret)
try:
    raise ValueError(f"raised {secret}")
except ValueError:
    logging.getLogger("x").exception("with a stack")
print(UserError("Told", f"said {secret} and hf_abcdefghijkl").result().dumps())
"""


def test_a11_the_value_of_a_secret_leaves_a_stage_by_no_way(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("planted-4711-value\n")
    done = subprocess.run([sys.executable, "-c", LEAKY, str(tmp_path)], capture_output=True, text=True, check=True)
    said = done.stdout + done.stderr
    for word in ("printed", "written", "logged", "raised", "said"):
        assert f"{word} ***" in said
    assert "planted" not in said and "hf_" not in said
