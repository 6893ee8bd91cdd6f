"""A FineTunedModel as a target: a number of its own at the model's storage, and a record that comes last.

The number is claimed by creating its folder with this job's record in it (`finetune.json`), which of two jobs at once one can. Then
come the files, as anywhere else, what it learned from, its probes, and the record: a version that has one is whole.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_api.contract import LINEAGE, result_digest
from finetune_api.evaluation_status import EvaluationStatus
from finetune_api.spec import WHOLE_MODEL_METHODS, PublishTarget
from finetune_api.status import Artifact
from finetune_api.uris import parse_uri
from finetune_api.versions import MERGED, VersionJob, VersionPaths, VersionRecord

from ..data.prompts import prompt_keys
from ..job.context import Context
from ..models.fetch import base_reference
from ..models.versions import UnreadableRecord, claimed_numbers, joined_prompts, parse_record, read_bodies, recorded_numbers
from ..models.weights import ADAPTER_CONFIG
from ..process.errors import InfrastructureError
from ..remote.storage import Storage, storage_of
from .bucket import check_bucket, publish_to_bucket
from .bundle import Held, is_own
from .volume import check_volume, publish_to_volume

_TRIES = 100
"""Numbers that others take first."""


def check_model(context: Context, to: PublishTarget, field: str) -> Held | None:
    """This job's version where the model has it already, also where its files were removed since. Writes nothing that anybody sees.

    Raises UserError or InfrastructureError when `publish_to_model` would fail.
    """
    storage = storage_of(context, str(to.model), context.job.targets)
    shelf = _Shelf(context, storage)
    if (held := shelf.own_record(removed=True)) is not None:
        made = Artifact(uri=held.uri, digest=held.digest, bytes=held.bytes)
        return Held(_artifact(made, str(to.model), held), storage.read(f"{VersionPaths.artifact(held.number)}/{LINEAGE}"))
    look = check_volume if parse_uri(storage.uri).scheme == "pvc" else check_bucket
    look(context, _place(context, to, shelf.next_number), f"model-{to.model}")
    return None


def publish_to_model(context: Context, to: PublishTarget, field: str, bundle: Path) -> Artifact:
    """Add a version, or write this job's own again: the same, whenever it is killed and however often it runs."""
    storage = storage_of(context, str(to.model), context.job.targets)
    shelf = _Shelf(context, storage)
    number = shelf.claim((bundle / LINEAGE).read_bytes())
    put = publish_to_volume if parse_uri(storage.uri).scheme == "pvc" else publish_to_bucket
    made = put(context, _place(context, to, number), f"model-{to.model}", bundle)
    record = _record(context, str(to.model), number, made, bundle)
    if (prompts := _learned(context, record)) is not None:
        storage.write(VersionPaths.prompts(number), prompts)
    if Path(context.layout.probes).exists():
        storage.write(VersionPaths.probes(number), Path(context.layout.probes).read_bytes())
    known = shelf.records.get(number)
    if known is None or known.digest != record.digest:  # of one that is there, others have written the state
        storage.write(VersionPaths.record(number), (json.dumps(record.to_wire(), indent=1, sort_keys=True) + "\n").encode())
    return _artifact(made, str(to.model), record)


class _Shelf:
    """What a storage holds, as one job sees it."""

    def __init__(self, context: Context, storage: Storage) -> None:
        self.context, self.storage = context, storage
        recorded, claimed = recorded_numbers(storage), claimed_numbers(storage)
        self.next_number = max([0, *recorded, *claimed]) + 1
        self.records: dict[int, VersionRecord] = {}
        for number, body in zip(recorded, read_bodies(storage, [VersionPaths.record(number) for number in recorded]), strict=True):
            try:
                if body is not None:
                    self.records[number] = parse_record(number, body)
            except UnreadableRecord:  # the stage catalog names it; its number stays given
                continue
        self.begun = [number for number in claimed if number not in self.records]

    def own_record(self, *, removed: bool) -> VersionRecord | None:
        """The newest version that this job made, or the one that it was restored from."""
        own = [r for r in self.records.values() if is_own(r.job.to_wire(), self.context) and (removed or r.removed_at is None)]
        return max(own, key=lambda record: record.number, default=None)

    def claim(self, lineage: bytes) -> int:
        """This job's number: the one that it has, or the next that nobody has."""
        if (held := self.own_record(removed=False)) is not None:
            return held.number
        for number in self.begun:
            if self._is_own(number):
                return number
        for number in range(self.next_number, self.next_number + _TRIES):
            if self.storage.claim(VersionPaths.artifact(number), LINEAGE, lineage) or self._is_own(number):
                return number
        raise InfrastructureError("TargetContended", f"{self.storage.uri}: others took {_TRIES} numbers in the meantime")

    def _is_own(self, number: int) -> bool:
        body = self.storage.read(f"{VersionPaths.artifact(number)}/{LINEAGE}")
        try:
            return body is not None and is_own(json.loads(body)["job"], self.context)
        except (ValueError, KeyError, TypeError):
            return False


def _place(context: Context, to: PublishTarget, number: int) -> PublishTarget:
    """The version's folder as a target of its own."""
    model = context.job.models[str(to.model)]
    uri = f"{model.storage}/{VersionPaths.artifact(number)}"
    return to.model_copy(update={"uri": uri, "model": None, "s3_endpoint": model.s3_endpoint})


def _artifact(made: Artifact, model: str, record: VersionRecord) -> Artifact:
    rank = 0 if record.form == "Model" else record.rank
    return made.model_copy(update={"model": model, "version": record.number, "rank": rank})


def _record(context: Context, model: str, number: int, made: Artifact, bundle: Path) -> VersionRecord:
    job, spec = context.job, context.spec
    whole = spec.tuning.method in WHOLE_MODEL_METHODS
    evaluation: EvaluationStatus | None = None
    if Path(context.layout.evaluation_report).exists():
        evaluation = EvaluationStatus.model_validate(context.read_json(context.layout.evaluation_report))
    origin = parse_uri(spec.tuning.continue_from) if spec.tuning.continue_from is not None else None
    return VersionRecord(
        number=number,
        job=VersionJob(name=job.name, uid=job.uid, namespace=job.namespace, spec=result_digest(spec)),
        uri=made.uri,
        digest=made.digest,
        bytes=made.bytes,
        form="Model" if whole else "Adapter",
        rank=None if whole else lora_rank(json.loads((bundle / ADAPTER_CONFIG).read_text())),
        merged=not whole and (bundle / MERGED).is_dir(),
        base=base_reference(context),
        data_digest=context.read_json(context.layout.data_report)["dataset"]["digest"],
        parent=int(origin.revision) if origin is not None and (origin.scheme, origin.name) == ("model", model) else None,
        tuning=spec.tuning.to_wire(),
        evaluation=evaluation,
        created_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def lora_rank(config: dict[str, Any]) -> int | None:
    """The largest rank in an adapter_config.json; None where the adapter is none of LoRA's."""
    if config.get("peft_type") != "LORA":
        return None
    return max(int(config["r"]), *(int(rank) for rank in (config.get("rank_pattern") or {}).values()), 1)


def _learned(context: Context, record: VersionRecord) -> bytes | None:
    """Digests of the prompts that it learned from, those of another line's version too; None where they are not all known."""
    own = prompt_keys(context.layout.train_rows)
    if context.spec.tuning.continue_from is None or record.parent is not None:  # what a parent of the line learned from is with the parent
        return own
    earlier = Path(context.layout.parent_prompts)
    if not earlier.exists():
        return None
    return joined_prompts(own, earlier.read_bytes())
