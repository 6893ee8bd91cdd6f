"""`finetune run --local`: the same stages as in a cluster, as processes on this machine."""

from __future__ import annotations

import hashlib
import json
import os
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
    Env,
    ExitCode,
    JobFile,
    Layout,
    ProgressReport,
    Stage,
    StageResult,
    Unavailable,
    progress_of,
    read_stage_result,
)
from finetune_api.gating import shut_gate
from finetune_api.scalars import human_duration, seconds
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import (
    Artifact,
    CheckpointStatus,
    Condition,
    ConditionType,
    DatasetStatus,
    EvaluationStatus,
    FineTuneJobStatus,
    Plan,
)
from finetune_api.uris import parse_uri

from .view import JobView

_FIRST_WAIT = 10.0
"""Seconds until a hub or server that did not answer is asked again; then twice as long."""


class MissingVolume(ValueError):
    """The manifest refers to a claim or ConfigMap that has no folder on this machine."""


def job_file(metadata: dict[str, Any], spec: FineTuneJobSpec, volumes: dict[str, str]) -> JobFile:
    """job.json for this machine. `volumes`: claim or ConfigMap name -> folder. Raises MissingVolume."""
    sources: dict[str, str] = {}
    targets: dict[str, str] = {}
    for text, places in [*((u, sources) for u in spec.source_uris), *((t.uri, targets) for t in spec.publish)]:
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
    name, namespace = str(metadata["name"]), str(metadata.get("namespace", "local"))
    uid = hashlib.sha256(f"{namespace}/{name}".encode()).hexdigest()[:32]
    return JobFile(name=name, namespace=namespace, uid=uid, spec=spec, sources=sources, targets=targets)


class LocalRun:
    """Runs the stages and keeps a status like the operator's."""

    def __init__(self, job: JobFile, workspace: Path) -> None:
        self.job, self.workspace = job, workspace
        self.layout = Layout(str(workspace), job.namespace, job.name, job.uid)
        self.folder = Path(self.layout.job)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.job_json = self.folder / "job.json"
        if self.job_json.exists() and self.job_json.read_text() != job.dumps():
            for stale in (self.layout.checkpoints, self.layout.output, self.layout.reports):  # of another manifest: never resume from it
                shutil.rmtree(stale, ignore_errors=True)
        self.job_json.write_text(job.dumps())
        self.logs = self.folder / "logs"
        self.logs.mkdir(exist_ok=True)
        self.status = FineTuneJobStatus(phase="Preparing", total_gpus=job.spec.distribution.nodes * job.spec.distribution.gpus_per_node)
        self._lock = threading.Lock()

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
            self.status.dataset = DatasetStatus.model_validate(prepared.result["dataset"])
            self.status.plan = Plan.model_validate(prepared.result["plan"])
        if prepare_only:
            self._end("Succeeded", "Prepared", f"{self.status.plan.reason}; the report is {self.layout.reports}/data.html")
            return
        if spec.publish and self._stage("check", "TargetsReady", "Preparing") is None:
            return
        Path(self.layout.history).unlink(missing_ok=True)
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
            self.status.artifacts = [Artifact.model_validate(a) for a in published.result["artifacts"]]
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
        }
        command = [sys.executable, "-m", "finetune_trainer", stage, "--job", str(self.job_json), "--workspace", str(self.workspace)]
        with (self.logs / f"{stage}-{rank}.log").open("wb") as log:
            return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=False), words

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
) -> bool:
    """Run a job here and draw it. Returns whether it succeeded. Raises MissingVolume."""
    run = LocalRun(job_file(metadata, spec, volumes), workspace)
    thread = threading.Thread(target=run.run, kwargs={"prepare_only": prepare_only}, daemon=True)
    thread.start()
    view = JobView(console, run.job.name, spec)

    def read() -> FineTuneJobStatus:
        if not thread.is_alive() and not run.status.finished:
            run._end("Failed", "InternalError", "the run ended without a verdict")
        return run.read()

    return view.follow(read, lambda: time.sleep(0.5)) == "Succeeded"
