"""One training process: the objective's trainer of TRL over the prepared tokens. Started by `train` through accelerate.

It writes no training loop of its own. What it adds: the check that the world is the one the job asked for,
checkpoints that are complete or absent, progress reports, and errors with a class.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, set_seed

from finetune_api.contract import Env, StageResult
from finetune_api.status import Plan

from ..checkpointing import checkpoints, reshard
from ..checkpointing.checkpoint_schedule import Keeper, together
from ..checkpointing.saving import save
from ..job.context import Context
from ..models import kernels
from ..models import load as models
from ..process import parent_watch, redaction
from ..process.errors import InfrastructureError, Stopped, classify
from ..process.heartbeat import Heartbeat
from ..process.ipc import ENVIRONMENT, Scratch
from ..training import devices, methods
from ..training.arguments import common
from ..training.objectives import OBJECTIVES, Setup
from ..training.progress import ProgressReporter, plot_history
from .train import check_devices

log = logging.getLogger("finetune.worker")


def main() -> None:
    """Entry point; a failure is written for the launcher before this process ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True)
    parser.add_argument("--workspace", required=True)
    arguments = parser.parse_args()
    redaction.configure()
    parent_watch.hold()
    scratch = Scratch(os.environ[ENVIRONMENT])
    try:
        result = fit(Context.load(arguments.job, arguments.workspace), Plan.model_validate_json(os.environ[Env.PLAN]))
    except Exception as failure:
        log.error("the process ends", exc_info=failure)
        error = classify(failure)
        words = error.result()
        _write_once(scratch.error, {"code": int(error.code), **words.to_wire()})
        sys.stderr.flush()
        os._exit(1)  # a peer may hang in a collective: no atexit handler may wait for it
    if result is not None:
        scratch.result.write_text(result.dumps())


def _write_once(path: Path, document: dict[str, Any]) -> None:
    try:
        with path.open("x") as sink:
            json.dump(document, sink)
    except FileExistsError:  # the first process that failed knows best
        pass


def fit(context: Context, plan: Plan) -> StageResult | None:
    """Train. Returns the stage's result on rank 0, None elsewhere."""
    cuda = torch.cuda.is_available() and context.spec.distribution.gpus_per_node > 0
    if cuda:
        check_devices(context.spec.distribution.gpus_per_node, torch.cuda.device_count())
    if plan.strategy.startswith("deepspeed"):
        _prefer_plain_collectives()
        if not cuda:
            _start_deepspeed_on_cpu()
    elif plan.strategy == "fsdp" and not cuda:
        _start_fsdp_on_cpu()
    kind = OBJECTIVES[context.spec.tuning.objective]
    arguments = kind.arguments(context, common(context, plan, cuda))  # starts the process group, and DeepSpeed's configuration
    _check_world(arguments, plan)
    if cuda:
        devices.check_own()
    set_seed(context.spec.tuning.hyperparameters.seed)  # the trainer does so too, but after the adapter was made
    attempt, scratch = int(os.environ.get(Env.ATTEMPT, "0")), Scratch.mine()
    fence = checkpoints.Fence(context.layout.checkpoints, attempt)
    begin = _begin(context, fence, plan, arguments)
    keeper = Keeper(
        context.spec.checkpoint,
        context.layout.checkpoints,
        nodes=plan.nodes(context.spec.distribution.gpus_per_node),
        fence=fence,
        scratch=scratch,
    )
    reporter = ProgressReporter(context, keeper, begin, attempt)
    beats = [Heartbeat(scratch)] if scratch is not None else []
    trainer = build_trainer(context, plan, arguments, cuda, [reporter, keeper, *beats])
    _check_strategy(trainer, plan)
    picked = kernels.named(trainer.model, arguments)
    log.info("starting from %s, with %s", begin.folder or "the base model", picked)
    output = trainer.train(resume_from_checkpoint=begin.folder)
    state = trainer.state
    if keeper.stopped_at is not None:
        raise Stopped(
            "Stopped",
            f"stopped on request at step {keeper.stopped_at} of {state.max_steps}; a checkpoint of that step is saved",
            {"checkpointStep": keeper.stopped_at},
        )
    stopped = state.global_step < state.max_steps
    if stopped and not _stopped_on_purpose(trainer):
        raise InfrastructureError("StoppedEarly", f"training ended at step {state.global_step} of {state.max_steps}")
    used = devices.gather() if cuda else []
    save(context, trainer)
    if not trainer.is_world_process_zero():
        return None
    context.write_json(context.layout.devices, {"kernels": picked, "estimated": plan.estimated_memory_per_gpu, "ranks": used})
    memory = f"; {devices.peak(used, plan)}" if used else ""
    plot_history(context.layout.history, context.layout.history_plot)
    best = f", best held-out loss {state.best_metric:.4g} at step {state.best_global_step}" if state.best_metric is not None else ""
    early = f" of {state.max_steps}, stopped early" if stopped else ""
    loss = output.training_loss
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return StageResult(
        reason="Trained",
        message=f"{state.global_step} steps{early}{f' (from the checkpoint at step {begin.step})' if begin.step else ''}, training loss {losses[0] if losses else loss:.4g} -> {losses[-1] if losses else loss:.4g}{best}; {picked}{memory}",
        result={
            "steps": state.global_step,
            "resumedFrom": begin.step,
            "loss": round(losses[-1] if losses else loss, 4),
            "epoch": round(state.epoch or 0.0, 3),
            "tokensPerSecond": reporter.tokens_per_second,
            "checkpointStep": checkpoints.newest_step(context.layout.checkpoints),
        },
    )


def _begin(context: Context, fence: checkpoints.Fence, plan: Plan, arguments: Any) -> checkpoints.Resume:
    """Where this attempt begins; rank 0 looks, for reading all of a checkpoint takes time."""
    found: list[Any] = [None]
    if not together() or torch.distributed.get_rank() == 0:
        fence.raise_()
        begin = checkpoints.find(context.layout.checkpoints)
        if _other_world(begin, plan):
            reshard.to_universal(begin)
        found = [begin]
    if together():
        torch.distributed.broadcast_object_list(found, src=0)
    if _other_world(found[0], plan):
        arguments.deepspeed_plugin.hf_ds_config.config["checkpoint"] = {"load_universal": True}
    return found[0]  # type: ignore[no-any-return]


def _other_world(begin: checkpoints.Resume, plan: Plan) -> bool:
    """Whether the checkpoint has state that belongs to another number of processes."""
    return plan.strategy.startswith("deepspeed") and begin.folder is not None and begin.world_size != plan.world_size


def _stopped_on_purpose(trainer: Any) -> bool:
    """Whether early stopping ended the run: its patience is used up."""
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
    return any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in found)


def _prefer_plain_collectives() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives at first use.

    The image has no compiler and a read-only root file system; gloo and NCCL do the same work.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _start_deepspeed_on_cpu() -> None:
    """Start the process group for DeepSpeed over gloo.

    TrainingArguments names no backend for DeepSpeed, and without a GPU accelerate then sees a world of one process;
    told to use the CPU it leaves DeepSpeed out. A state that is configured beforehand is taken as it is.
    """
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def _start_fsdp_on_cpu() -> None:
    """Start the process group for FSDP over gloo.

    PyTorch shards on CPU as well; accelerate asks for FSDP only where it counts several GPUs, and would run DDP in silence.
    """
    from accelerate import DistributedType, PartialState

    os.environ["ACCELERATE_USE_FSDP"] = "true"
    PartialState(cpu=True, backend="gloo").distributed_type = DistributedType.MULTI_GPU


def _check_world(arguments: Any, plan: Plan) -> None:
    """Refuse to train in a world that is not the one the job asked for: it would be slow, or wrong, in silence."""
    found = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if found != plan.world_size or arguments.world_size != plan.world_size:
        raise InfrastructureError("WorldMismatch", f"the job asked for {plan.world_size} processes, this world has {found}")


def _check_strategy(trainer: Any, plan: Plan) -> None:
    """Refuse to train with another strategy than the plan's: accelerate falls back to DDP in silence."""
    kind = trainer.accelerator.distributed_type.value
    wanted = "DEEPSPEED" if plan.strategy.startswith("deepspeed") else "FSDP" if plan.strategy == "fsdp" else None
    sharded = kind if kind in ("DEEPSPEED", "FSDP") else None
    if sharded != wanted:
        raise InfrastructureError("StrategyMismatch", f"the plan says {plan.strategy}, accelerate would run {kind}")


def build_trainer(context: Context, plan: Plan, arguments: Any, cuda: bool, callbacks: list[Any]) -> Any:
    """TRL's trainer for the objective, over the tokens that prepare wrote."""
    tuning, kind = context.spec.tuning, OBJECTIVES[context.spec.tuning.objective]
    folder = models.noted(context)
    tokenizer = models.load_tokenizer(context, folder)
    model = methods.tuned_model(context, plan, folder, arguments, reward=kind.reward_model, cuda=cuda)
    model.config.pad_token_id = tokenizer.pad_token_id
    stopping = tuning.hyperparameters.early_stopping
    if stopping is not None:
        callbacks = [*callbacks, EarlyStoppingCallback(stopping.patience, stopping.min_delta)]
    return kind.trainer(
        Setup(
            context=context,
            arguments=arguments,
            model=model,
            tokenizer=tokenizer,
            train=_dataset(context.layout.train_rows, kind.columns),
            held_out=_dataset(context.layout.eval_rows, kind.columns) if stopping is not None else None,
            callbacks=callbacks,
            optimizers=(methods.loraplus_optimizer(tuning, arguments, model), None),
        )
    )


def _dataset(path: str, columns: tuple[str, ...]) -> Any:
    from datasets import Dataset

    return Dataset.from_parquet(path, columns=list(columns), cache_dir=f"/tmp/datasets-{os.getpid()}")


if __name__ == "__main__":
    main()
