"""catalog: bring what a FineTunedModel keeps in line with what was decided, and tell the operator what is there.

    python -m finetune_trainer catalog --model model.json

Knows nothing of jobs. It may be killed and run again at any point: what is as wanted is left alone.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_api.contract import CatalogFile, CatalogReport, StageResult, catalog_path
from finetune_api.versions import VersionPaths, VersionRecord

from ..models.versions import UnreadableRecord, parse_record, read_bodies, recorded_numbers
from ..process import redaction
from ..remote.operator import deliver
from ..remote.storage import open_storage

log = logging.getLogger("finetune.catalog")
_MOST_TOLD = 100


def load(model_file: str) -> CatalogFile:
    """Read model.json. What is secret of it is never said from here on."""
    found = CatalogFile.model_validate_json(Path(model_file).read_text())
    redaction.add_secrets(found.secrets.values())
    return found


def catalog(wanted: CatalogFile) -> StageResult:
    """Run the stage."""
    storage = open_storage(wanted.storage, wanted.targets, wanted.secrets.get("storage"))

    # 1. What is there
    numbers = recorded_numbers(storage)
    bodies = read_bodies(storage, [VersionPaths.record(number) for number in numbers])
    records: dict[int, VersionRecord] = {}
    unreadable: list[str] = []
    documents: dict[int, dict[str, Any]] = {}
    for number, body in zip(numbers, bodies, strict=True):
        try:
            if body is not None:
                records[number], documents[number] = parse_record(number, body), json.loads(body)
        except UnreadableRecord as failure:
            unreadable.append(str(failure))

    # 2. Records say what was decided; what a later release wrote there stays
    for number in records:
        more: dict[str, Any] = {}
        if (state := wanted.states.get(number)) is not None and state != records[number].state:
            more["state"] = state
        if number in wanted.remove and records[number].removed_at is None:
            more["removedAt"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if more:
            log.info("version %d: %s", number, more)
            body = (json.dumps({**documents[number], **more}, indent=1, sort_keys=True) + "\n").encode()
            storage.write(VersionPaths.record(number), body)
            records[number] = parse_record(number, body)

    # 3. Files go once the record says so. prompts/ stay: later versions may descend from it
    for number in wanted.remove:
        storage.remove(VersionPaths.artifact(number))
        storage.remove(VersionPaths.probes(number))

    # 4. The operator makes the object of it
    report = CatalogReport(done=wanted.digest, records=list(records.values()), unreadable=unreadable[:_MOST_TOLD])
    deliver(catalog_path(wanted.namespace, wanted.name), report.to_wire())
    told = f"{len(records)} versions" + (f"; unreadable: {', '.join(unreadable[:3])}" if unreadable else "")
    return StageResult(reason="Cataloged", message=told, result={"done": wanted.digest})
