"""`finetune models` without a cluster: what is shown of statuses, and which version a rollback goes to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from rich.console import Console

from finetune_cli import models
from finetune_cli.options import NotPossible, near

BASE = {"uri": "hf://Qwen/Qwen3-0.6B@main", "revision": "c1899de289a04d12100db370d81485cdf75e47ca", "fingerprint": "f" * 64}


def version(number: int, state: str, promoted: str | None = None, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "number": number, "state": state, "job": f"support-{number}", "digest": f"{number}" * 64, "bytes": 4_000_000, "rank": 16,
        "base": BASE, "dataDigest": "d" * 64, "createdAt": f"2026-11-2{number}T10:00:00Z",
        "settings": {"lora.rank": "16", "hyperparameters.epochs": str(number)},
        "evaluation": {
            "arms": [
                {"name": "Base", "metrics": {"loss": "10.9"}}, {"name": "FewShot", "shots": 8, "metrics": {"loss": "1.03"}},
                {"name": "Champion", "metrics": {"loss": "0.5"}}, {"name": "Tuned", "metrics": {"loss": f"0.4{number}"}},
            ],
            "examples": 60, "prompts": 60, "comparedWith": "FewShot", "improvement": "0.55", "interval": ["0.47", "0.61"], "gate": "Passed",
        },
    }  # fmt: skip
    return {**found, **({"promotedAt": promoted} if promoted else {}), **more}


THIRD = {
    "parent": 2,
    "dataDigest": "e" * 64,
    "message": "better than version 2\x1b[2J",
    "settings": {"lora.rank": "16", "hyperparameters.epochs": "3"},
}
COMPARED = {"version": 2, "prompts": 40, "metric": "loss", "improvement": "0.1", "interval": ["0.02", "0.2"], "result": "Passed"}
MODEL: dict[str, Any] = {
    "metadata": {"name": "support-bot", "namespace": "ml", "resourceVersion": "7", "creationTimestamp": "2026-11-20T10:00:00Z"},
    "spec": {"storage": "pvc://models/support-bot", "promotion": "OnImprovement"},
    "status": {
        "champion": 3, "latest": 4, "count": 4, "score": "loss 0.43 (base 1.03)", "served": ["chat"], "storage": {"highest": 5},
        "conditions": [{"type": "Ready", "status": "True", "reason": "Promoted", "message": "", "lastTransitionTime": "2026-11-23T10:00:00Z"}],
        "versions": [
            version(4, "Rejected", message="not better than version 3"),
            version(3, "Champion", "2026-11-23T10:00:00Z", **THIRD),
            version(2, "Retired", "2026-11-22T10:00:00Z", parent=1),
        ],
    },
}  # fmt: skip
MODEL["status"]["versions"][1]["evaluation"]["champion"] = COMPARED


def text_of(renderable: Any, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def with_status(**changes: Any) -> dict[str, Any]:
    found = copy.deepcopy(MODEL)
    found["status"].update(changes)
    return found


def test_a_model_in_eighty_columns() -> None:
    shown = text_of(models.describe(MODEL))
    assert max(map(len, shown.splitlines())) <= 80 and "\x1b" not in shown
    for fact in (
        "Champion     3",
        "Version 3  Champion",
        "support-3",
        "3" * 64,
        "  Data       " + "e" * 64,
        "hf://Qwen/Qwen3-0.6B@c1899de289a04d12100db370d81485cdf75e47ca",
        "  Parent     2",
        "loss: Base 10.9, FewShot 1.03, Champion 0.5, Tuned 0.43",
        "improvement over FewShot 0.55, between 0.47 and 0.61, gate Passed",
        "against version 2: Passed",
        "not better than version 3",
    ):
        assert fact in shown, fact
    pinned = text_of(models.describe({**MODEL, "spec": {**MODEL["spec"], "champion": 3}}))
    assert "3 (pinned by spec.champion)" in pinned
    lines = text_of(models.table([MODEL, {"metadata": MODEL["metadata"], "spec": {}}], everywhere=True)).splitlines()
    assert lines[1].split()[:4] == ["ml", "support-bot", "3", "4"] and "loss 0.43 (base 1.03)" in lines[1] and "chat" in lines[1]


def test_versions_side_by_side() -> None:
    old, new = (models.version_of(MODEL, number) for number in (2, 3))
    shown = text_of(models.compare("support-bot", [old, new]))
    assert max(map(len, shown.splitlines())) <= 80
    rows = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:4]] for line in shown.splitlines() if "│" in line}
    assert rows["loss, 8 examples"] == ["1.03", "1.03"] and rows["loss, tuned"] == ["0.42", "0.43"] and rows["loss, champion"][0] == "0.5"
    assert rows["data"] == ["d" * 12, "e" * 12] and rows["base"][0].startswith("hf://Qwen")
    assert rows["hyperparameters.epochs"] == ["2", "3"] and "lora.rank" not in rows, "only settings that differ"
    assert "scores of different columns do not compare" in " ".join(shown.split())
    same = [models.version_of(MODEL, number) for number in (2, 4)]
    assert "do not compare" not in " ".join(text_of(models.compare("support-bot", same)).split())


def test_lineage_ends_at_the_base() -> None:
    """A version whose files are gone is named with where its record lies."""
    line = models.ancestry(MODEL)
    assert [step.get("version") for step in line] == [3, 2, 1, None]
    assert line[2] == {"version": 1, "removed": "pvc://models/support-bot/records/1.json"}
    assert line[3] == {"base": "hf://Qwen/Qwen3-0.6B@c1899de289a04d12100db370d81485cdf75e47ca"}
    shown = text_of(models.lineage("support-bot", line))
    assert "support-bot@3  Champion  job support-3, data eeeeeeeeeeee" in shown and "hf://Qwen" in shown.splitlines()[-1]
    assert [step.get("version") for step in models.ancestry(MODEL, 4)] == [4, None]
    loop = with_status(versions=[version(2, "Champion", parent=2)])
    assert [step.get("version") for step in models.ancestry(loop)] == [2, None], "a status that somebody wrote wrongly ends, too"


def test_where_a_rollback_goes() -> None:
    assert models.rollback_target(MODEL).number == 2
    assert models.rollback_target(MODEL, 4).number == 4
    back = [version(3, "Retired", "2026-11-23T10:00:00Z"), version(2, "Champion", "2026-11-24T10:00:00Z"), version(1, "Retired")]
    with pytest.raises(NotPossible, match=r"before version 2 the champion was 3, which is newer: .*\(older ones: 1\)"):
        models.rollback_target(with_status(champion=2, versions=back))
    with pytest.raises(NotPossible, match="no other version that is kept was ever champion"):
        models.rollback_target(with_status(champion=1, versions=[version(1, "Champion")]))
    again = [version(3, "Champion"), version(2, "Retired", "2026-11-22T10:00:00Z"), version(1, "Retired", "2026-11-22T12:00:00Z")]
    assert models.rollback_target(with_status(versions=again)).number == 1, "who was champion last, not the next lower number"


def test_what_is_not_there() -> None:
    with pytest.raises(NotPossible, match="has no version 1 any more; there are: 4, 3, 2"):
        models.version_of(MODEL, 1)
    with pytest.raises(NotPossible, match="has no version 9; there are"):
        models.version_of(MODEL, 9)
    with pytest.raises(NotPossible, match=r"has no version yet: a job with publish"):
        models.version_of({"metadata": {"name": "new"}, "spec": {}})
    assert near("suport-bot", ["support-bot", "other"]) == "; did you mean support-bot?"
    assert near("x", ["support-bot", "other"]) == "; there are: support-bot, other" and near("x", []) == ""


def test_a_version_that_cannot_be_read_takes_no_other_with_it() -> None:
    odd = with_status(versions=[{"number": "three"}, *MODEL["status"]["versions"]])
    assert [one.number for one in models.status_of(odd).versions] == [4, 3, 2]


def test_what_is_told_of_a_pin() -> None:
    told = "\n".join(models.pinned(MODEL, models.version_of(MODEL, 4)))
    assert "version 4 is pinned as champion (it was 3)" in told and "had been rejected: not better than version 3" in told
    assert "spec: {champion: 4}" in told and "(as before)" in models.pinned(MODEL, models.version_of(MODEL, 3))[0]
    assert """kubectl patch ftm support-bot -n ml --type=merge -p '{"spec":{"champion":null}}'""" in told
