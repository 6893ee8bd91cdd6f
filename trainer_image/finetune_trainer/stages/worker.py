"""One training process: TRL's trainer for the objective over the prepared tokens. Started by `train`, as `launch_command` says.

    python -m finetune_trainer worker --job job.json --workspace DIR

It writes no training loop of its own. What it adds: the check that the world is the one the job asked for, checkpoints that
are complete or absent, progress reports, and errors with a class. It does not know of the pod: who started it, how many
processes stand beside it and when they are to stop is the supervisor's (process/supervise.py).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Any

import torch
from transformers import set_seed

from finetune_api.contract import Env, StageResult
from finetune_api.status import Plan

from ..checkpointing import reshard
from ..checkpointing.checkpoint_schedule import CheckpointCallback
from ..checkpointing.checkpoints import Fence, ResumePoint, find_latest, latest_step
from ..checkpointing.saving import save_result
from ..job.context import Context
from ..models.kernels import describe_kernels
from ..process import parent_watch, ranks, redaction
from ..process.errors import InfrastructureError, Stopped, classify
from ..process.heartbeat import HeartbeatCallback
from ..process.ipc import IPC_DIR, Channel
from ..training import devices
from ..training.arguments import common_arguments
from ..training.build import build_trainer, stopped_early
from ..training.launch import check_device_count
from ..training.objectives import OBJECTIVES
from ..training.progress import ProgressReporter, plot_history
from ..training.strategies import check_strategy, check_world, prepare_strategy
from ..training.tracking import tolerate_trackers

log = logging.getLogger("finetune.worker")


def main(words: list[str]) -> None:
    """Entry point; a failure is written for the supervisor before this process ends."""
    parser = argparse.ArgumentParser(prog="finetune_trainer worker", description=__doc__)
    parser.add_argument("--job", required=True)
    parser.add_argument("--workspace", required=True)
    arguments = parser.parse_args(words)
    redaction.configure_logging()
    parent_watch.start()
    channel = Channel(os.environ[IPC_DIR])
    try:
        result = fit(Context.load(arguments.job, arguments.workspace), Plan.model_validate_json(os.environ[Env.PLAN]))
    except Exception as failure:
        log.error("the process ends", exc_info=failure)
        channel.send_error(classify(failure))
        sys.stderr.flush()
        os._exit(1)  # a peer may hang in a collective: no atexit handler may wait for it
    if result is not None:
        channel.send_result(result)


def fit(context: Context, plan: Plan) -> StageResult | None:
    """Train. Returns the stage's result on rank 0, None elsewhere."""
    spec = context.spec
    cuda = torch.cuda.is_available() and spec.distribution.gpus_per_node > 0

    # 1. The world that the plan asks for: its devices, its processes
    if cuda:
        check_device_count(spec.distribution.gpus_per_node, torch.cuda.device_count())
    prepare_strategy(plan, cuda=cuda)
    arguments = OBJECTIVES[spec.tuning.objective].arguments(context, common_arguments(context, plan, cuda))  # and the process group
    check_world(arguments, plan)
    if cuda:
        devices.check_distinct()
    set_seed(spec.tuning.hyperparameters.seed)  # the trainer does so too, but after the adapter was made

    # 2. Where this attempt begins
    attempt, channel = int(os.environ.get(Env.ATTEMPT, "0")), Channel.from_environment()
    fence = Fence(context.layout.checkpoints, attempt)
    resume = _resume_point(context, fence, plan, arguments)

    # 3. The trainer, and what watches it
    nodes = plan.nodes(spec.distribution.gpus_per_node)
    checkpointing = CheckpointCallback(spec.checkpoint, context.layout.checkpoints, nodes=nodes, fence=fence, channel=channel)
    progress = ProgressReporter(context, checkpointing, resume, attempt)
    heartbeat = [HeartbeatCallback(channel)] if channel is not None else []
    trainer = build_trainer(context, plan, arguments, cuda, [progress, checkpointing, *heartbeat])
    check_strategy(trainer, plan)
    trackers = tolerate_trackers(trainer)
    kernels = describe_kernels(trainer.model, arguments)
    log.info("starting from %s, with %s", resume.folder or "the base model", kernels)

    # 4. Train; transformers returns from a stopped run as from a finished one
    if resume.finished:
        trainer.get_batch_samples = lambda *_: ([], None)  # in the middle of an epoch it would do one step too many
    output, state = trainer.train(resume_from_checkpoint=resume.folder), trainer.state
    if (step := checkpointing.stopped_at) is not None:
        message = f"stopped on request at step {step} of {state.max_steps}; a checkpoint of that step is saved"
        raise Stopped("Stopped", message, {"checkpointStep": step})
    if state.global_step < state.max_steps and not stopped_early(trainer):
        raise InfrastructureError("StoppedEarly", f"training ended at step {state.global_step} of {state.max_steps}")

    # 5. The result in the workspace
    memory = devices.gather_memory() if cuda else []
    save_result(context, trainer)
    if not trainer.is_world_process_zero():
        return None
    context.write_json(context.layout.devices, {"kernels": kernels, "estimated": plan.estimated_memory_per_gpu, "ranks": memory})
    plot_history(context.layout.history, context.layout.history_plot)

    # 6. What people are told
    told = [_message(state, resume, output.training_loss), kernels]
    told += [devices.describe_peak(memory, plan)] if memory else []
    told += [f"without {tracker.name}: {tracker.failure}" for tracker in trackers if tracker.failure]
    return StageResult(
        reason="Trained",
        message="; ".join(told),
        result={
            "steps": state.global_step,
            "resumedFrom": resume.step,
            "loss": round(_losses(state, output.training_loss)[-1], 4),
            "epoch": round(state.epoch or 0.0, 3),
            "tokensPerSecond": progress.tokens_per_second,
            "checkpointStep": latest_step(context.layout.checkpoints),
        },
    )


def _resume_point(context: Context, fence: Fence, plan: Plan, arguments: Any) -> ResumePoint:
    """Where this attempt begins; rank 0 looks, for reading all of a checkpoint takes time."""
    resume = None
    if ranks.is_first():
        fence.claim()
        resume = find_latest(context.layout.checkpoints)
        if _needs_reshard(resume, plan):
            reshard.to_universal(resume)
    found: ResumePoint = ranks.broadcast(resume)
    if _needs_reshard(found, plan):
        arguments.deepspeed_plugin.hf_ds_config.config["checkpoint"] = {"load_universal": True}
    return found


def _needs_reshard(resume: ResumePoint, plan: Plan) -> bool:
    """Whether the checkpoint has state that belongs to another number of processes."""
    return plan.strategy.startswith("deepspeed") and resume.folder is not None and resume.world_size != plan.world_size


def _losses(state: Any, mean: float) -> list[float]:
    """The loss of each logged step; of a run without one, its mean."""
    return [entry["loss"] for entry in state.log_history if "loss" in entry] or [mean]


def _message(state: Any, resume: ResumePoint, mean: float) -> str:
    early = f" of {state.max_steps}, stopped early" if state.global_step < state.max_steps else ""
    begun = f" (from the checkpoint at step {resume.step})" if resume.step else ""
    losses = _losses(state, mean)
    best = f", best held-out loss {state.best_metric:.4g} at step {state.best_global_step}" if state.best_metric is not None else ""
    return f"{state.global_step} steps{early}{begun}, training loss {losses[0]:.4g} -> {losses[-1]:.4g}{best}"
