"""FineTunedModels in the terminal: as a table, in detail, versions side by side, and back to the base. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from finetune_api.evaluation_status import EvaluationStatus
from finetune_api.lenient import read
from finetune_api.scalars import printable
from finetune_api.tuned_model import FineTunedModelStatus, ModelVersion
from finetune_api.versions import BaseModelReference, VersionPaths

from .arms import title, verdict
from .cluster import Object
from .options import NotPossible
from .show import age

_STYLES = {"Champion": "bold green", "Candidate": "cyan", "Retired": "", "Rejected": "red"}
_SHORT = 12
"""Characters of a digest that a table shows."""


def status_of(model: Object) -> FineTunedModelStatus:
    """Its status, as far as it can be read."""
    return read(FineTunedModelStatus, model.get("status"))


def version_of(model: Object, number: int | None = None) -> ModelVersion:
    """The version of that number; without one the champion, else the latest. Raises NotPossible."""
    name, status = model["metadata"]["name"], status_of(model)
    if not status.versions:
        raise NotPossible(f"{name} has no version yet: a job with publish: [{{model: {name}}}] makes one")
    if number is None:
        return status.version(status.champion) or max(status.versions, key=lambda version: version.number)
    found = status.version(number)
    if found is None:
        known = ", ".join(str(version.number) for version in status.versions)
        gone = " any more" if number <= status.storage.highest else ""
        raise NotPossible(f"{name} has no version {number}{gone}; there are: {known}")
    return found


def rollback_target(model: Object, number: int | None = None) -> ModelVersion:
    """The version of that number; without one the champion before.

    Raises NotPossible, also where that one is newer: whoever rolls back twice must not come to the version that was just left.
    """
    if number is not None:
        return version_of(model, number)
    name, status = model["metadata"]["name"], status_of(model)
    champion = version_of(model).number if status.champion is None else status.champion
    retired = [version for version in status.versions if version.state == "Retired" and version.number != champion]
    before = max(retired, key=lambda version: (version.promoted_at or "", version.number), default=None)
    if before is None:
        raise NotPossible(f"{name}: no other version that is kept was ever champion; name one: finetune models promote {name} VERSION")
    if before.number > champion:
        older = ", ".join(str(version.number) for version in status.versions if version.number < champion) or "none"
        raise NotPossible(
            f"{name}: before version {champion} the champion was {before.number}, which is newer: name the version to go to (older ones: {older})"
        )
    return before


def table(models: Iterable[Object], *, everywhere: bool) -> Table:
    """One line per model."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for column in (*(["NAMESPACE"] if everywhere else []), "NAME", "CHAMPION", "VERSIONS", "SCORE", "SERVED", "AGE"):
        found.add_column(column, overflow="fold")
    for model in models:
        meta, status = model["metadata"], status_of(model)
        found.add_row(
            *([meta["namespace"]] if everywhere else []),
            meta["name"],
            str(status.champion or ""),
            str(status.count or len(status.versions)),
            Text(printable(status.score)),
            Text(printable(", ".join(status.served))),
            age(meta.get("creationTimestamp")),
        )
    return found


def describe(model: Object) -> RenderableType:
    """The model, then each of its versions, the newest first."""
    meta, spec, status = model["metadata"], model.get("spec") or {}, status_of(model)
    pinned = " (pinned by spec.champion)" if spec.get("champion") is not None and spec["champion"] == status.champion else ""
    waits = f", spec.champion wants {spec['champion']}" if spec.get("champion") is not None and not pinned else ""
    head = _facts(
        ("Model", f"{meta['namespace']}/{meta['name']}"),
        ("Champion", f"{status.champion or 'none'}{pinned}{waits}"),
        ("Promotion", spec.get("promotion", "OnImprovement")),
        ("Score", status.score),
        ("Served by", ", ".join(status.served)),
        ("Storage", spec.get("storage")),
        *((c.type, f"{c.status} {c.reason}: {c.message}".removesuffix(": ")) for c in status.conditions),
    )
    parts: list[RenderableType] = [head]
    for version in sorted(status.versions, key=lambda version: -version.number):
        line = Text(f"\nVersion {version.number}", style="bold")
        line.append(f"  {version.state}", style=_STYLES[version.state]).append(f"  {age(version.created_at)}", style="not bold")
        parts += [line, _details(version)]
    return Group(*parts)


def _details(version: ModelVersion) -> Table:
    evaluation = version.evaluation or EvaluationStatus()
    first = next(iter(evaluation.metrics), "")
    return _facts(
        ("  Job", version.job),
        ("  Digest", version.digest),
        ("  Form", f"{_form(version)}, {version.bytes:,} bytes"),
        ("  Base", origin(version.base)),
        ("  Data", version.data_digest),
        ("  Parent", version.parent),
        ("  Score", f"{first}: {evaluation.told(first)}" if first else ""),
        ("", verdict(evaluation)),
        ("", against_champion(evaluation)),
        ("  Message", version.message),
    )


def _facts(*rows: tuple[str, object]) -> Table:
    found = Table.grid(padding=(0, 2))
    found.add_column(style="bold", min_width=11, no_wrap=True)
    found.add_column(overflow="fold")
    for name, value in rows:
        if value not in (None, ""):
            found.add_row(name, Text(printable(str(value))))
    return found


def origin(base: BaseModelReference | None) -> str:
    """Where a base was read from, with the commit that it stood for: uri@revision."""
    if base is None:
        return ""
    return f"{base.uri.partition('@')[0]}@{base.revision}" if base.revision else base.uri


def against_champion(evaluation: EvaluationStatus) -> str:
    """How it compares with the champion of then."""
    compared = evaluation.champion
    if compared is None:
        return ""
    found = f"against version {compared.version}: {compared.result}"
    if compared.improvement is not None and len(compared.interval) == 2:
        low, high = compared.interval
        found += f", {compared.metric} better by {compared.improvement:.4g}, between {low:.4g} and {high:.4g}"
    return f"{found} ({compared.prompts} prompts{'; ' + compared.message if compared.message else ''})"


def compare(name: str, versions: Sequence[ModelVersion]) -> RenderableType:
    """Versions side by side: the settings that differ, and everything that was measured; what differs is bold."""
    found = Table(header_style="bold")
    found.add_column("")
    for version in versions:
        found.add_column(f"{name}@{version.number}", overflow="fold")
    for facts in (_made_of, _scores):
        columns = [facts(version) for version in versions]
        for row in dict.fromkeys(row for column in columns for row in column):
            values = [printable(column.get(row, "")) for column in columns]
            found.add_row(row, *(Text(value) for value in values), style="" if len(set(values)) == 1 else "bold")
        found.add_section()
    for row in sorted({setting for version in versions for setting in version.settings}):
        values = [printable(version.settings.get(row, "")) for version in versions]
        if len(set(values)) > 1:
            found.add_row(row, *(Text(value) for value in values), style="bold")
    return found if len({version.data_digest for version in versions}) == 1 else Group(found, _OTHER_ROWS)


_OTHER_ROWS = Text(
    "Made of different data: each was measured on its own held-out rows, so scores of different columns do not compare. "
    "What a version is beside the champion of then was measured on the same rows."
)


def _form(version: ModelVersion) -> str:
    rank = f", rank {version.rank}" if version.rank is not None else ""
    return f"{version.form}{rank}{', merged' if version.merged else ''}"


def _made_of(version: ModelVersion) -> dict[str, str]:
    return {
        "state": version.state,
        "job": version.job,
        "digest": short(version.digest),
        "form": _form(version),
        "base": origin(version.base),
        "data": short(version.data_digest),
        "parent": str(version.parent or ""),
    }


def _scores(version: ModelVersion) -> dict[str, str]:
    evaluation = version.evaluation
    if evaluation is None:
        return {}
    found = {"held-out rows": f"{evaluation.examples} of {evaluation.prompts} prompts"}
    for metric in evaluation.metrics:
        found |= {f"{metric}, {title(arm)}": f"{arm.metrics[metric]:.4g}" for arm in evaluation.arms if metric in arm.metrics}
    return found | {"tuned beside base": verdict(evaluation), "beside champion": against_champion(evaluation)}


def short(digest: str) -> str:
    """The beginning of a digest, by which people tell two apart."""
    return digest.removeprefix("sha256:")[:_SHORT]


def ancestry(model: Object, number: int | None = None) -> list[dict[str, Any]]:
    """The version, the one that it goes on from, and so on; then their base. Raises NotPossible.

    Items: version, state, job, digest, dataDigest, createdAt; `removed` with where the record of a version is whose files
    are gone; the base's uri and revision.
    """
    status, storage = status_of(model), str((model.get("spec") or {}).get("storage", "")).rstrip("/")
    version: ModelVersion | None = version_of(model, number)
    found: list[dict[str, Any]] = []
    base = None
    while version is not None:
        base = version.base or base
        told = {"state": version.state, "job": version.job, "digest": version.digest, "dataDigest": version.data_digest}
        found.append({"version": version.number, **told, "createdAt": version.created_at})
        parent = version.parent
        if parent is None or parent >= version.number:
            break
        version = status.version(parent)
        if version is None:
            found.append({"version": parent, "removed": f"{storage}/{VersionPaths.record(parent)}"})
    return [*found, {"base": origin(base) or "not known"}]


def lineage(name: str, line: Sequence[dict[str, Any]]) -> Tree:
    """An ancestry, each below what was made from it."""
    root: Tree | None = None
    place: Tree | None = None
    for step in line:
        if "base" in step:
            text = Text(printable(step["base"]))
        elif "removed" in step:
            text = Text.assemble((f"{name}@{step['version']}", "bold"), printable(f"  removed; its record: {step['removed']}"))
        else:
            text = Text.assemble((f"{name}@{step['version']}", "bold"), "  ", (step["state"], _STYLES[step["state"]]))
            data = short(step["dataDigest"]) or "not known"
            text.append(printable(f"  job {step['job']}, data {data}, {age(step['createdAt'])} ago"))
        place = place.add(text) if place is not None else Tree(text, guide_style="dim")
        root = root or place
    assert root is not None
    return root


def pinned(model: Object, version: ModelVersion) -> list[str]:
    """What to tell whoever has just pinned a version."""
    meta, spec, status = model["metadata"], model.get("spec") or {}, status_of(model)
    was = "there was none" if status.champion is None else "as before" if status.champion == version.number else f"it was {status.champion}"
    name, policy = meta["name"], spec.get("promotion", "OnImprovement")
    found = [f"finetunedmodel/{name}: version {version.number} is pinned as champion ({was})"]
    if version.state == "Rejected":
        found.append(f"Version {version.number} had been rejected{': ' + version.message if version.message else ''}")
    unpin = f"""kubectl patch ftm {name} -n {meta["namespace"]} --type=merge -p '{{"spec":{{"champion":null}}}}'"""
    return [
        *found,
        f"Where Git owns this object, say so there, else its next sync undoes it:  spec: {{champion: {version.number}}}",
        f"No other version is promoted until the pin is gone. To let promotion ({policy}) decide again, remove it from Git, or:",
        f"  {unpin}",
    ]
