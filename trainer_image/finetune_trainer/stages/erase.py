"""erase: one person's rows out of a workspace, or out of what a FineTunedModel keeps; told file by file.

    python -m finetune_trainer erase <request.json

Reads one line, an ErasureRequest, and answers with one line, a StageResult: what was named is a person's, and stands on no command
line and in no log. Belongs to no job: `finetune erase` sees to it that no job is at work there.
"""

from __future__ import annotations

import logging

from pydantic import ValidationError

from finetune_api.contract import StageResult
from finetune_api.erasure import ErasureReport, ErasureRequest

from ..erasure.match import BadMatch, Match, make_match
from ..erasure.storage import erase_from_storage
from ..erasure.workspace import erase_from, job_folders
from ..process import redaction
from ..remote.storage import open_storage

log = logging.getLogger("finetune.erase")


def read_request(line: str) -> ErasureRequest:
    """Raises BadMatch. What is secret of it is never said from here on."""
    try:
        request = ErasureRequest.model_validate_json(line)
    except ValidationError as failure:
        fields = ", ".join(sorted({".".join(map(str, error["loc"])) or "it" for error in failure.errors()}))
        raise BadMatch(f"no request that this image knows ({fields}): use a finetune of its version") from None
    redaction.add_secrets([request.keys] if request.keys is not None else [])
    return request


def erase(request: ErasureRequest) -> StageResult:
    """Do what is asked."""
    match = make_match(request.containing, request.rows, request.where, request.readings)
    if request.storage is not None:
        storage = open_storage(request.storage, request.mounts, request.keys)
        report = erase_from_storage(storage, match, request.trained, dry_run=request.dry_run)
    else:
        report = _from_workspace(request, match)
    report.matching = match.rows
    count = sum(not file.kept for file in report.files)
    return StageResult(reason="Erased", message=f"{count} files in {len(report.looked)} places", result=report.to_wire())


def _from_workspace(request: ErasureRequest, match: Match) -> ErasureReport:
    report = ErasureReport(dry_run=request.dry_run)
    for folder in job_folders(str(request.workspace), request.folders):
        found = erase_from(folder, match, dry_run=request.dry_run)
        log.info("%s: %d files", folder.name, len(found.files))
        report.looked.append(folder.name)
        report.files += found.files
        report.notes += found.notes
        report.learned += [found.learned] if found.learned is not None else []
        report.trained += [found.trained] if found.trained is not None else []
    return report
