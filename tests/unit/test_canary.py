"""The test that a canary is judged by: how often it is wrong, however often it is looked at, and how soon it is right."""

from __future__ import annotations

import random

import pytest

from finetune_api.serving import ArmTraffic
from finetune_operator.reconcile.endpoint.canary import ALPHA, judge

SPREAD = 0.8
"""Of log seconds: the slowest tenth takes three times the median."""


def rollout(seed: int, share: float, failing: tuple[float, float], slower: float = 0.0, requests: int = 1000) -> int | None:
    """Requests until the new one is called worse; None when it never is. Looked at after every 20."""
    luck = random.Random(seed)
    arms = [[0, 0, 0.0, 0.0], [0, 0, 0.0, 0.0]]
    for done in range(1, requests + 1):
        new = luck.random() < share
        arm = arms[new]
        arm[0] += 1
        if luck.random() < failing[new]:
            arm[1] += 1
        else:
            logarithm = luck.gauss(-1.5 + slower * new, SPREAD)
            arm[2] += logarithm
            arm[3] += logarithm**2
        if done % 20 == 0:
            old, fresh = (ArmTraffic.model_construct(requests=a[0], errors=a[1], log_seconds=a[2], log_seconds_squared=a[3]) for a in arms)
            if judge(old, fresh).worse:
                return done
    return None


@pytest.mark.parametrize(("share", "failing"), [(0.1, 0.02), (0.5, 0.02), (0.1, 0.3)])
def test_one_that_is_no_worse_goes_back_as_seldom_as_is_said(share: float, failing: float) -> None:
    """50 looks at each of 300 rollouts: a test for a fixed number of requests would send back one in eight."""
    wrong = sum(rollout(seed, share, (failing, failing)) is not None for seed in range(300))
    assert wrong <= 300 * ALPHA + 3  # two standard errors above


@pytest.mark.parametrize(
    ("share", "failing", "slower", "soon"),
    [(0.1, (0.01, 0.15), 0.0, 700), (0.5, (0.01, 0.08), 0.0, 700), (0.1, (0.0, 1.0), 0.0, 60), (0.5, (0.01, 0.01), 0.4, 500)],
)
def test_one_that_is_worse_goes_back(share: float, failing: tuple[float, float], slower: float, soon: int) -> None:
    ends = sorted(rollout(seed, share, failing, slower) or 10**6 for seed in range(40))
    assert ends[20] <= soon and ends[35] <= 1000


def test_one_that_is_better_or_hardly_different_stays() -> None:
    assert rollout(0, 0.5, (0.1, 0.0), -0.5) is None
    assert all(rollout(seed, 0.5, (0.001, 0.004)) is None for seed in range(10)), "less than half a request in a hundred"


def test_nothing_is_known_of_nothing() -> None:
    verdict = judge(ArmTraffic(), ArmTraffic())
    assert not verdict.worse and "0 requests" in verdict.message
    assert not judge(ArmTraffic(requests=5), ArmTraffic(requests=3, errors=1)).worse


def test_the_verdict_has_the_numbers() -> None:
    old, new = ArmTraffic(), ArmTraffic()
    for index in range(200):
        old = old.with_request(0.2 + index % 7 / 50, failed=False)
        new = new.with_request(0.2, failed=index % 4 == 0)
    verdict = judge(old.plus(ArmTraffic()), new)
    assert verdict.worse and "25.0% of 200 requests failed, and 0.0% of 200" in verdict.message
