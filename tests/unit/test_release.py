"""What is released beside the code: bills of materials, the site, one version everywhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import helm_python as helm

from tests.cluster import release, sbom
from tests.cluster.shell import REPO


def test_the_bill_of_the_operators_image_is_its_lock_file() -> None:
    found = sbom.bill("operator")
    named = {c["name"].lower().replace("_", "-") for c in found["components"]}
    assert sbom.pinned("operator") <= named, sbom.pinned("operator") - named
    assert all(re.fullmatch(r"pkg:pypi/[a-z0-9.-]+@[^@]+", c["purl"]) for c in found["components"])
    stated = [c for c in found["components"] if c["licenses"][0]["license"]["name"] != "not stated"]
    assert len(stated) >= 0.9 * len(named)
    assert json.loads(json.dumps(found)) == found


def test_a_release_is_the_same_when_it_is_made_twice(tmp_path: Path) -> None:
    first = release.build(tmp_path / "a")
    assert first == release.build(tmp_path / "b")
    assert {f"finetune-operator-{release.version()}.tgz", "sbom-operator.cdx.json", "sbom-trainer.cdx.json"} <= set(first)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "a", check=True)
    with helm.Chart.load(str(tmp_path / "a" / f"finetune-operator-{release.version()}.tgz")) as chart:
        rendered = chart.render({}, name="x", namespace="y", is_install=True)
    assert any("kind: Deployment" in text for text in rendered.values()), "what is packed is a chart"


def test_one_version_everywhere() -> None:
    """What else keeps a release back (an unreleased section, changes) is `make release-check`'s business."""
    found = [problem for problem in release.problems() if not problem.startswith(("not committed", "CHANGELOG.md"))]
    assert found == []


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Every page is in the navigation, and every link and anchor leads somewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, check=False, env={"NO_MKDOCS_2_WARNING": "1", "PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").exists() and (tmp_path / "site" / "cli" / "index.html").exists()
