"""F6: several operators, of which one acts. They are the tests' own, so that no other operator serves these jobs."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from kubernetes import client

from tests.component.conftest import Api, Kubelet, Operator, until
from tests.component.test_operator import WHOLE, metrics, phase
from tests.factory import MINIMAL


def test_f6_two_operators_and_one_acts(api: Api, kubelet: Kubelet, tmp_path: Path) -> None:
    """The one that stands by takes over: after a crash when the lease has run out, after an orderly end at once."""
    lease = {"FINETUNE_LEASE": "finetune-operator", "FINETUNE_NAMESPACE": api.namespace, "FINETUNE_LEASE_SECONDS": "6"}
    coordination = client.CoordinationV1Api(api.core.api_client)

    def holder() -> str:
        return str(coordination.read_namespaced_lease("finetune-operator", api.namespace).spec.holder_identity or "")

    def acts(one: Operator) -> bool:
        return "this operator acts" in one.logs.read_text()

    kubelet.hold = {"train"}
    first, second, third = (Operator(api, tmp_path / f"{n}.log") for n in range(3))
    try:
        first.start(**lease)
        until("the first acts", lambda: acts(first))
        second.start(**lease)
        until("the second stands by", lambda: "standing by" in second.logs.read_text())
        api.create_job(WHOLE)
        phase(api, "Training")
        assert not acts(second) and "PrepareStarted" not in second.logs.read_text()
        assert 'finetune_jobs{phase="Training"} 1.0' in metrics(first) and "finetune_leader 1.0" in metrics(first)
        assert "finetune_jobs{" not in metrics(second) and "finetune_leader 0.0" in metrics(second), "jobs are counted once"
        before = holder()
        first.kill()
        began = time.monotonic()
        until("the second acts", lambda: acts(second), 60)
        assert time.monotonic() - began > 2 and (held := holder()) != before
        third.start(**lease)
        until("the third stands by", lambda: "standing by" in third.logs.read_text())
        assert second.terminate() == 0
        assert holder() != held, "it was given back, not left to run out"
        until("the third acts", lambda: acts(third), 60)
        kubelet.hold = set()
        status = phase(api, "Succeeded")
        assert status["attempt"] == 0 and not kubelet.broken
    finally:
        for one in (first, second, third):
            if one.process is not None and one.process.poll() is None:
                one.kill()


def test_f6_an_operator_that_was_frozen_does_not_act_any_more(api: Api, kubelet: Kubelet, tmp_path: Path) -> None:
    lease = {"FINETUNE_LEASE": "finetune-operator", "FINETUNE_NAMESPACE": api.namespace, "FINETUNE_LEASE_SECONDS": "3"}
    first, second = Operator(api, tmp_path / "first.log"), Operator(api, tmp_path / "second.log")
    try:
        first.start(**lease)
        until("the first acts", lambda: "this operator acts" in first.logs.read_text())
        second.start(**lease)
        until("the second stands by", lambda: "standing by" in second.logs.read_text())
        assert first.process is not None
        first.process.send_signal(signal.SIGSTOP)
        until("the second acts", lambda: "this operator acts" in second.logs.read_text(), 60)
        api.create_job(MINIMAL)
        phase(api, "Succeeded")
        first.process.send_signal(signal.SIGCONT)
        assert first.process.wait(timeout=20) != 0, "it ends, and is started anew as one that stands by"
        assert "PrepareStarted" not in first.logs.read_text() and "LeaseLost" in first.logs.read_text()
    finally:
        for one in (first, second):
            if one.process is not None and one.process.poll() is None:
                one.kill()
