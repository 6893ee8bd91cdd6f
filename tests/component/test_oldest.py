"""The oldest Kubernetes in support: the chart is taken whole, and a job goes from its creation to its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster import binaries, helm
from tests.cluster.local import LocalCluster
from tests.component.conftest import CRDS, Api, Kubelet, Operator, control_plane, until
from tests.factory import MINIMAL, merged


@pytest.fixture(scope="module")
def oldest() -> Iterator[LocalCluster]:
    """A bare control plane; the definitions come with the chart."""
    with control_plane("oldest", binaries.OLDEST, definitions=()) as target:
        yield target


def test_the_chart_is_taken_and_a_job_succeeds(oldest: LocalCluster, tmp_path: Path) -> None:
    assert binaries.version(binaries.OLDEST) in oldest.kubectl("version")
    manifests = helm.rendered({"webhook": {"enabled": False}})
    oldest.kubectl("create", "namespace", helm.NAMESPACE)
    told = oldest.kubectl("apply", "-n", helm.NAMESPACE, "-f", "-", "--validate=strict", input=yaml.safe_dump_all(manifests))
    assert told.count(" created") == len(manifests) and "Warning" not in told, told
    api = Api(oldest, "default")
    operator, kubelet = Operator(api, tmp_path / "operator.log", watch=""), Kubelet(api)
    for definition in CRDS:
        oldest.define(definition)  # the chart's, until they are served
    operator.start()
    try:
        data = {**MINIMAL["dataset"], "eval": {"splitFraction": 0.1}}
        publish = [{"uri": "pvc://published/support"}]
        api.create_job(merged(MINIMAL, dataset=data, evaluation={"gate": {"minImprovement": 0.1}}, publish=publish))
        until("it has ended", lambda: api.status().get("phase") in ("Succeeded", "Failed"), 90)
        assert api.status()["phase"] == "Succeeded", api.status()
        api.delete_job()
        until("nothing is left", lambda: not api.owned(), 60)
    finally:
        kubelet.stop()
        operator.kill()
        print(operator.logs.read_text()[-3000:])
