"""`make sbom`: CycloneDX bills of materials of both images, Python packages with versions and licences, and a list of licences."""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from .environment import LOCKS, name_of, pins, site_packages


def _licence(package: Distribution) -> str:
    meta = package.metadata
    if "License-Expression" in meta:
        return str(meta["License-Expression"])
    names = [
        c.rsplit(" :: ", 1)[1]
        for c in meta.get_all("Classifier") or ()
        if c.startswith("License :: ") and c.rsplit(" :: ", 1)[1] != "OSI Approved"
    ]
    if names:
        return " OR ".join(sorted(names))
    text = str(next(iter(meta.get_all("License") or [""]))).strip()
    return text.splitlines()[0][:80] if text else "not stated"


def bill(name: str) -> dict[str, Any]:
    """The bill of an image's Python packages, in the order of their names."""
    folders = [str(site_packages("dev")), str(site_packages("trainer"))]
    installed = {d.metadata["Name"].lower().replace("_", "-"): d for d in distributions(path=folders)}
    found = {package: installed[package] for package in pinned(name) if package in installed}  # a marker may leave one out
    components = [
        {
            "type": "library",
            "name": d.metadata["Name"],
            "version": d.version,
            "purl": f"pkg:pypi/{key}@{d.version.replace('+', '%2B')}",
            "licenses": [{"license": {"name": _licence(d)}}],
        }
        for key, d in sorted(found.items())
    ]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": f"finetune-{name}"}},
        "components": components,
    }


def pinned(name: str) -> set[str]:
    """Names in the image's lock file."""
    return {name_of(pin).lower().replace("_", "-") for pin in pins(LOCKS[name])}


def write(target: Path) -> None:
    """Both bills, and the licences by number of packages, into a folder."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("operator", "trainer"):
        found = bill(name)
        (target / f"sbom-{name}.cdx.json").write_text(json.dumps(found, indent=1) + "\n")
        licences = Counter(c["licenses"][0]["license"]["name"] for c in found["components"])
        lines = [f"{count:4} {licence}" for licence, count in sorted(licences.items(), key=lambda item: (-item[1], item[0]))]
        (target / f"licences-{name}.txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Entry point."""
    write(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
