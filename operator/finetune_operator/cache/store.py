"""What the operator remembers of the cluster: objects by key, children by the UID of their owner. Knows nothing of what follows from it.

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
from finetune_api.endpoint import ENDPOINT_KIND
from finetune_api.lenient import read_status
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Restart
from finetune_api.tuned_model import MODEL_KIND
from finetune_api.validation import InvalidDocument, parse_spec

from ..model.children import owner_uid
from ..model.job import ChildJobView, Observed, PodView
from ..model.legible import child_view, legible_job, legible_object
from ..model.objects import CHILD_KINDS, Key, Object, Ref, as_object, key_of, version_of
from ..model.tuned_model import models_named
from ..model.workload import has_ended
from .objects import Graves, Objects, is_older
from .sharing import Shared


@dataclass
class _Entry:
    version: int
    owner: str
    wakes: str
    """UID of whom it wakes, by label: never used to decide"""
    value: Any
    name: str
    seen: float


@dataclass(frozen=True)
class OwnedJob:
    """A Job, and the UID of its owner."""

    name: str
    owner: str


@dataclass(frozen=True)
class Owned:
    """What an object owns, by UID."""

    jobs: tuple[ChildJobView, ...]
    pods: tuple[PodView, ...]
    """Its own, and those of its Jobs."""
    applied: dict[tuple[str, str], str]
    """(kind, name) -> applied hash."""


def _is_ours(raw: Object) -> bool:
    spec = raw.get("spec")
    manager = spec.get("managedBy") if isinstance(spec, dict) else None
    return manager is None or manager == names.MANAGED_BY


def _wakes(raw: Object) -> str:
    labels = raw["metadata"].get("labels") or {}
    return str(labels.get(names.LABEL_JOB_UID) or labels.get(names.LABEL_OWNER_UID) or "")


class Store:
    """Objects of the kinds that are reconciled, and their children, as last seen or written."""

    def __init__(self) -> None:
        self._graves = Graves()
        self._children: dict[str, dict[str, _Entry]] = {kind: {} for kind in CHILD_KINDS}
        self._by_owner: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self._restarts: dict[str, tuple[Any, list[Restart]]] = {}
        """By the job's UID: as it stands in its status, and parsed"""
        self._specs: dict[str, tuple[Any, FineTuneJobSpec]] = {}
        """By the job's UID: generation, and the spec of it"""
        self._changed: set[Key] = set()
        self._unowned: set[str] = set()
        """Owners of pods that are no known job; those that were child Jobs are sorted out when they are asked for"""
        self._evaluations_left: dict[str, set[str]] = {}
        """By the UID of a job: those of its evaluations that are gone before their pods"""
        self.forgotten: list[Callable[[str], None]] = []
        """Told the UID of each object that is gone, whatever told of its end: a watch, a LIST, another of its name"""
        self.changed: list[Callable[[str, Object], None]] = []
        """Told kind and object whenever one is different now, whoever wrote it, or is gone"""
        self._begun_with: dict[str, FineTuneJobSpec | None] = {}
        """What jobs began with whose spec may have been changed since; None where the present one holds"""
        self._shared = Shared()
        self._labelled: dict[str, set[str]] = defaultdict(set)
        """UIDs of pods by the UID on their label"""
        self._named_by: dict[Key, set[str]] = defaultdict(set)
        """By the key of a FineTunedModel: UIDs of the jobs that name it"""
        self._names: dict[str, tuple[Key, ...]] = {}
        self.jobs = Objects(self._graves, keep=self._job, is_ours=_is_ours, changed=self._job_changed, forgotten=self._forget_object)
        self.models, self.endpoints = self._objects(MODEL_KIND), self._objects(ENDPOINT_KIND)
        self._kinds = {KIND: self.jobs, MODEL_KIND: self.models, ENDPOINT_KIND: self.endpoints}

    def _objects(self, kind: str) -> Objects:
        def changed(raw: Object, gone: bool) -> None:
            self._tell(kind, raw)

        return Objects(self._graves, keep=legible_object, changed=changed, forgotten=self._forget_object)

    def of(self, kind: str) -> Objects:
        """The objects of a reconciled kind."""
        return self._kinds[kind]

    def _tell(self, kind: str, raw: Object) -> None:
        for tell in self.changed:
            tell(kind, raw)

    def _forget_object(self, uid: str) -> None:
        for what in (self._restarts, self._specs, self._begun_with):
            what.pop(uid, None)  # type: ignore[attr-defined]
        self._note_names(uid, ())
        if uid in self._by_owner:
            self._unowned.add(uid)
        for tell in self.forgotten:
            tell(uid)

    def _ref(self, uid: str) -> Ref | None:
        """Whom a child's label wakes, where it is known."""
        for kind, objects in self._kinds.items():
            if (key := objects.key_of_uid(uid)) is not None:
                return kind, key
        return None

    # jobs

    def put_job(self, raw: Object, asked_at: float | None = None) -> Key:
        """Remember a job, as Objects.put does. What cannot be read of it is left out.

        Another controller's (`spec.managedBy`) is not taken up: neither reconciled, nor counted by queues and metrics, nor heard.
        """
        return self.jobs.put(raw, asked_at)

    def _job(self, raw: Object) -> Object:
        raw = legible_job(raw)
        slim = {k: v for k, v in raw["metadata"].items() if k != "managedFields"}
        return self._shared.job({**raw, "metadata": slim})

    def _job_changed(self, raw: Object, gone: bool) -> None:
        uid, key = raw["metadata"]["uid"], key_of(raw)
        if not gone:
            self._note_restarts(raw)
            self._note_names(uid, tuple((key[0], name) for name in models_named(raw)))
            if has_ended(raw):
                self._specs.pop(uid, None)
        self._changed.add(key)
        self._tell(KIND, raw)

    def drop_job(self, raw: Object) -> Key:
        """Forget a deleted job."""
        return self.jobs.drop(raw)

    def _note_names(self, uid: str, models: tuple[Key, ...]) -> None:
        known = self._names.get(uid, ())
        if models == known:
            return
        for model in known:
            self._named_by[model].discard(uid)
            if not self._named_by[model]:
                del self._named_by[model]
        for model in models:
            self._named_by[model].add(uid)
        if models:
            self._names[uid] = models
        else:
            self._names.pop(uid, None)

    def jobs_naming(self, model: Key) -> list[Object]:
        """Jobs that publish to a FineTunedModel, or go on from a version of it."""
        return [job for uid in self._named_by.get(model, ()) if (job := self.jobs.of_uid(uid)) is not None]

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
        if (key := self.jobs.key_of_uid(uid)) is not None:
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
        return self.jobs.get(key)

    def spec(self, raw: Object) -> FineTuneJobSpec | None:
        """A job's spec, parsed once per generation; None when it is not valid."""
        uid, generation = raw["metadata"]["uid"], raw["metadata"].get("generation")
        known = self._specs.get(uid)
        if known is None or known[0] != generation:
            try:
                parsed = parse_spec(raw.get("spec"), strict=False)
            except InvalidDocument:
                return None
            if generation is None or uid in self._graves:
                return parsed
            known = self._specs[uid] = (generation, self._shared.parsed(raw["spec"], parsed))
        return known[1]

    def job_of_uid(self, uid: str) -> Object | None:
        """The job of that UID."""
        return self.jobs.of_uid(uid)

    @property
    def job_count(self) -> int:
        """How many jobs there are."""
        return len(self.jobs)

    def job_keys(self) -> list[Key]:
        """Keys of all jobs."""
        return self.jobs.keys

    def phases(self) -> Counter[str]:
        """How many jobs are in each phase, by what their statuses say."""
        return Counter(str(as_object(job.get("status")).get("phase", "Pending")) for job in self.jobs)

    # children

    def put_child(self, kind: str, raw: Object, asked_at: float | None = None) -> Ref | None:
        """Remember a child unless a newer state is known; whom to wake, if that is known. `asked_at`: as of Objects.put."""
        meta = raw["metadata"]
        uid, wakes = meta["uid"], _wakes(raw)
        known = self._children[kind].get(uid)
        newer = known is None or known.version <= version_of(raw) or is_older(known.seen, asked_at)
        if newer and not self._graves.hides(uid, asked_at):
            owner = owner_uid(raw)
            if known is not None and known.owner != owner:
                self._by_owner[known.owner].discard((kind, uid))
            if known is not None and known.wakes != wakes:
                self._labelled[known.wakes].discard(uid)
            self._children[kind][uid] = _Entry(version_of(raw), owner, wakes, child_view(kind, raw), meta["name"], time.monotonic())
            self._by_owner[owner].add((kind, uid))
            if kind == "Pod":
                self._labelled[wakes].add(uid)
                if self.jobs.key_of_uid(owner) is None:
                    self._unowned.add(owner)
            self.touch(wakes)
        return self._ref(wakes)

    def drop_child(self, kind: str, raw: Object) -> Ref | None:
        """Forget a deleted child; whom to wake, if that is known."""
        self._forget(kind, raw["metadata"]["uid"])
        return self._ref(_wakes(raw))

    def prune(self, kind: str, listed: set[str], listed_at: float) -> set[Ref]:
        """Forget children that a LIST did not show and that were not seen since it began; whom to wake."""
        lost = [uid for uid, e in self._children[kind].items() if uid not in listed and e.seen < listed_at]
        woken = {ref for uid in lost if (ref := self._ref(self._children[kind][uid].wakes)) is not None}
        for uid in lost:
            self._forget(kind, uid)
        return woken

    def _forget(self, kind: str, uid: str) -> None:
        entry = self._children[kind].pop(uid, None)
        if entry is not None:
            self.touch(entry.wakes)
            members = self._by_owner[entry.owner]
            members.discard((kind, uid))
            if not members:
                del self._by_owner[entry.owner]
                self._evaluations_left.get(entry.wakes, set()).discard(entry.owner)
                if not self._evaluations_left.get(entry.wakes, True):
                    del self._evaluations_left[entry.wakes]
            if kind == "Job" and entry.value.stage == "evaluate" and self._by_owner.get(uid):
                self._evaluations_left.setdefault(entry.owner, set()).add(uid)
            if kind == "Pod":
                self._labelled[entry.wakes].discard(uid)
                if not self._labelled[entry.wakes]:
                    del self._labelled[entry.wakes]
        self._graves.bury(uid)

    # observation

    def observe(self, key: Key, now: datetime, report: tuple[ProgressReport, datetime] | None) -> Observed | None:
        """Everything known about a job and what it owns, by UID."""
        job = self.jobs.get(key)
        if job is None:
            return None
        uid = job["metadata"]["uid"]
        owned = self.owned(uid)
        owners = (uid, *(j.uid for j in owned.jobs))
        labelled = [self._children["Pod"][child].value for child in self._labelled.get(uid, ())]
        # one that was orphaned (`--cascade=orphan`) has lost its owner
        left = [pod for pod in labelled if pod.owner not in owners and pod.owner_kind in ("", "Job")]
        return Observed(
            job=job,
            spec=self.spec(job) if not has_ended(job) else None,
            pods=owned.pods,
            left=tuple(sorted(left, key=lambda p: p.name)),
            jobs=owned.jobs,
            applied=owned.applied,
            report=report[0] if report else None,
            reported_at=report[1] if report else None,
            now=now,
        )

    def owned(self, uid: str) -> Owned:
        """What an object owns."""
        jobs: list[ChildJobView] = []
        applied: dict[tuple[str, str], str] = {}
        for kind, child in self._by_owner.get(uid, ()):
            entry = self._children[kind][child]
            if kind == "Job":
                jobs.append(entry.value)
            elif kind != "Pod":
                applied[kind, entry.name] = entry.value
        pods = [pod for owner in (uid, *(j.uid for j in jobs)) for pod in self._pods_of(owner)]
        return Owned(tuple(sorted(jobs, key=lambda j: j.name)), tuple(sorted(pods, key=lambda p: p.name)), applied)

    def child_job(self, uid: str) -> OwnedJob | None:
        """A Job of ours, whoever owns it."""
        entry = self._children["Job"].get(uid)
        return OwnedJob(entry.name, entry.owner) if entry is not None else None

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
            if self.jobs.key_of_uid(owner) is None and pods and pods[0].owner_kind == KIND:
                found[owner] = pods
            else:
                self._unowned.discard(owner)
        return found

    def labelled_pods(self, uid: str) -> list[PodView]:
        """Pods with that UID on their label. Anyone may set it: good for those of a kind that owns its pods by way of another."""
        return [self._children["Pod"][child].value for child in self._labelled.get(uid, ())]

    def pod(self, uid: str) -> PodView | None:
        """A pod, whoever owns it."""
        entry = self._children["Pod"].get(uid)
        return entry.value if entry is not None else None
