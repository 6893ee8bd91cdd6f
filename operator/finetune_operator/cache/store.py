"""What the operator remembers of the cluster: jobs by key, children by the UID of their owner. Knows nothing of what follows from it.

Fed by watch events, by the answers to the operator's own writes (so that it never acts on a state older than
what it wrote), and by a periodic LIST that prunes what a dead watch hid. Holds views, not whole objects.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_api import KIND, names
from finetune_api.contract import ProgressReport
from finetune_api.lenient import read_status
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Restart
from finetune_api.validation import InvalidDocument, parse_spec

from ..model.children import owner_uid
from ..model.job import ChildJobView, Observed, PodView
from ..model.legible import child_view, legible_job
from ..model.objects import CHILD_KINDS, Key, Object, as_object, version_of
from ..model.workload import has_ended
from .sharing import Shared


@dataclass
class _Entry:
    version: int
    owner: str
    job_uid: str
    """UID of the FineTuneJob by label: only used to wake it, never to decide"""
    value: Any
    name: str
    seen: float


def _is_older(heard_at: float | None, asked_at: float | None) -> bool:
    return heard_at is not None and asked_at is not None and heard_at < asked_at


def _is_ours(raw: Object) -> bool:
    spec = raw.get("spec")
    manager = spec.get("managedBy") if isinstance(spec, dict) else None
    return manager is None or manager == names.MANAGED_BY


class Store:
    """Jobs and their children, as last seen or written."""

    def __init__(self) -> None:
        self._jobs: dict[Key, Object] = {}
        self._keys: dict[str, Key] = {}
        self._seen: dict[str, float] = {}
        """By the job's UID: when its present state came"""
        self._children: dict[str, dict[str, _Entry]] = {kind: {} for kind in CHILD_KINDS}
        self._by_owner: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self._restarts: dict[str, tuple[Any, list[Restart]]] = {}
        """By the job's UID: as it stands in its status, and parsed"""
        self._specs: dict[str, tuple[Any, FineTuneJobSpec]] = {}
        """By the job's UID: generation, and the spec of it"""
        self._changed: set[Key] = set()
        self._gone: dict[str, float] = {}
        """UIDs of deleted objects: a late event must not bring them back"""
        self._unowned: set[str] = set()
        """Owners of pods that are no known job; those that were child Jobs are sorted out when they are asked for"""
        self._evaluations_left: dict[str, set[str]] = {}
        """By the UID of a job: those of its evaluations that are gone before their pods"""
        self.forgotten: list[Callable[[str], None]] = []
        """Told the UID of each job that is gone, whatever told of its end: a watch, a LIST, another of its name"""
        self._begun_with: dict[str, FineTuneJobSpec | None] = {}
        """What jobs began with whose spec may have been changed since; None where the present one holds"""
        self._shared = Shared()
        self._labelled: dict[str, set[str]] = defaultdict(set)
        """UIDs of pods by the job's UID on their label"""

    # jobs

    def put_job(self, raw: Object, asked_at: float | None = None) -> Key:
        """Remember a job, unless a newer state of the same object is known. What cannot be read of it is left out.

        Another controller's (`spec.managedBy`) is not taken up: neither reconciled, nor counted by queues and metrics, nor heard.

        `asked_at` (monotonic): when the server was asked for it. Whatever was heard before that is older, or of a history that a
        restored etcd does not know: then the answer counts, whatever its resourceVersion.
        """
        meta = raw["metadata"]
        key = (meta["namespace"], meta["name"])
        known = self._jobs.get(key)
        if self._is_gone(meta["uid"], asked_at):
            return key
        if not _is_ours(raw):
            if known is not None and known["metadata"]["uid"] != meta["uid"]:
                self.drop_job(known)
            return key
        if not self.is_known(raw) or (_is_older(self._seen.get(meta["uid"]), asked_at) and version_of(raw) != version_of(known or raw)):
            if known is not None and known["metadata"]["uid"] != meta["uid"]:
                self._forget_job(known["metadata"]["uid"])
            raw = legible_job(raw)
            slim = {k: v for k, v in meta.items() if k != "managedFields"}
            self._jobs[key] = self._shared.job({**raw, "metadata": slim})
            self._keys[meta["uid"]], self._seen[meta["uid"]] = key, time.monotonic()
            self._note_restarts(raw)
            if has_ended(raw):
                self._specs.pop(meta["uid"], None)
            self._changed.add(key)
        return key

    def is_known(self, raw: Object) -> bool:
        """Whether this very state of the job, or a newer one, is remembered."""
        meta = raw["metadata"]
        known = self._jobs.get((meta["namespace"], meta["name"]))
        return known is not None and known["metadata"]["uid"] == meta["uid"] and 0 < version_of(raw) <= version_of(known)

    def drop_job(self, raw: Object) -> Key:
        """Forget a deleted job."""
        meta = raw["metadata"]
        key = (meta["namespace"], meta["name"])
        known = self._jobs.get(key)
        if known is not None and known["metadata"]["uid"] == meta["uid"]:
            del self._jobs[key]
        self._changed.add(key)
        self._forget_job(meta["uid"])
        self._bury(meta["uid"])
        return key

    def _forget_job(self, uid: str) -> None:
        for what in (self._keys, self._seen, self._restarts, self._specs, self._begun_with):
            what.pop(uid, None)  # type: ignore[attr-defined]
        if uid in self._by_owner:
            self._unowned.add(uid)
        for tell in self.forgotten:
            tell(uid)

    def _is_gone(self, uid: str, asked_at: float | None) -> bool:
        """Whether it was deleted, so that a late event must not bring it back. An answer of the server does: etcd was restored."""
        if uid in self._gone and _is_older(self._gone[uid], asked_at):
            del self._gone[uid]
        return uid in self._gone

    def begun_with(self, uid: str, spec: FineTuneJobSpec | None) -> bool:
        """A job's spec may have been changed: it goes on, and is counted, with this one. Whether that is news."""
        if uid in self._begun_with and self._begun_with[uid] == spec:
            return False
        self._begun_with[uid] = spec
        self.touch(uid)
        return True

    def knows_beginning(self, uid: str) -> bool:
        """Whether it was found out what a job began with whose spec may have been changed."""
        return uid in self._begun_with

    def beginning(self, uid: str) -> FineTuneJobSpec | None:
        """What it began with; None where the present spec holds."""
        return self._begun_with.get(uid)

    def _note_restarts(self, raw: Object) -> None:
        status, uid = raw.get("status"), raw["metadata"]["uid"]
        found = status.get("restarts") if isinstance(status, dict) else None
        if not found:
            self._restarts.pop(uid, None)
        elif self._restarts.get(uid, ([], []))[0] != found:
            self._restarts[uid] = (found, read_status({"restarts": found}).restarts)

    def touch(self, uid: str) -> None:
        """Something that belongs to the job of that UID is different now."""
        if (key := self._keys.get(uid)) is not None:
            self._changed.add(key)

    def changes(self) -> set[Key]:
        """Jobs that have changed, or something with their label, since this was asked last."""
        changed, self._changed = self._changed, set()
        return changed

    def restarts(self) -> list[Restart]:
        """The last restarts of all jobs."""
        return [restart for _, restarts in self._restarts.values() for restart in restarts]

    def job(self, key: Key) -> Object | None:
        """The job of that key."""
        return self._jobs.get(key)

    def spec(self, raw: Object) -> FineTuneJobSpec | None:
        """A job's spec, parsed once per generation; None when it is not valid."""
        uid, generation = raw["metadata"]["uid"], raw["metadata"].get("generation")
        known = self._specs.get(uid)
        if known is None or known[0] != generation:
            try:
                parsed = parse_spec(raw.get("spec"), strict=False)
            except InvalidDocument:
                return None
            if generation is None or uid in self._gone:
                return parsed
            known = self._specs[uid] = (generation, self._shared.parsed(raw["spec"], parsed))
        return known[1]

    def job_of_uid(self, uid: str) -> Object | None:
        """The job of that UID."""
        key = self._keys.get(uid)
        return self._jobs.get(key) if key is not None else None

    @property
    def job_count(self) -> int:
        """How many jobs there are."""
        return len(self._jobs)

    def job_keys(self) -> list[Key]:
        """Keys of all jobs."""
        return list(self._jobs)

    def phases(self) -> Counter[str]:
        """How many jobs are in each phase, by what their statuses say."""
        return Counter(str(as_object(job.get("status")).get("phase", "Pending")) for job in self._jobs.values())

    # children

    def put_child(self, kind: str, raw: Object, asked_at: float | None = None) -> Key | None:
        """Remember a child unless a newer state is known; the key of the job to wake, if it is known. `asked_at`: as of put_job."""
        meta = raw["metadata"]
        uid = meta["uid"]
        known = self._children[kind].get(uid)
        job_uid = str((meta.get("labels") or {}).get(names.LABEL_JOB_UID, ""))
        newer = known is None or known.version <= version_of(raw) or _is_older(known.seen, asked_at)
        if newer and not self._is_gone(uid, asked_at):
            owner = owner_uid(raw)
            if known is not None and known.owner != owner:
                self._by_owner[known.owner].discard((kind, uid))
            if known is not None and known.job_uid != job_uid:
                self._labelled[known.job_uid].discard(uid)
            self._children[kind][uid] = _Entry(version_of(raw), owner, job_uid, child_view(kind, raw), meta["name"], time.monotonic())
            self._by_owner[owner].add((kind, uid))
            if kind == "Pod":
                self._labelled[job_uid].add(uid)
                if owner not in self._keys:
                    self._unowned.add(owner)
            self.touch(job_uid)
        return self._keys.get(job_uid)

    def drop_child(self, kind: str, raw: Object) -> Key | None:
        """Forget a deleted child; the key of the job to wake, if it is known."""
        uid = raw["metadata"]["uid"]
        self._forget(kind, uid)
        return self._keys.get(str((raw["metadata"].get("labels") or {}).get(names.LABEL_JOB_UID, "")))

    def prune(self, kind: str, listed: set[str], listed_at: float) -> set[Key]:
        """Forget children that a LIST did not show and that were not seen since it began; keys to wake."""
        lost = [uid for uid, e in self._children[kind].items() if uid not in listed and e.seen < listed_at]
        woken = {key for uid in lost if (key := self._keys.get(self._children[kind][uid].job_uid)) is not None}
        for uid in lost:
            self._forget(kind, uid)
        return woken

    def prune_jobs(self, listed: set[str], listed_at: float) -> None:
        """Forget jobs that a LIST did not show and that were not seen since it began: one may have been created meanwhile."""
        for raw in list(self._jobs.values()):
            uid = raw["metadata"]["uid"]
            if uid not in listed and self._seen[uid] < listed_at:
                self.drop_job(raw)

    def _forget(self, kind: str, uid: str) -> None:
        entry = self._children[kind].pop(uid, None)
        if entry is not None:
            self.touch(entry.job_uid)
            members = self._by_owner[entry.owner]
            members.discard((kind, uid))
            if not members:
                del self._by_owner[entry.owner]
                self._evaluations_left.get(entry.job_uid, set()).discard(entry.owner)
                if not self._evaluations_left.get(entry.job_uid, True):
                    del self._evaluations_left[entry.job_uid]
            if kind == "Job" and entry.value.stage == "evaluate" and self._by_owner.get(uid):
                self._evaluations_left.setdefault(entry.owner, set()).add(uid)
            if kind == "Pod":
                self._labelled[entry.job_uid].discard(uid)
                if not self._labelled[entry.job_uid]:
                    del self._labelled[entry.job_uid]
        self._bury(uid)

    def _bury(self, uid: str) -> None:
        now = time.monotonic()
        self._gone[uid] = now
        if len(self._gone) > 20_000:
            self._gone = {u: t for u, t in self._gone.items() if now - t < 600}

    # observation

    def observe(self, key: Key, now: datetime, report: tuple[ProgressReport, datetime] | None) -> Observed | None:
        """Everything known about a job and what it owns, by UID."""
        job = self._jobs.get(key)
        if job is None:
            return None
        uid = job["metadata"]["uid"]
        jobs: list[ChildJobView] = []
        applied: dict[tuple[str, str], str] = {}
        for kind, child in self._by_owner.get(uid, ()):
            entry = self._children[kind][child]
            if kind == "Job":
                jobs.append(entry.value)
            elif kind != "Pod":
                applied[kind, entry.name] = entry.value
        owners = (uid, *(j.uid for j in jobs))
        pods = [pod for owner in owners for pod in self._pods_of(owner)]
        labelled = [self._children["Pod"][child].value for child in self._labelled.get(uid, ())]
        # one that was orphaned (`--cascade=orphan`) has lost its owner
        left = [pod for pod in labelled if pod.owner not in owners and pod.owner_kind in ("", "Job")]
        return Observed(
            job=job,
            spec=self.spec(job) if not has_ended(job) else None,
            pods=tuple(sorted(pods, key=lambda p: p.name)),
            left=tuple(sorted(left, key=lambda p: p.name)),
            jobs=tuple(sorted(jobs, key=lambda j: j.name)),
            applied=applied,
            report=report[0] if report else None,
            reported_at=report[1] if report else None,
            now=now,
        )

    def gpu_pods(self, uid: str) -> list[PodView]:
        """A job's workers and the pods of its evaluation, also of a job and an evaluation that are gone while their pods still save."""
        jobs = (child for kind, child in self._by_owner.get(uid, ()) if kind == "Job")
        evaluations = [child for child in jobs if self._children["Job"][child].value.stage == "evaluate"]
        return [pod for owner in (uid, *evaluations, *self._evaluations_left.get(uid, ())) for pod in self._pods_of(owner)]

    def _pods_of(self, owner: str) -> list[PodView]:
        return [self._children[kind][child].value for kind, child in self._by_owner.get(owner, ()) if kind == "Pod"]

    def left_behind(self) -> dict[str, list[PodView]]:
        """By the UID of jobs that are not known: the workers that they have left."""
        found = {}
        for owner in list(self._unowned):
            pods = self._pods_of(owner)
            if owner not in self._keys and pods and pods[0].owner_kind == KIND:
                found[owner] = pods
            else:
                self._unowned.discard(owner)
        return found

    def pod(self, uid: str) -> PodView | None:
        """A pod, whoever owns it."""
        entry = self._children["Pod"].get(uid)
        return entry.value if entry is not None else None
