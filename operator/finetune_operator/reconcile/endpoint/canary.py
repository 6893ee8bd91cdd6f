"""Whether a new champion answers worse than the old one beside it. Pure: (what both answered) -> a verdict.

Looked at every few seconds, a test for a fixed number of requests would find something sooner or later. These are mixture sequential
probability ratio tests (Robbins 1970; Johari, Pekelis and Walsh 2015, "Always valid inference"): under "the new one is not worse" the
likelihood ratio, averaged over what "worse" may be, exceeds 1/alpha at *any* look with a probability of at most alpha (Ville). So it
may be looked at as often as one likes, and be stopped at any time. Knows nothing of what a verdict leads to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune_api.serving import ArmTraffic

ALPHA = 0.01
"""Chance that a whole rollout of a version that is not worse goes back, whatever the number of steps and looks."""
LEAST_TIMED = 30
"""Requests of each arm before latencies are compared: their variances are estimated."""
LEAST_SLOWER = math.log(1.1)
"""A mean (of the logarithms) less than a tenth above the old one's is nobody's harm."""
LEAST_ERRORS = 0.005
"""Nor is half a request more in a hundred that fails."""
_RATIOS = (1.25, 1.5, 2.0, 4.0, 10.0, 100.0)
"""How many times the old one's error rate the new one's may be: equal weights."""
_SPREAD = 0.2
"""Standard deviation of the half-normal prior over differences of mean log seconds: a fifth slower is typical for worse."""


@dataclass(frozen=True)
class Verdict:
    """What is known by now."""

    worse: bool
    message: str


def judge(old: ArmTraffic, new: ArmTraffic, steps: int = 1) -> Verdict:
    """Whether the new version is worse in errors or in the time to the first token. `steps`: of the rollout, which share ALPHA."""
    alpha = ALPHA / max(1, steps) / 2  # two tests
    told = f"{_rate(new):.1%} of {new.requests} requests failed, and {_rate(old):.1%} of {old.requests} of the version before"
    errors = error_ratio(old, new)
    if errors >= 1 / alpha and _rate(new) - _rate(old) >= LEAST_ERRORS:
        return Verdict(True, f"it fails more often: {told} (mixture SPRT, p <= {1 / errors:.2g})")
    latency = latency_ratio(old, new)
    slower = _mean(new) - _mean(old)
    timed = f"{math.exp(_mean(new)):.3g} s to the first token, and {math.exp(_mean(old)):.3g} s (geometric means)"
    if latency >= 1 / alpha and slower >= LEAST_SLOWER:
        return Verdict(True, f"it is slower: {timed} (mixture SPRT, p <= {1 / latency:.2g})")
    return Verdict(False, f"{told}; {timed}" if _timed(new) and _timed(old) else told)


def error_ratio(old: ArmTraffic, new: ArmTraffic) -> float:
    """Likelihood ratio of "the new one fails more often" to "both alike".

    Were both alike, each error would be the new one's with the probability of its share of the requests, whatever the error rate
    is: a test of that one number, exact also where errors are few.
    """
    both, errors = old.requests + new.requests, old.errors + new.errors
    if not (old.requests and new.requests and errors):
        return 1.0
    share = new.requests / both
    logs = []
    for ratio in _RATIOS:
        wanted = share * ratio / (share * ratio + 1 - share)
        logs.append(new.errors * math.log(wanted / share) + old.errors * math.log((1 - wanted) / (1 - share)))
    return _exp(_log_mean(logs))


def latency_ratio(old: ArmTraffic, new: ArmTraffic) -> float:
    """The same of "the new one's mean log seconds are higher": normal likelihood, half-normal prior over the difference."""
    if _timed(old) < LEAST_TIMED or _timed(new) < LEAST_TIMED:
        return 1.0
    noise = _variance(old) / _timed(old) + _variance(new) / _timed(new)
    if noise <= 0:
        return 1.0
    prior = _SPREAD**2
    difference = _mean(new) - _mean(old)
    exponent = prior * difference**2 / (2 * noise * (noise + prior))
    above = 0.5 * math.erfc(-difference * _SPREAD / math.sqrt(noise * (noise + prior)) / math.sqrt(2))
    if above <= 0:
        return 0.0
    return _exp(math.log(2 * above) + 0.5 * math.log(noise / (noise + prior)) + exponent)


def _timed(arm: ArmTraffic) -> int:
    return max(0, arm.requests - arm.errors)


def _rate(arm: ArmTraffic) -> float:
    return arm.errors / arm.requests if arm.requests else 0.0


def _mean(arm: ArmTraffic) -> float:
    return arm.log_seconds / _timed(arm) if _timed(arm) else 0.0


def _variance(arm: ArmTraffic) -> float:
    count = _timed(arm)
    return max(0.0, arm.log_seconds_squared - arm.log_seconds**2 / count) / (count - 1)


def _exp(logarithm: float) -> float:
    return math.exp(min(700.0, logarithm))


def _log_mean(logs: list[float]) -> float:
    top = max(logs)
    return top + math.log(sum(math.exp(one - top) for one in logs) / len(logs))
