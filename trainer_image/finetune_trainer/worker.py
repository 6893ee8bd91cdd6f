"""One training process: TRL's SFTTrainer over the prepared tokens. Started by `train` through accelerate.

It writes no training loop of its own. What it adds: the check that the world is the one the job asked for,
checkpoints that are complete or absent, progress reports, and errors with a class.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from finetune_api.contract import Env, StageResult
from finetune_api.status import Plan

from . import checkpoints, models
from .context import Context
from .errors import InfrastructureError, UserError, classify
from .progress import ProgressReporter
from .train import ERROR_FILE, RESULT_FILE

log = logging.getLogger("finetune.worker")


def main() -> None:
    """Entry point; a failure is written for the launcher before this process ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True)
    parser.add_argument("--workspace", required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr, force=True)
    try:
        result = fit(Context.load(arguments.job, arguments.workspace), Plan.model_validate_json(os.environ[Env.PLAN]))
    except Exception as failure:
        traceback.print_exc()
        error = classify(failure)
        words = error.result()
        _write_once(os.environ[ERROR_FILE], {"code": int(error.code), "reason": words.reason, "message": words.message})
        sys.stderr.flush()
        os._exit(1)  # a peer may hang in a collective: no atexit handler may wait for it
    if result is not None:
        Path(os.environ[RESULT_FILE]).write_text(result.dumps())


def _write_once(path: str, document: dict[str, Any]) -> None:
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w") as sink:
            json.dump(document, sink)
    except FileExistsError:  # the first process that failed knows best
        pass


def fit(context: Context, plan: Plan) -> StageResult | None:
    """Train. Returns the stage's result on rank 0, None elsewhere."""
    cuda = torch.cuda.is_available() and context.spec.distribution.gpus_per_node > 0
    if plan.strategy.startswith("deepspeed"):
        _prefer_plain_collectives()
        if not cuda:
            _start_deepspeed_on_cpu()
    arguments = training_arguments(context, plan, cuda)  # starts the process group, and DeepSpeed's configuration
    _check_world(arguments, plan)
    trainer = build_trainer(context, arguments, cuda)
    _check_strategy(trainer, plan)
    reporter = ProgressReporter(context)
    trainer.add_callback(reporter)
    trainer.add_callback(checkpoints.Keeper(context.spec.checkpoint, context.layout.checkpoints))
    resume = checkpoints.newest(context.layout.checkpoints, plan)
    begun = int(Path(resume).name.removeprefix("checkpoint-")) if resume else 0
    log.info("starting from %s", resume or "the base model")
    output = trainer.train(resume_from_checkpoint=resume)
    state = trainer.state
    if state.global_step < state.max_steps:
        raise InfrastructureError("StoppedEarly", f"training ended at step {state.global_step} of {state.max_steps}")
    _save(context, trainer)
    if not trainer.is_world_process_zero():
        return None
    loss = output.training_loss
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return StageResult(
        reason="Trained",
        message=f"{state.global_step} steps{f' (from the checkpoint at step {begun})' if begun else ''}, training loss {losses[0] if losses else loss:.4g} -> {losses[-1] if losses else loss:.4g}",
        result={
            "steps": state.global_step,
            "resumedFrom": begun,
            "loss": round(losses[-1] if losses else loss, 4),
            "epoch": round(state.epoch or 0.0, 3),
            "tokensPerSecond": reporter.tokens_per_second,
            "checkpointStep": checkpoints.newest_step(context.layout.checkpoints),
        },
    )


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


def training_arguments(context: Context, plan: Plan, cuda: bool) -> Any:
    """SFTConfig: every setting whose default surprises is set here by name."""
    from trl import SFTConfig

    spec, hyper = context.spec, context.spec.tuning.hyperparameters
    dtype, sharded = models.compute_dtype(cuda), plan.strategy.startswith("deepspeed")
    return SFTConfig(
        output_dir=context.layout.checkpoints,
        per_device_train_batch_size=plan.per_device_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation,
        num_train_epochs=hyper.epochs,
        max_steps=hyper.max_steps or -1,
        learning_rate=hyper.learning_rate,
        lr_scheduler_type=hyper.lr_scheduler_type,
        warmup_steps=hyper.warmup_ratio,
        weight_decay=hyper.weight_decay,
        max_grad_norm=hyper.max_grad_norm,
        seed=hyper.seed,
        data_seed=hyper.seed,
        max_length=hyper.max_length,
        packing=hyper.packing,
        packing_strategy="bfd",
        padding_free=False,
        completion_only_loss=False,
        assistant_only_loss=False,
        gradient_checkpointing=hyper.gradient_checkpointing,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not cuda and not sharded,  # accelerate would run DDP instead of DeepSpeed
        ddp_backend=None if cuda or sharded or plan.world_size == 1 else "gloo",
        ddp_find_unused_parameters=False,
        deepspeed=deepspeed_config(spec.distribution.offload, plan.strategy, plan.gradient_accumulation) if sharded else None,
        accelerator_config={"use_configured_state": sharded and not cuda},
        fsdp=True if plan.strategy == "fsdp" else None,
        logging_steps=1,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="no",  # checkpoints.Keeper decides, and publishes them atomically
        report_to="none",
        disable_tqdm=True,
        dataloader_drop_last=False,
        dataloader_pin_memory=cuda,
        remove_unused_columns=True,
    )


def deepspeed_config(offload: str, strategy: str, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's configuration (https://www.deepspeed.ai/docs/config-json/); `auto` is filled in by transformers."""
    stage = int(strategy.removeprefix("deepspeed-zero"))
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": torch.cuda.is_available(), "contiguous_gradients": True}
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


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


def build_trainer(context: Context, arguments: Any, cuda: bool) -> Any:
    """TRL's trainer over the tokens that prepare wrote."""
    from datasets import Dataset
    from peft import prepare_model_for_kbit_training
    from trl import SFTTrainer

    spec = context.spec
    folder = models.resolve(context)
    dataset = Dataset.from_parquet(context.layout.train_tokens, cache_dir=f"/tmp/datasets-{os.getpid()}")
    dtype = models.compute_dtype(cuda)
    device = f"cuda:{torch.cuda.current_device()}" if cuda else "cpu"
    quantised = spec.tuning.method == "qlora"
    load = dtype if spec.tuning.method != "full" else torch.float32  # the optimizer needs full-precision weights
    model = models.load_model(context, folder, dtype=load, quantised=quantised, device=device)
    model.config.use_cache = False
    if quantised:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=arguments.gradient_checkpointing)
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=models.load_tokenizer(context, folder),
        peft_config=peft_config(context),
    )


def peft_config(context: Context) -> Any:
    """The adapter's configuration, or None for full fine-tuning."""
    from peft import LoraConfig

    from finetune_api.spec import Lora

    if context.spec.tuning.method == "full":
        return None
    lora = context.spec.tuning.lora or Lora()
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.target_modules == ["all-linear"] else lora.target_modules,
        task_type="CAUSAL_LM",
    )


def _save(context: Context, trainer: Any) -> None:
    """Write the adapter or the model, and check that it is not empty (an adapter under ZeRO-3 once was)."""
    output = Path(context.layout.output)
    trainer.save_model(str(output))
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    trainer.processing_class.save_pretrained(str(output))
    from safetensors import safe_open

    files = sorted(output.glob("*.safetensors"))
    count = nonzero = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                count += 1
                nonzero += bool(tensors.get_tensor(name).any())
    if not files or not count or not nonzero:
        raise UserError(
            "EmptyResult", f"the saved result has {count} tensors, {nonzero} of them with a non-zero value; nothing was learned or saved"
        )


if __name__ == "__main__":
    main()
