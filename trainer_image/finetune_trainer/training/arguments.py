"""TrainingArguments that all objectives share: every setting whose default surprises is set here by name."""

from __future__ import annotations

from typing import Any

import torch

from finetune_api.status import Plan

from ..job.context import Context
from ..models.kernels import use_liger_kernels
from ..models.load import compute_dtype, model_type
from .tracking import report_to

_OPTIMIZERS = {
    "adamw": ("adamw_torch_fused", "adamw_torch"),
    "adamw-8bit": ("adamw_8bit", "adamw_8bit"),
    "paged-adamw-8bit": ("paged_adamw_8bit", "paged_adamw_8bit"),
    "adafactor": ("adafactor", "adafactor"),
    "sgd": ("sgd", "sgd"),
}
"""By name: on GPU, on CPU."""


def common_arguments(context: Context, plan: Plan, cuda: bool) -> dict[str, Any]:
    """Keyword arguments of transformers.TrainingArguments."""
    spec, hyper = context.spec, context.spec.tuning.hyperparameters
    dtype, sharded = compute_dtype(cuda, hyper.precision), plan.strategy.startswith("deepspeed")
    configured = not cuda and (sharded or plan.strategy == "fsdp")
    stopping = hyper.early_stopping
    return {
        "output_dir": context.layout.checkpoints,
        "per_device_train_batch_size": plan.per_device_batch_size,
        "per_device_eval_batch_size": plan.per_device_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation,
        "num_train_epochs": hyper.epochs,
        "max_steps": hyper.max_steps or (plan.total_steps if spec.tuning.grpo is not None else -1),
        "learning_rate": hyper.learning_rate,
        "optim": _OPTIMIZERS[hyper.optimizer][0 if cuda else 1],
        "lr_scheduler_type": hyper.lr_scheduler_type,
        "warmup_steps": hyper.warmup_ratio,
        "weight_decay": hyper.weight_decay,
        "max_grad_norm": hyper.max_grad_norm,
        "seed": hyper.seed,
        "data_seed": hyper.seed,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False}
        if plan.gradient_checkpointing and plan.strategy != "deepspeed-zero3"
        else None,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "tf32": True if cuda and torch.cuda.get_device_capability() >= (8, 0) else None,
        "neftune_noise_alpha": hyper.neftune_noise_alpha,
        "torch_compile": hyper.torch_compile,
        "use_liger_kernel": use_liger_kernels(hyper.fused_kernels, model_type(context), cuda=cuda),
        "liger_kernel_config": {"fused_linear_cross_entropy": False},  # replaces forward, which rewards, orpo and TRL's own loss need
        "use_cpu": not cuda and not configured,  # accelerate would run DDP instead of DeepSpeed
        "ddp_backend": None if cuda or sharded or plan.world_size == 1 else "gloo",
        "ddp_find_unused_parameters": False,
        "deepspeed": deepspeed_config(plan) if sharded else None,
        "accelerator_config": {"use_configured_state": configured},
        "fsdp": True if plan.strategy == "fsdp" else None,
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding" if spec.tuning.objective in ("sft", "pretrain", "distill") else "no",
        # CheckpointCallback decides when, and publishes them atomically; transformers itself saves the best for early stopping
        "save_strategy": "best" if stopping is not None else "no",
        "eval_strategy": "steps" if stopping is not None else "no",
        "eval_steps": stopping.every_steps if stopping is not None else None,
        "load_best_model_at_end": stopping is not None,
        "metric_for_best_model": "eval_loss" if stopping is not None else None,
        "greater_is_better": False if stopping is not None else None,
        "report_to": report_to(context),
        "run_name": context.job.name,
        "disable_tqdm": True,
        "dataloader_drop_last": False,
        "dataloader_pin_memory": cuda,
    }


def deepspeed_config(plan: Plan) -> dict[str, Any]:
    """DeepSpeed's configuration (https://www.deepspeed.ai/docs/config-json/); `auto` is filled in by transformers."""
    stage = int(plan.strategy.removeprefix("deepspeed-zero"))
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": torch.cuda.is_available(), "contiguous_gradients": True}
    if plan.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if plan.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_accumulation_steps": plan.gradient_accumulation,
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
