"""`python -m finetune_trainer STAGE --job job.json --workspace DIR`: one stage, with its exit code and last words.

`… fetch --replica replica.json --to DIR` and `… agent` are what runs in a FineTuneEndpoint's replica, beside its engine.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, get_args

from finetune_api.contract import ExitCode, Mounts, Stage, StageResult
from finetune_api.serving import ReplicaPaths

from .job.context import Context
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
    if sys.argv[1:2] == ["fetch"]:
        _fetch(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="finetune_trainer", description=__doc__)
    parser.add_argument("stage", choices=get_args(Stage))
    parser.add_argument("--job", required=True)
    parser.add_argument("--workspace", required=True)
    arguments = parser.parse_args()
    redaction.configure_logging()
    signal.signal(signal.SIGTERM, _stop)
    parent_watch.start()
    retry.trust_authorities()
    if arguments.stage == "train":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # prepare has fetched everything: GPUs wait for no hub

    def run() -> StageResult:
        context = Context.load(arguments.job, arguments.workspace)
        os.environ["FINETUNE_JOB_FILE"] = arguments.job
        os.environ.setdefault("HF_HOME", f"{context.layout.cache}/huggingface")
        return _run(arguments.stage, context)

    _to_the_end(run)


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


def _fetch(words: list[str]) -> NoReturn:
    from .serving.replica import fetch, read_replica

    parser = argparse.ArgumentParser(prog="finetune_trainer fetch")
    parser.add_argument("--replica", default=ReplicaPaths.FILE)
    parser.add_argument("--to", default=ReplicaPaths.MODELS)
    told = parser.parse_args(words)
    redaction.configure_logging()
    signal.signal(signal.SIGTERM, _stop)
    retry.trust_authorities()
    retry.cap_hub_retry_wait()
    os.environ.setdefault("HF_HOME", f"{told.to}/cache/huggingface")
    _to_the_end(lambda: fetch(read_replica(told.replica), told.to))


def _agent(words: list[str]) -> None:
    from .serving.web import serve

    redaction.configure_logging()
    parent_watch.start()
    retry.trust_authorities()
    serve(words)


def _run(stage: str, context: Context) -> StageResult:
    if stage != "train":
        retry.cap_hub_retry_wait()
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
