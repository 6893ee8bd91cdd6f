"""What is released beside the code: bills of materials, the site, one version everywhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

from tests.cluster import sbom
from tests.cluster.shell import REPO


def test_the_bill_of_the_operators_image_is_its_lock_file() -> None:
    found = sbom.bill("operator")
    named = {c["name"].lower().replace("_", "-") for c in found["components"]}
    assert sbom.pinned("operator") <= named, sbom.pinned("operator") - named
    assert all(re.fullmatch(r"pkg:pypi/[a-z0-9.-]+@[^@]+", c["purl"]) for c in found["components"])
    stated = [c for c in found["components"] if c["licenses"][0]["license"]["name"] != "not stated"]
    assert len(stated) >= 0.9 * len(named)
    assert json.loads(json.dumps(found)) == found


def test_one_version_everywhere() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((REPO / "charts" / "finetune-operator" / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == project
    assert f"## {project}" in (REPO / "CHANGELOG.md").read_text() or "## Unreleased" in (REPO / "CHANGELOG.md").read_text()


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Every page is in the navigation, and every link and anchor leads somewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, check=False, env={"NO_MKDOCS_2_WARNING": "1", "PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").exists() and (tmp_path / "site" / "cli" / "index.html").exists()
