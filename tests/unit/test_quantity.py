"""Quantities as the API server reads them, by the format's own table (k8s.io/apimachinery pkg/api/resource, quantity.go and its test)."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from pydantic import ValidationError

from finetune_api.scalars import quantity
from finetune_api.spec.run import ComputeResources
from finetune_operator.model.nodes import MORE_THAN_ANY, amount, node_of, pod_requests
from finetune_operator.resources.backends import _times
from finetune_operator.settings import from_environment

MOST = str(2**63 - 1)
READ = [
    # no suffix, signs, points without digits on one side
    ("0", "0"), ("1", "1"), ("00012", "12"), ("+5", "5"), ("-5m", "-0.005"), (".5", "0.5"), ("-.5", "-0.5"), ("5.", "5"), ("1.G", "1e9"),
    (".001", "0.001"), (".0001k", "0.1"), ("0.025Ti", "27487790694.4"), ("9.01", "9.01"),
    # decimal suffixes
    ("5n", "5e-9"), ("4u", "4e-6"), ("100u", "0.0001"), ("3m", "0.003"), ("1500m", "1.5"), ("8k", "8e3"), ("7M", "7e6"), ("6G", "6e9"),
    ("5T", "5e12"), ("2P", "2e15"), ("1E", "1e18"), ("0k", "0"), ("7.123456M", "7123456"), ("2.5P", "2.5e15"), ("1.01E", "1.01e18"),
    # binary suffixes
    ("1Ki", "1024"), ("7Mi", str(7 * 2**20)), ("6Gi", str(6 * 2**30)), ("5Ti", str(5 * 2**40)), ("4Pi", str(4 * 2**50)),
    ("1Ei", str(2**60)), ("7Ei", str(7 * 2**60)), ("0.5Mi", str(2**19)), ("100.035Ki", "102435.84"), ("0.05Gi", "53687091.2"),
    # decimal exponents
    ("1E-3", "0.001"), ("1e-3", "0.001"), ("1e3", "1000"), ("1E6", "1e6"), ("128e6", "128000000"), ("1e+3", "1000"), ("1.3E+6", "1.3e6"),
    ("0.5e0", "0.5"), ("0.5e-2", "0.005"), ("1.7E18", "1.7e18"), ("0e5", "0"), ("0e99999", "0"),
    # too fine: rounded away from zero, to a billionth
    ("3.001n", "4e-9"), ("1.1E-9", "2e-9"), ("0.0000000001", "1e-9"), ("0.00000012354", "124e-9"), ("0.000000000001Ki", "2e-9"),
    ("0.1m", "0.0001"), ("1e-30", "1e-9"), ("-1e-30", "-1e-9"), ("1e-999999999", "1e-9"),
    # too much: capped, by the format's description (servers cap binary forms alone, and count in 64 bits all the same)
    ("8Ei", MOST), ("9Ei", MOST), ("-9Ei", f"-{MOST}"), ("9223372036854775807Ki", MOST), ("12E", MOST), ("1e400", MOST),
    ("1e999999999", MOST), ("9" * 200, MOST),
]  # fmt: skip
REFUSED = [
    "", " ", " 1", "1 ", "1\n", "lots", "aoeu", "1.1.M", "1.5.5", "1+1.0M", "0.1mi", "0.1am", ".5i", "1i", "-3.01i", "-3.01e-", "1e", "1e+",
    "1K", "1ki", "1KI", "1kk", "1nE", "1ee3", "1e1.5", "1e-12Ki", "1E3i", "1Eie", "--1", "+-1", "0x10", "1_0", "1,5", "NaN", "Infinity", "\u0663",
    ".", "+", "-", "-.", "e3", "Ki", "m",  # without a digit: servers take them for 0, the format's grammar does not know them
    "1e99999999999",
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), READ)
def test_every_form_is_read(text: str, value: str) -> None:
    assert quantity(text) == Decimal(value)


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_none_is_refused_and_never_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="is not a quantity; write for example 500m, 16 or 200Gi"):
        quantity(text)
    assert node({"cpu": "8", "memory": text}).allocatable == {"cpu": 8000}, "a node has nothing of what cannot be read"
    assert node({"memory": text}).unreadable == {"memory": text}
    assert pod_requests({"containers": [{"resources": {"requests": {"memory": text}}}]})["memory"] >= MORE_THAN_ANY, "and a pod all of it"


def node(allocatable: dict[str, Any]) -> Any:
    return node_of({"metadata": {"name": "n"}, "status": {"allocatable": allocatable}})


def test_whole_amounts_are_rounded_up() -> None:
    assert [amount("cpu", t) for t in ("100u", "1", "1500m", 2, "1e3")] == [1, 1000, 1500, 2000, 1_000_000]
    assert [amount("memory", t) for t in ("128e6", "1Ei", "100u", 4096)] == [128_000_000, 2**60, 1, 4096]


def test_less_than_nothing_frees_nothing() -> None:
    assert node({"nvidia.com/gpu": "-8"}).allocatable == {}
    assert pod_requests({"containers": [{"resources": {"limits": {"nvidia.com/gpu": "-8"}}}]}) == {"nvidia.com/gpu": MORE_THAN_ANY}
    assert pod_requests({"overhead": {"cpu": "lots"}}) == {"cpu": MORE_THAN_ANY}


@pytest.mark.parametrize(
    "text", [text for text, _ in READ if len(text) <= 16 and "-" not in text and "99999" not in text and "400" not in text]
)
def test_jobs_may_ask_in_every_form(text: str) -> None:
    assert ComputeResources.model_validate({"cpu": text}).cpu == text


@pytest.mark.parametrize("text", ["-1", "-.5", "1e", "lots", "Ki", "."])
def test_jobs_may_not_ask_for_less_than_nothing(text: str) -> None:
    with pytest.raises(ValidationError, match="is not a quantity"):
        ComputeResources.model_validate({"cpu": text})


def test_a_multiple_is_not_less() -> None:
    assert [_times(t, 3) for t in ("500m", "1Gi", "100u", "1")] == ["1500m", str(3 * 2**30), "1m", "3"]


def test_settings_with_amounts_are_checked_at_start_up() -> None:
    assert from_environment({"FINETUNE_STAGE_MEMORY": "4e9"}).stage_memory == "4e9"
    with pytest.raises(ValueError, match=r"FINETUNE_STAGE_CPU='lots': \"lots\" is not a quantity; write for example 500m"):
        from_environment({"FINETUNE_STAGE_CPU": "lots"})
