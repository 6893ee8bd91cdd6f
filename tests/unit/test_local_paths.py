"""What a run on this machine takes and tells: plain paths and folders; one cause told once."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune_api.status import FineTuneJobStatus
from finetune_api.validation import InvalidDocument
from finetune_cli.documents import read_jobs
from finetune_cli.local import MissingVolume, job_file
from finetune_cli.paths import LocalPaths
from finetune_cli.view import JobView
from finetune_trainer.data.reading import rows
from finetune_trainer.job.context import Context
from tests.unit.test_prepare import lines
from tests.unit.test_prepare import rows as made


def manifest(folder: Path, **spec: Any) -> Path:
    path = folder / "job.yaml"
    job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "j"}, "spec": spec}
    path.write_text(json.dumps(job))
    return path


def read(path: Path) -> tuple[Context, dict[str, str]]:
    paths = LocalPaths(path.resolve().parent)
    ((metadata, spec),) = read_jobs(path, paths.rewrite)
    return Context(job_file(metadata, spec, paths.volumes), str(path.parent / "workspace")), paths.volumes


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with data, and a model beside it."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    folder = tmp_path / "my project"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_bytes(lines(made(6)))
    return folder


def test_paths_begin_at_the_manifests_folder(project: Path) -> None:
    for uri in ("data/train.jsonl", "./data/train.jsonl", str(project / "data" / "train.jsonl"), "data", "../my project/data"):
        context, volumes = read(manifest(project, model={"uri": "../models/tiny"}, dataset={"train": {"uri": uri}}))
        assert len(list(rows(context, context.spec.dataset.train, "train"))) == 6
        again, same = read(manifest(project, model={"uri": "../models/tiny"}, dataset={"train": {"uri": uri}}))
        assert (again.job.dumps(), same) == (context.job.dumps(), volumes), "the same path goes by the same name"


def test_every_uri_of_a_job_may_be_a_path(project: Path) -> None:
    (project / "adapter").mkdir()
    (project / "texts").mkdir()
    path = manifest(
        project,
        model={"uri": "../models/tiny"},
        dataset={"train": {"uri": "data/train.jsonl"}, "mix": [{"uri": "data"}], "eval": {"uri": "./data/train.jsonl"}},
        tuning={"continueFrom": "adapter"},
        evaluation={"forgetting": {"uri": "./texts"}},
        publish=[{"uri": "./out/support"}],
    )
    context, volumes = read(path)
    assert all(uri.startswith("pvc://") for uri in context.spec.source_uris)
    assert str(project / "out") in volumes.values() and context.job.targets
    assert {"data", "adapter"} <= {uri.rpartition("/")[2] for uri in context.spec.source_uris}


def test_what_only_a_cluster_knows_is_refused_with_its_field(project: Path) -> None:
    given = {"model": {"uri": "../models/tiny"}, "dataset": {"train": {"uri": "data/train.jsonl"}}}
    with pytest.raises(MissingVolume, match=r"spec.publish\[1\].model: support-bot: .* write uri: pvc://CLAIM/support-bot in its place"):
        read(manifest(project, **given, publish=[{"uri": "./out/support"}, {"model": "support-bot"}]))
    with pytest.raises(MissingVolume, match=r"spec.tuning.continueFrom: model://support-bot@2: .* write pvc://CLAIM/PATH"):
        read(manifest(project, **given, tuning={"continueFrom": "model://support-bot@2"}))


def test_what_is_no_path_is_left_alone(project: Path) -> None:
    with pytest.raises(InvalidDocument, match='"org/model" has no scheme; did you mean hf://org/model'):
        read(manifest(project, model={"uri": "org/model"}, dataset={"train": {"uri": "data/train.jsonl"}}))
    with pytest.raises(InvalidDocument):
        read(manifest(project, model="tiny", dataset=[]))


@pytest.mark.parametrize("uri", ["data/none.jsonl", "./none", "/nowhere/at/all"])
def test_a_path_that_is_not_there_is_told_with_its_field(project: Path, uri: str) -> None:
    with pytest.raises(InvalidDocument, match=r"spec.dataset.train.uri.*there is no such file or folder"):
        read(manifest(project, model={"uri": "../models/tiny"}, dataset={"train": {"uri": uri}}))


def test_odd_names(project: Path) -> None:
    (project / "my rows").mkdir()
    (project / "my rows" / "a.jsonl").write_bytes(lines(made(3)))
    (project / "my rows.jsonl").write_bytes(lines(made(3)))
    context, _ = read(manifest(project, model={"uri": "../models/tiny"}, dataset={"train": {"uri": "my rows"}}))
    assert len(list(rows(context, context.spec.dataset.train, "train"))) == 3
    with pytest.raises(InvalidDocument, match="rename 'my rows.jsonl'"):
        read(manifest(project, model={"uri": "../models/tiny"}, dataset={"train": {"uri": "my rows.jsonl"}}))


def test_without_a_rewrite_a_path_is_refused(project: Path) -> None:
    with pytest.raises(InvalidDocument, match="is not a data set URI|has no scheme"):
        read_jobs(manifest(project, model={"uri": "hf://a/b"}, dataset={"train": {"uri": "./data/train.jsonl"}}))


def test_the_view_tells_one_cause_once() -> None:
    cause, at = "6 row(s): train row 1 (train.jsonl:1): messages[0].content is empty", "2026-01-01T00:00:00Z"
    conditions = [
        {"type": "DataReady", "status": "False", "reason": "InvalidRows", "message": cause, "lastTransitionTime": at},
        {"type": "Failed", "status": "True", "reason": "InvalidRows", "message": f"{cause} (log: x)", "lastTransitionTime": at},
    ]
    status = FineTuneJobStatus.model_validate({"phase": "Failed", "conditions": conditions})
    console = Console(file=io.StringIO(), width=200)
    assert JobView(console, "j").follow(lambda: status, lambda: None) == "Failed"
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert told.count(cause) == 1 and "✗ Failed: InvalidRows (log: x)" in told
    console.print(JobView(console, "j").summary(status))
    assert f"InvalidRows: {cause}" in console.file.getvalue()  # type: ignore[attr-defined]
