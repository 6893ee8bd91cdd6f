"""The documentation is true where a machine can tell: manifests are valid, links lead somewhere, targets exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune_cli.documents import read_jobs

REPO = Path(__file__).parents[2]
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "examples" / "README.md", *sorted((REPO / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_pages(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    for index, block in enumerate(re.findall(r"```yaml\n(.*?)```", text, re.S)):
        if "kind: FineTuneJob" in block:
            path = tmp_path / f"{index}.yaml"
            path.write_text(block)
            assert read_jobs(path)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"
    makefile = (REPO / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z]+)`", text):
        assert f"\n{target}:" in makefile, f"{page.name}: make {target}"


def test_every_reason_of_prepare_stands_in_the_first_job_page() -> None:
    page = (REPO / "docs" / "first-job.md").read_text()
    sources = (
        REPO / "trainer_image" / "finetune_trainer" / "prepare.py",
        REPO / "trainer_image" / "finetune_trainer" / "data" / "formats.py",
    )
    reasons = {r for path in sources for r in re.findall(r'UserError\(\s*"([A-Z][A-Za-z]+)"', path.read_text())}
    assert reasons and not {r for r in reasons if r not in page}
