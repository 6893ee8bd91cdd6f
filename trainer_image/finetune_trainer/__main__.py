"""`python -m finetune_trainer STAGE --job job.json --workspace DIR`: one stage, with its exit code and last words.

Of no job: `… catalog --model model.json`, and `… fetch --replica replica.json --to DIR` and `… agent`, which run in a FineTuneEndpoint's
replica, beside its engine. `… worker` is one training process, which `train` starts. `… erase` takes a request from its standard input (`finetune erase`).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, get_args

from finetune_api.contract import ExitCode, Mounts, Stage, StageResult
from finetune_api.serving import OrderedModel, ReplicaPaths

from .job.context import Context
from .job.unused import LEFT_OUT, leave_out, unused_packages
from .process import parent_watch, redaction
from .process.errors import Stopped, classify
from .remote import retry

log = logging.getLogger("finetune")


def _last_words(result: StageResult) -> None:
    path = os.environ.get("FINETUNE_TERMINATION_LOG", Mounts.TERMINATION_LOG)
    try:
        with open(path, "w") as sink:
            sink.write(redaction.redact(result.dumps()))
    except OSError as failure:  # outside a pod there is none
        log.debug("no termination log: %s", failure)


def _stop(number: int, _: object) -> NoReturn:
    raise Stopped("Stopped", f"stopped by {signal.Signals(number).name}")


def main() -> None:
    """Run a stage; exits with the code of the contract."""
    if sys.argv[1:2] == ["agent"]:
        return _agent(sys.argv[2:])
    if sys.argv[1:2] == ["worker"]:
        return _worker(sys.argv[2:])
    if sys.argv[1:2] == ["erase"]:
        _erase()
    parser = argparse.ArgumentParser(prog="finetune_trainer", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    for name in get_args(Stage):
        stage = stages.add_parser(name)
        stage.add_argument("--job", required=True)
        stage.add_argument("--workspace", required=True)
    stages.add_parser("catalog").add_argument("--model", required=True)
    fetch = stages.add_parser("fetch")
    fetch.add_argument("--replica", default=ReplicaPaths.FILE)
    fetch.add_argument("--to", default=ReplicaPaths.MODELS)
    fetch.add_argument("--version", help="JSON of the OrderedModel that is the base")
    arguments = parser.parse_args()
    redaction.configure_logging()
    signal.signal(signal.SIGTERM, _stop)
    parent_watch.start()
    retry.trust_authorities()
    if arguments.stage == "train":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # prepare has fetched everything: GPUs wait for no hub
    if arguments.stage == "catalog":
        _to_the_end(lambda: _catalog(arguments.model))
    if arguments.stage == "fetch":
        _to_the_end(lambda: _fetch(arguments.replica, arguments.to, arguments.version))
    _to_the_end(lambda: _stage(arguments.stage, arguments.job, arguments.workspace))


def _to_the_end(run: Callable[[], StageResult]) -> NoReturn:
    try:
        result = run()
    except BaseException as failure:
        if isinstance(failure, SystemExit | KeyboardInterrupt):
            raise
        error = classify(failure)
        if error is not failure:
            log.error("unexpected", exc_info=failure)
        words = error.result()
        log.error("%s: %s", words.reason, words.message)
        _last_words(words)
        sys.exit(int(error.code))
    log.info("%s: %s", result.reason, result.message)
    _last_words(result)
    sys.exit(int(ExitCode.DONE))


def _catalog(model_file: str) -> StageResult:
    from .stages.catalog import catalog, load

    return catalog(load(model_file))


def _fetch(replica_file: str, folder: str, version: str | None) -> StageResult:
    from .serving.replica import fetch, read_replica

    retry.cap_hub_retry_wait()
    os.environ.setdefault("HF_HOME", f"{folder}/cache/huggingface")
    return fetch(read_replica(replica_file), folder, OrderedModel.model_validate_json(version) if version is not None else None)


def _agent(words: list[str]) -> None:
    from .serving.web import serve

    redaction.configure_logging()
    parent_watch.start()
    retry.trust_authorities()
    serve(words)


def _worker(words: list[str]) -> None:
    leave_out(os.environ.get(LEFT_OUT, "").split())
    from .stages.worker import main

    main(words)


def _erase() -> NoReturn:
    """One line in, one line out, whatever becomes of it."""
    answers, line = sys.stdout, sys.stdin.readline()
    redaction.configure_logging()
    parent_watch.start()
    retry.trust_authorities()
    from .stages.erase import erase, read_request

    try:
        result, code = erase(read_request(line)), ExitCode.DONE
    except Exception as failure:
        error = classify(failure)
        if error is not failure:
            log.error("unexpected", exc_info=failure)
        result, code = error.result(), error.code
    answers.write(json.dumps(result.to_wire()) + "\n")
    answers.flush()
    sys.exit(int(code))


def _stage(stage: str, job_file: str, workspace: str) -> StageResult:
    context = Context.load(job_file, workspace)
    os.environ["FINETUNE_JOB_FILE"] = job_file
    os.environ.setdefault("HF_HOME", f"{context.layout.cache}/huggingface")
    if stage != "train":
        retry.cap_hub_retry_wait()
    if stage == "evaluate":
        leave_out(unused_packages(context))
    if stage == "prepare":
        from .stages.prepare import prepare as run
    elif stage == "check":
        from .stages.check import check as run
    elif stage == "train":
        from .stages.train import train as run
    elif stage == "evaluate":
        from .stages.evaluate import evaluate as run
    else:
        from .stages.publish import publish as run
    return run(context)


if __name__ == "__main__":
    main()
