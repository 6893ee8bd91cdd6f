"""`python -m finetune_trainer STAGE --job job.json --workspace DIR`: one stage, with its exit code and last words."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from typing import NoReturn, get_args

from finetune_api.contract import ExitCode, Mounts, Stage, StageResult

from . import lifeline, secrecy, sources
from .context import Context
from .errors import Stopped, classify

log = logging.getLogger("finetune")


def _last_words(result: StageResult) -> None:
    path = os.environ.get("FINETUNE_TERMINATION_LOG", Mounts.TERMINATION_LOG)
    try:
        with open(path, "w") as sink:
            sink.write(secrecy.redact(result.dumps()))
    except OSError as failure:  # outside a pod there is none
        log.debug("no termination log: %s", failure)


def _stop(number: int, _: object) -> NoReturn:
    raise Stopped("Stopped", f"stopped by {signal.Signals(number).name}")


def main() -> None:
    """Run a stage; exits with the code of the contract."""
    parser = argparse.ArgumentParser(prog="finetune_trainer", description=__doc__)
    parser.add_argument("stage", choices=get_args(Stage))
    parser.add_argument("--job", required=True)
    parser.add_argument("--workspace", required=True)
    arguments = parser.parse_args()
    secrecy.configure()
    signal.signal(signal.SIGTERM, _stop)
    lifeline.hold()
    sources.trust()
    if arguments.stage == "train":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # prepare has fetched everything: GPUs wait for no hub
    try:
        context = Context.load(arguments.job, arguments.workspace)
        os.environ["FINETUNE_JOB_FILE"] = arguments.job
        os.environ.setdefault("HF_HOME", f"{context.layout.cache}/huggingface")
        result = _run(arguments.stage, context)
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


def _run(stage: str, context: Context) -> StageResult:
    if stage != "train":
        sources.hub_never_sleeps_long()
    if stage == "prepare":
        from .prepare import prepare as run
    elif stage == "check":
        from .check import check as run
    elif stage == "train":
        from .train import train as run
    elif stage == "evaluate":
        from .evaluation.stage import evaluate as run
    else:
        from .publish import publish as run
    return run(context)


if __name__ == "__main__":
    main()
