"""The documentation is true where a machine can tell: manifests are valid, links lead somewhere, targets exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
import yaml

from finetune_api.reasons import REASONS
from finetune_api.spec import FineTuneJobSpec
from finetune_api.validation import parse_spec
from finetune_cli.app import app
from finetune_cli.documents import read_jobs
from finetune_operator.queueing.blind import FORBIDDEN
from tests.factory import MINIMAL

REPO = Path(__file__).parents[2]
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "examples" / "README.md", *sorted((REPO / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_pages(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    for index, block in enumerate(re.findall(r"```yaml\n(.*?)```", text, re.S)):
        if "\nkind: FineTune" in f"\n{block}":  # not one that another object names
            path = tmp_path / f"{index}.yaml"
            path.write_text(block)
            assert bool(read_jobs(path)) == ("kind: FineTuneJob" in block)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"
    makefile = (REPO / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z]+)`", text):
        assert f"\n{target}:" in makefile, f"{page.name}: make {target}"


@pytest.mark.parametrize("path", sorted((REPO / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_examples_are_valid(path: Path) -> None:
    if "kind: FineTune" in path.read_text():
        read_jobs(path)


def test_every_reason_a_job_waits_for_is_explained() -> None:
    page = (REPO / "docs" / "queues.md").read_text()
    source = "".join(path.read_text() for path in (REPO / "operator" / "finetune_operator" / "queueing").glob("*.py"))
    reasons = set(re.findall(r'"((?:Waiting|Queue|Never|Namespace|Stopping|NoNode)[A-Za-z]*)"', source)) - {"QueueReport"}
    reasons.add(FORBIDDEN)
    assert len(reasons) >= 12 and not {r for r in reasons if f"`{r}`" not in page}


def test_every_module_the_docs_name_exists() -> None:
    files = [
        f"/{path.relative_to(REPO)}"
        for folder in ("operator", "trainer_image", "tests", "examples")
        for path in (REPO / folder).rglob("*.py")
    ]
    named = {(page.name, name) for page in PAGES for name in re.findall(r"`((?:\w+/)*\w+\.py)\b", page.read_text())}
    assert len(named) > 15
    assert not [missing for missing in sorted(named) if not any(path.endswith(f"/{missing[1]}") for path in files)]


def test_every_reason_a_job_ends_with_is_known_and_explained() -> None:
    """Metrics are labelled by the closed set, people read the page."""
    page = (REPO / "docs" / "errors.md").read_text()
    sources = list((REPO / "trainer_image" / "finetune_trainer").rglob("*.py"))
    pattern = r'(?:UserError|InfrastructureError|OutOfMemory|time_limit)\(\s*(?:[A-Z_]+, )?"([A-Z][A-Za-z]+)"'
    reasons = {r for path in sources for r in re.findall(pattern, path.read_text())}
    reasons |= {r for path in sources for r in re.findall(r'self\._apply\([^)]*?"([A-Z][A-Za-z]+Rows)"', path.read_text())}
    assert len(reasons) > 60 and not {r for r in reasons if not re.search(rf"\b{r}\b", page)}
    assert not reasons - REASONS, "finetune_api.reasons lacks them"
    decided = "".join(path.read_text() for path in (REPO / "operator" / "finetune_operator" / "reconcile").rglob("*.py"))
    own = set(re.findall(r'(?:\.fail\(|ending = |Failure\("[A-Za-z]+", )"([A-Z][A-Za-z]+)"', decided))
    assert len(own) > 10 and not own - REASONS, own - REASONS


def test_the_tables_of_the_docs_name_everything_there_is() -> None:
    from typing import get_args

    from finetune_api.spec import DatasetFormat, Method, Metric, Objective

    for page, names in (
        ("methods.md", (*get_args(Method), *get_args(Objective))),
        ("evaluation.md", get_args(Metric)),
        ("data.md", get_args(DatasetFormat)),
    ):
        text = (REPO / "docs" / page).read_text()
        assert not [name for name in names if name not in text], page


@pytest.mark.parametrize("page", sorted((REPO / "docs").glob("*.md")), ids=lambda p: p.name)
def test_pieces_of_a_spec_are_valid(page: Path) -> None:
    """A YAML block that holds blocks of a spec is valid within a small job."""
    base = {**MINIMAL, "dataset": {"train": {"uri": "pvc://a/b.jsonl"}, "eval": {"splitFraction": 0.1}}}
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        document = yaml.safe_load(block)
        if isinstance(document, dict) and set(document) <= set(FineTuneJobSpec.model_fields):
            dataset = {**base["dataset"], **document.get("dataset", {})}
            parse_spec({**base, **document, "dataset": dataset})


def test_every_command_of_the_docs_exists() -> None:
    """`finetune ...` in blocks and in the text: the command, and each of its options."""
    group = typer.main.get_command(app)
    context = group.make_context("finetune", [], resilient_parsing=True)
    inner = {name: command.commands for name, command in group.commands.items() if hasattr(command, "commands")}  # type: ignore[attr-defined]
    seen = set()
    for page in PAGES:
        text = page.read_text()
        blocks = "\n".join(re.findall(r"```(?:sh)?\n(.*?)```", text, re.S)).replace("\\\n", " ")
        lines = [line.strip().removeprefix("$ ") for line in blocks.splitlines()] + re.findall(r"`([^`\n]+)`", text)
        for line in lines:
            words = line.split("#")[0].split()
            if not words or words[0] not in ("finetune", ".venv/bin/finetune") or len(words) < 2 or words[1].startswith("-"):
                continue
            command = group.get_command(context, words[1])  # type: ignore[attr-defined]
            if words[1] in inner and len(words) > 2:  # a group of commands
                command = inner[words[1]].get(words[2])
            assert command is not None, f"{page.name}: {line}"
            if isinstance(command, typer.core.TyperGroup) and len(words) > 2:
                command = command.get_command(context, words[2])
                assert command is not None, f"{page.name}: {line}"
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            used = {word.strip("[]").split("=")[0] for word in words[2:] if word.strip("[]").startswith("-")}
            assert used <= known, f"{page.name}: {line}: {used - known}"
            seen.add(words[1])
    assert len(seen) >= 15, seen
