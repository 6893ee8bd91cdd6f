"""`finetune run --local`: the same stages as in a cluster, as processes on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune_api.contract import (
    RESTORED,
    Env,
    ExitCode,
    Identity,
    JobFile,
    Prepared,
    ProgressReport,
    Published,
    Stage,
    StageResult,
    Unavailable,
    progress_of,
    read_identity,
    read_stage_result,
)
from finetune_api.evaluation_status import EvaluationStatus
from finetune_api.gating import shut_gate
from finetune_api.scalars import human_duration, seconds
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import CheckpointStatus, Condition, ConditionType, FineTuneJobStatus
from finetune_api.uris import parse_uri

from .runs import STATUS, Lock, Run, carry_answers, named_run, new_run, runs_of, take_over
from .view import JobView

_FIRST_WAIT = 10.0
"""Seconds until a hub or server that did not answer is asked again; then twice as long."""


class MissingVolume(ValueError):
    """What the manifest or the command line refers to has no folder on this machine."""


def job_file(metadata: dict[str, Any], spec: FineTuneJobSpec, volumes: dict[str, str]) -> JobFile:
    """job.json for this machine. `volumes`: claim or ConfigMap name -> folder. Raises MissingVolume."""
    _refuse_models(spec)
    sources: dict[str, str] = {}
    targets: dict[str, str] = {}
    for text, places in [*((u, sources) for u in spec.source_uris), *((t.address, targets) for t in spec.publish)]:
        uri = parse_uri(text)
        if uri.scheme not in ("pvc", "configmap"):
            continue
        folder = volumes.get(uri.name)
        if folder is None:
            raise MissingVolume(f"{text}: say which folder {uri.scheme} {uri.name!r} is here, with --volume {uri.name}=FOLDER")
        if places is targets:
            Path(folder).mkdir(parents=True, exist_ok=True)
        elif not Path(folder).is_dir():
            raise MissingVolume(f"--volume {uri.name}={folder}: there is no such folder")
        places[f"{uri.scheme}://{uri.name}"] = str(Path(folder).resolve())
    name = str(metadata.get("name") or str(metadata.get("generateName", "")).rstrip("-.") or "job")
    namespace = str(metadata.get("namespace") or "local")
    uid = hashlib.sha256(f"{namespace}/{name}".encode()).hexdigest()[:32]
    return JobFile(name=name, namespace=namespace, uid=uid, spec=spec, sources=sources, targets=targets)


def _refuse_models(spec: FineTuneJobSpec) -> None:
    """A FineTunedModel is an object of a cluster: here nobody says where it keeps its versions."""
    named = {f"publish[{index}].model": str(target.model) for index, target in enumerate(spec.publish) if target.model is not None}
    for field, model in named.items():
        raise MissingVolume(
            f"spec.{field}: {model}: a FineTunedModel is of a cluster, and is not known here; write uri: pvc://CLAIM/{model} in its place, "
            "with --volume CLAIM=FOLDER"
        )
    parent = spec.tuning.continue_from or ""
    if parent.startswith("model://"):
        raise MissingVolume(
            f"spec.tuning.continueFrom: {parent}: a FineTunedModel is of a cluster, and is not known here; write pvc://CLAIM/PATH of the "
            "version's files in its place, as the FineTunedModel's spec.storage has them in versions/NUMBER, with --volume CLAIM=FOLDER"
        )


class LocalRun:
    """Runs the stages and keeps a status like the operator's.

    Every run looks at its data in a folder of its own. Where an earlier run was made from the same, it is gone on with; `resume`
    names the one to go on with, as it was prepared; `fresh` begins a new one whatever there is. Raises NoSuchRun.
    """

    def __init__(self, job: JobFile, workspace: Path, *, resume: str | None = None, fresh: bool = False) -> None:
        self.workspace, self.resume, self.fresh = workspace, resume, fresh
        self.notes: queue.Queue[str] = queue.Queue()
        """What is told of runs: which is gone on with, and why."""
        named, held = new_run(job, workspace) if resume is None else named_run(job, workspace, resume)
        self._enter(named, held)
        if resume is None:
            carry_answers(self.layout, self._others())
        self.status = FineTuneJobStatus(phase="Preparing", total_gpus=job.spec.distribution.nodes * job.spec.distribution.gpus_per_node)
        self._lock = threading.Lock()

    def _enter(self, job: JobFile, held: Lock) -> None:
        """Work in this run's folder from here on."""
        self.job, self._held = job, held
        self.layout = job.layout(str(self.workspace))
        self.folder = Path(self.layout.job)
        self.job_json = self.folder / "job.json"
        self.job_json.write_text(job.dumps())
        (self.folder / STATUS).unlink(missing_ok=True)
        self.logs = self.folder / "logs"
        self.logs.mkdir(exist_ok=True)

    def _others(self) -> list[Run]:
        return [run for run in runs_of(self.job, self.workspace) if run.folder != self.folder]

    def _choose(self) -> bool:
        """Go on with the latest run that was made from the same, and say so; False when it cannot be had."""
        mine, others = read_identity(self.layout.identity), self._others()
        here = Run(self.folder, self.job.to_wire())
        if self.resume is not None or mine is None:
            self.notes.put(f"goes on with run {here.id} from step {here.step or 0}, as --resume asks for")
            return True
        kept = f"; kept: {', '.join(run.id for run in others)}" if others else ""
        if self.fresh:
            self.notes.put(f"run {here.id}, a new one, as --fresh asks for{kept}")
            return True
        earlier = next((run for run in others if (known := run.identity) is not None and known.made_from == mine.made_from), None)
        if earlier is None:
            self.notes.put(f"run {here.id}, a new one: {_why_new(mine, others)}")
            return True
        held = Lock(earlier.folder)
        if not held.taken:
            message = (
                f"run {earlier.id} was made from the same, and another process runs it; wait for its end, or begin another with --fresh"
            )
            self._end("Failed", "RunInProgress", message)
            shutil.rmtree(self.folder)  # it would be the latest, and holds nothing but the same rows once more
            return False
        take_over(self.layout, earlier)
        self._held.close()
        self._enter(self.job.model_copy(update={"run": earlier.job.get("run"), "uid": earlier.job["uid"]}), held)
        self.notes.put(
            f"goes on with run {earlier.id} from step {earlier.step or 0}: it was made from the same settings, rows and model; "
            "--fresh begins a new one"
        )
        return True

    def read(self) -> FineTuneJobStatus:
        """The status now, with the newest line of the history."""
        with self._lock:
            if self.status.phase == "Training":
                self._read_progress()
            return self.status.model_copy(deep=True)

    def run(self, *, prepare_only: bool = False) -> None:
        """All stages, or the look at data and plan alone; ends with the condition Succeeded or Failed."""
        spec = self.job.spec
        prepared = self._stage("prepare", "DataReady", "Preparing")
        if prepared is None:
            return
        with self._lock:
            found = Prepared.model_validate(prepared.result)
            self.status.base, self.status.dataset, self.status.plan = found.base, found.dataset, found.plan
        if not self._choose():
            return
        if prepare_only:
            self._end("Succeeded", "Prepared", f"{found.plan.reason}; the report is {self.layout.reports}/data.html")
            return
        if spec.publish and self._stage("check", "TargetsReady", "Preparing") is None:
            return
        trained = self._stage("train", "Trained", "Training")
        if trained is None:
            return
        if spec.evaluation is not None:
            compared = self._stage("evaluate", "Evaluated", "Evaluating")
            if compared is None:
                return
            self.status.evaluation = EvaluationStatus.model_validate(compared.result)
            if (shut := shut_gate(spec, self.status.evaluation)) is not None:
                self._end("Failed", shut.reason, f"{compared.message}; nothing was published, the result is in {self.layout.output}")
                return
        if spec.publish:
            published = self._stage("publish", "Published", "Publishing")
            if published is None:
                return
            made = Published.model_validate(published.result)
            self.status.artifacts, self.status.forms = made.artifacts, made.forms
        self._end("Succeeded", "Completed", f"the result is in {self.layout.output}")

    def _stage(self, stage: Stage, condition: ConditionType, phase: Any) -> StageResult | None:
        with self._lock:
            self.status.phase = phase
        began, tries = time.monotonic(), 0
        while True:
            codes, results = self._try(stage)
            away = results[0]
            left = began + seconds(self.job.spec.run_policy.stage_timeout) - time.monotonic()
            if codes != [ExitCode.SOURCE_UNAVAILABLE] or away is None or left <= 0:
                return self._conclude(stage, condition, codes, results)
            delay = min(left, max(_FIRST_WAIT * 2.0 ** min(tries, 5), Unavailable.model_validate(away.result).retry_after_seconds or 0.0))
            tries += 1
            self._set(condition, "False", away.model_copy(update={"message": f"{away.message}; next try in {human_duration(delay)}"}))
            time.sleep(delay)

    def _try(self, stage: Stage) -> tuple[list[int], list[StageResult | None]]:
        """Run the stage's processes once: their exit codes and last words."""
        nodes = self.job.spec.distribution.nodes if stage == "train" else 1
        port = _free_port()
        processes = [self._start(stage, rank, port) for rank in range(nodes)]
        codes = _wait_for_all([process for process, _ in processes])
        return codes, [read_stage_result(words.read_text()) if words.exists() else None for _, words in processes]

    def _conclude(self, stage: Stage, condition: ConditionType, codes: list[int], results: list[StageResult | None]) -> StageResult | None:
        bad = [rank for rank, code in enumerate(codes) if code != ExitCode.DONE]
        if not bad:
            result = results[0] or StageResult(reason="NoResult", message=f"{stage} ended without a result")
            if result.reason == RESTORED:  # here nothing was lost: what the earlier run published stands in its folder, too
                message = "an earlier result of this job is there and will be replaced; the one of each run stays in its folder"
                result = StageResult(reason="TargetsReady", message=message)
            self._set(condition, "True", result)
            return result
        telling = sorted(bad, key=lambda rank: (codes[rank] not in (ExitCode.USER_ERROR, ExitCode.OUT_OF_MEMORY), results[rank] is None))[0]
        log = self.logs / f"{stage}-{telling}.log"
        failure = results[telling] or StageResult(reason="ProcessDied", message=f"{stage} exited {codes[telling]}")
        self._set(condition, "False", failure)
        self._end("Failed", failure.reason, f"{failure.message} (log: {log})")
        return None

    def _start(self, stage: Stage, rank: int, port: int) -> tuple[subprocess.Popen[bytes], Path]:
        words = self.folder / f"{stage}-{rank}.result"
        words.unlink(missing_ok=True)
        paths = [path for path in sys.path if path]
        env = {
            **os.environ,
            "FINETUNE_TERMINATION_LOG": str(words),
            "PYTHONPATH": os.pathsep.join(paths),
            "TOKENIZERS_PARALLELISM": "false",
            Env.RANK: str(rank),
            Env.MAIN_ADDRESS: "127.0.0.1",
            Env.MAIN_PORT: str(port),
            Env.ALLOW_CPU: "1",
            Env.PARENT: str(os.getpid()),
            **({Env.RESUME: "1"} if self.resume is not None else {}),
        }
        command = [sys.executable, "-m", "finetune_trainer", stage, "--job", str(self.job_json), "--workspace", str(self.workspace)]
        with (self.logs / f"{stage}-{rank}.log").open("wb") as log:
            return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, pass_fds=self._held.descriptors), words

    def _read_progress(self) -> None:
        try:
            last = Path(self.layout.history).read_text().splitlines()[-1]
            report = ProgressReport.model_validate(json.loads(last))
        except (OSError, IndexError, ValueError):
            return
        self.status.progress = progress_of(report)
        if report.checkpoint_step is not None:
            self.status.checkpoint = CheckpointStatus(step=report.checkpoint_step)

    def _set(self, type_: ConditionType, status: Any, result: StageResult) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with self._lock:
            if self.status.phase == "Training":
                self._read_progress()
            self.status.conditions.append(
                Condition(type=type_, status=status, reason=result.reason, message=result.message, last_transition_time=now)
            )

    def _end(self, type_: Any, reason: str, message: str) -> None:
        self._set(type_, "True", StageResult(reason=reason, message=message[:3000]))
        with self._lock:
            self.status.phase = type_
            write = self.status.model_dump_json(by_alias=True, exclude_none=True)
        (self.folder / STATUS).write_text(write)
        self._held.close()


def _why_new(mine: Identity, others: list[Run]) -> str:
    """Against the latest run: what differs."""
    if not others:
        return "there is no earlier one"
    latest = others[0]
    known = latest.identity
    if known is None:
        why = f"what run {latest.id} was made from is not known"
    else:
        what = mine.made_from.differences(known.made_from)
        why = f"{' and '.join(what)} changed since run {latest.id}"
    return f"{why}; run {latest.id} is kept, and --resume {latest.id} goes on with it as it was made"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_all(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes; when one fails the others are stopped, as a gang is."""
    while any(process.poll() is None for process in processes):
        if any(process.poll() not in (None, 0) for process in processes):
            time.sleep(3)  # let the others say their own last words
            for process in processes:
                if process.poll() is None:
                    process.terminate()
            for process in processes:
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    process.kill()
        time.sleep(0.2)
    return [process.wait() for process in processes]


def run_local(
    metadata: dict[str, Any],
    spec: FineTuneJobSpec,
    volumes: dict[str, str],
    workspace: Path,
    console: Console,
    *,
    prepare_only: bool = False,
    resume: str | None = None,
    fresh: bool = False,
) -> bool:
    """Run a job here and draw it. Returns whether it succeeded. Raises MissingVolume and NoSuchRun."""
    job = job_file(metadata, spec, volumes)
    try:
        run = LocalRun(job, workspace, resume=resume, fresh=fresh)
    except OSError as failure:
        raise MissingVolume(f"--workspace {workspace}: {failure.strerror or failure}; name a folder that you may write to") from None
    thread = threading.Thread(target=run.run, kwargs={"prepare_only": prepare_only}, daemon=True)
    thread.start()
    view = JobView(console, run.job.name, spec)

    def read() -> FineTuneJobStatus:
        if not thread.is_alive() and not run.status.finished:
            run._end("Failed", "InternalError", "the run ended without a verdict")
        with contextlib.suppress(queue.Empty):
            console.print(f"{run.job.name}: {run.notes.get_nowait()}", highlight=False, markup=False, soft_wrap=True)
        return run.read()

    return view.follow(read, lambda: time.sleep(0.5)) == "Succeeded"
