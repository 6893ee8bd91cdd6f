"""The bundle: what is published, with its model card, its lineage and its digests. Knows nothing of where it goes."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune_api.contract import LINEAGE, SUMS, result_digest
from finetune_api.spec import Output
from finetune_api.status import Artifact, ExportedForm

from ..data.shape import is_conversation
from ..job.context import Context
from ..models.weights import ADAPTER_CONFIG
from ..process.errors import InfrastructureError, UserError
from .card import CardFacts, model_card
from .usage import Usage, shared_system_text

_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets")
_MOST_PARENTS = 20
_LEFT_OUT = {"training_args.bin"}
"""Pickles: they may not leave the job."""


def make_bundle(context: Context) -> Path:
    """The files to publish, made in the workspace: the same bytes for every target and every try."""
    output, bundle = Path(context.layout.output), Path(context.layout.job, "publish")
    shutil.rmtree(bundle, ignore_errors=True)
    bundle.mkdir()
    for file in sorted(output.iterdir()):
        if file.is_file() and file.name not in _LEFT_OUT and file.suffix not in (".bin", ".pt", ".pth") and file.name != "README.md":
            shutil.copyfile(file, bundle / file.name)
    if not any(bundle.glob("*.safetensors")):
        raise InfrastructureError("NothingToPublish", "training left no .safetensors file in the workspace")
    _name_base(context, bundle)
    forms: list[ExportedForm] = []
    if context.spec.output != Output():
        from .forms import export  # starts torch, which most jobs can do without here

        forms = export(context, bundle)
    context.write_json(context.layout.forms_report, [form.to_wire() for form in forms])
    evaluation = _optional(context, context.layout.evaluation_report)
    report = context.read_json(context.layout.data_report)
    dataset = report["dataset"]
    base = context.read_json(context.layout.reference("model"))
    parents = _parents(context)
    versions = {name: version(name) for name in _LIBRARIES}
    facts = CardFacts(
        context.job,
        dataset,
        base,
        evaluation,
        parents,
        versions,
        _optional(context, context.layout.plan),
        _usage(context, base, report),
        forms,
    )
    (bundle / "README.md").write_text(model_card(facts))
    lineage = {
        "job": {"name": context.job.name, "namespace": context.job.namespace, "uid": context.job.uid, "spec": result_digest(context.spec)},
        "base": {"uri": base["uri"], "fingerprint": base["fingerprint"]},
        "dataset": {"digest": dataset["digest"], "train": dataset["train"], "eval": dataset["eval"]},
        "evaluation": {k: v for k, v in evaluation.items() if k != "samples"} if evaluation else None,
        "forms": [form.to_wire() for form in forms],
        "parents": parents,
        "libraries": versions,
        "tuning": context.spec.tuning.to_wire(),
    }
    (bundle / LINEAGE).write_text(json.dumps(lineage, indent=1, sort_keys=True) + "\n")
    (bundle / SUMS).write_text(digests(bundle))
    return bundle


def _usage(context: Context, base: dict[str, Any], report: dict[str, Any]) -> Usage:
    """How it was trained is how it is used: with the chat template where the rows had turns, with the system text that all had."""
    shape: dict[str, Any] = {}
    if Path(context.layout.train_rows).exists():
        from ..data.store import read_rows

        shape = json.loads(read_rows(context.layout.train_rows, ("row",), 1)[0]["row"])
    adapter = _optional(context, f"{context.layout.output}/{ADAPTER_CONFIG}") or {}
    return Usage(context.job, base, is_conversation(shape), shared_system_text(report), adapter)


def _parents(context: Context) -> list[dict[str, Any]]:
    """The adapters that this one goes on from, the nearest first; each names the job, the data and the base it came from."""
    if context.spec.tuning.continue_from is None:
        return []
    noted = context.read_json(context.layout.reference("adapter"))
    parent: dict[str, Any] = {"uri": noted["uri"], "fingerprint": noted["fingerprint"]}
    try:
        told = json.loads((Path(noted["path"]) / LINEAGE).read_text())
        return [{**parent, "job": told["job"], "dataset": told["dataset"]}, *told.get("parents", [])][:_MOST_PARENTS]
    except (OSError, ValueError, KeyError, TypeError):  # not one of ours
        return [parent]


def _name_base(context: Context, bundle: Path) -> None:
    """Name the base model by its URI, not by the folder it was mounted at."""
    config = bundle / ADAPTER_CONFIG
    if config.exists():
        uri = context.spec.model.uri
        document = json.loads(config.read_text())
        document["base_model_name_or_path"] = uri.removeprefix("hf://").partition("@")[0] if uri.startswith("hf://") else uri
        config.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def _optional(context: Context, path: str) -> dict[str, Any] | None:
    return context.read_json(path) if Path(path).exists() else None


@dataclass(frozen=True)
class Held:
    """This job's result at a target that has it already."""

    artifact: Artifact
    lineage: bytes | None
    """Its `finetune.json`; None where the files were removed since."""

    @property
    def forms(self) -> list[ExportedForm]:
        """The forms that it was published with, as far as its record says."""
        try:
            return [ExportedForm.model_validate(form) for form in json.loads(self.lineage or b"{}")["forms"]]
        except (ValueError, KeyError, TypeError):  # of a release that exported none, or another's writing
            return []


def is_own(owner: Any, context: Context) -> bool:
    """Whether a record's `job` is this one, or the one that it was restored from: of its name, with the same to make."""
    if not isinstance(owner, dict):
        return False
    job = context.job
    same = (owner.get("namespace"), owner.get("name"), owner.get("spec")) == (job.namespace, job.name, result_digest(context.spec))
    return same or owner.get("uid") == job.uid


def refuse_foreign(record: str | bytes | None, context: Context, instead: str) -> None:
    """Raise UserError where what lies at a target is not this job's. `record`: its `finetune.json`, None where it has none."""
    try:
        owner = json.loads(record or b"")["job"]
    except (ValueError, KeyError, TypeError):
        message = f"the target holds something that no FineTuneJob published; choose another {instead}"
        raise UserError("TargetTaken", message) from None
    if not is_own(owner, context):
        told = owner if isinstance(owner, dict) else {}
        raise UserError(
            "TargetTaken",
            f"the target holds the result of job {told.get('namespace')}/{told.get('name')} ({told.get('uid')}), "
            f"which was to make another; choose another {instead}",
        )


def digests(folder: Path) -> str:
    """Every file's SHA-256, as `sha256sum` writes it."""
    lines = []
    for file in files(folder):
        with file.open("rb") as stream:
            lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {file.relative_to(folder)}\n")
    return "".join(lines)


def files(folder: Path) -> list[Path]:
    """All files but the list of digests itself, in a stable order."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / SUMS)


def artifact(bundle: Path, uri: str) -> Artifact:
    """What the status says of a bundle that was published to `uri`."""
    size = sum(p.stat().st_size for p in [*files(bundle), bundle / SUMS])
    return artifact_of((bundle / SUMS).read_bytes(), size, uri)


def artifact_of(sums: bytes, size: int, uri: str) -> Artifact:
    """The same of one whose list of digests and size in bytes are known."""
    return Artifact(uri=uri, digest=f"sha256:{hashlib.sha256(sums).hexdigest()}", bytes=size)
