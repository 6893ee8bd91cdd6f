"""Install the chart through Helm itself, which comes as a library: no binary is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

from . import images
from .shell import REPO, step

CHART = REPO / "charts" / "finetune-operator"
RELEASE, NAMESPACE = "finetune-operator", "finetune-system"


def image(reference: str) -> dict[str, str]:
    """An image as values name it."""
    repository, _, tag = reference.rpartition(":")
    return {"repository": repository, "tag": tag}


def local_values() -> dict[str, Any]:
    """Values for the local cluster: its images, pretended GPUs, short back-off."""
    return {
        "image": image(images.operator().reference),
        "trainer": {
            "image": image(images.trainer().reference),
            "allowCPU": True,
            "stageResources": {"cpu": "100m", "memory": "512Mi"},
            "terminationGracePeriodSeconds": 40,
        },
        "settings": {"statusIntervalSeconds": 1, "backoffBaseSeconds": 2, "nodeLostSeconds": 5},
    }


def rendered(values: dict[str, Any], chart: Path = CHART, *, name: str = RELEASE, namespace: str = NAMESPACE) -> list[dict[str, Any]]:
    """What an installation with these values creates. Raises HelmError where the chart's schema refuses them."""
    with helm.Chart.load(str(chart)) as loaded:
        loaded.validate_schema(loaded.merge_values(values))
        texts = loaded.render(values, name=name, namespace=namespace, is_install=True)
    manifests = [text for path, text in texts.items() if path.endswith(".yaml")]
    return [document for text in manifests for document in yaml.safe_load_all(text) if document]


def install(kubeconfig: Path, values: dict[str, Any] | None = None) -> None:
    """Install or upgrade the release and wait until it is ready."""
    with helm.Config(kubeconfig_path=kubeconfig, namespace=NAMESPACE) as config:
        known = {release["name"] for release in config.list()}
        with step("upgrading the chart" if RELEASE in known else "installing the chart"):
            if RELEASE in known:
                config.upgrade(str(CHART), RELEASE, values or local_values(), namespace=NAMESPACE, wait="legacy", timeout=420)
            else:
                config.install(
                    str(CHART), RELEASE, values or local_values(), namespace=NAMESPACE, create_namespace=True, wait="legacy", timeout=420
                )


def uninstall(kubeconfig: Path) -> None:
    """Remove the release; the CustomResourceDefinition and all jobs stay."""
    with helm.Config(kubeconfig_path=kubeconfig, namespace=NAMESPACE) as config:
        config.uninstall(RELEASE, wait="legacy", timeout=120)
