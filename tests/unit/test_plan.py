"""The plan: strategy, offload, checkpointing and batch from memory; what cannot fit is refused with what would."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.scalars import human_duration
from finetune_api.validation import parse_spec
from finetune_operator.reconcile.job import usage
from finetune_trainer.process.errors import UserError
from finetune_trainer.training.memory import GIB, Memory, ModelShape, Setting, estimate, human_bytes
from finetune_trainer.training.plan import make_plan
from tests.factory import MINIMAL, merged

LLAMA_8B = ModelShape(8_030_000_000, 42_000_000, 6_980_000_000, 4096, 32, 4096, 14336, 128_256)
LLAMA_70B = ModelShape(70_550_000_000, 207_000_000, 68_450_000_000, 8192, 80, 8192, 28672, 128_256)
TINY = ModelShape(200_000, 10_000, 150_000, 64, 2, 64, 128, 400)


def spec(method: str = "lora", gpus: int = 1, nodes: int = 1, memory: str | None = None, **more: Any) -> Any:
    hyper = {"globalBatchSize": 64, "maxLength": 2048, **more.pop("hyper", {})}
    document = merged(
        MINIMAL,
        tuning={"method": method, "hyperparameters": hyper, **more.pop("tuning", {})},
        distribution={"nodes": nodes, "gpusPerNode": gpus, **more.pop("distribution", {})},
        resources={"gpuMemory": memory} if memory else {},
        **more,
    )
    return parse_spec(document)


def full(shape: ModelShape) -> ModelShape:
    return ModelShape(**{**shape.__dict__, "trainable": shape.parameters})


def test_the_work_is_estimated() -> None:
    """A thousand rows of 500 tokens, three epochs in batches of 64: 16 steps an epoch."""
    plan = make_plan(spec("full", gpus=8, memory="80Gi", hyper={"gradientCheckpointing": False}), 1000, full(LLAMA_8B), tokens=500_000)
    seen = 48 * 64 * 500
    assert plan.estimated_petaflops == pytest.approx(6 * LLAMA_8B.parameters * seen / 1e15, rel=1e-3)
    frozen = make_plan(spec(gpus=8, memory="80Gi", hyper={"gradientCheckpointing": True}), 1000, LLAMA_8B, tokens=500_000)
    assert frozen.estimated_petaflops == pytest.approx((6 * LLAMA_8B.parameters + 2 * LLAMA_8B.trainable) * seen / 1e15, rel=1e-3)
    # eight H100 at 35 % of 989 TFLOP/s
    duration, cost = usage.estimate(plan, 989, 3.0)
    seconds = plan.estimated_petaflops / (0.989 * 0.35 * 8)
    assert duration == human_duration(seconds) and cost == round(seconds / 3600 * 8 * 3.0, 2)
    assert usage.estimate(plan, None, 3.0) == (None, None) and usage.estimate(plan, 989, None)[1] is None


@pytest.mark.parametrize(
    ("name", "job", "shape", "strategy", "expected"),
    [
        ("CPU", spec(gpus=0), TINY, "ddp", {"perDeviceBatchSize": 8}),
        ("lora on one large GPU", spec(memory="80Gi"), LLAMA_8B, "ddp", {"offload": "none"}),
        ("lora on a small GPU", spec(memory="24Gi"), LLAMA_8B, "ddp", {"gradientCheckpointing": True}),
        ("qlora on a small GPU", spec("qlora", memory="16Gi"), LLAMA_8B, "ddp", {"gradientCheckpointing": True}),
        ("full on eight", spec("full", gpus=8, memory="80Gi"), full(LLAMA_8B), "deepspeed-zero2", {}),
        ("full on eight small ones", spec("full", gpus=8, memory="26Gi"), full(LLAMA_8B), "deepspeed-zero3", {}),
        ("70B lora over sixteen", spec(gpus=8, nodes=2, memory="80Gi"), LLAMA_70B, "deepspeed-zero3", {}),
        ("8B full on one", spec("full", memory="80Gi"), full(LLAMA_8B), "deepspeed-zero2", {"offload": "optimizer"}),
        ("unknown memory", spec("full", gpus=8), full(LLAMA_8B), "deepspeed-zero3", {"gradientCheckpointing": False}),
        ("as asked for", spec(gpus=4, distribution={"strategy": "deepspeed-zero1"}), LLAMA_8B, "deepspeed-zero1", {}),
        ("fsdp alone", spec(distribution={"strategy": "fsdp"}), LLAMA_8B, "ddp", {}),
        ("batch as asked for", spec(distribution={"perDeviceBatchSize": 2}), TINY, "ddp", {"perDeviceBatchSize": 2, "gradientAccumulation": 32}),
    ],
)  # fmt: skip
def test_the_choice(name: str, job: Any, shape: ModelShape, strategy: str, expected: dict[str, Any]) -> None:
    plan = make_plan(job, 1000, shape)
    wire = plan.to_wire()
    assert plan.strategy == strategy, plan.reason
    assert {key: wire.get(key) for key in expected} == expected, plan.reason
    assert plan.world_size * plan.per_device_batch_size * plan.gradient_accumulation == 64
    assert (plan.estimated_memory_per_gpu and "memory: weights" in plan.reason) or shape is TINY


def test_what_fits_fits_and_what_is_chosen_is_the_fastest_that_does() -> None:
    job = spec(memory="24Gi")
    plan = make_plan(job, 1000, LLAMA_8B)
    assert plan.estimated_memory_per_gpu < "24Gi"
    roomy = make_plan(spec(memory="140Gi"), 1000, LLAMA_8B)
    assert not roomy.gradient_checkpointing and roomy.per_device_batch_size >= plan.per_device_batch_size


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    with pytest.raises(UserError) as refused:
        make_plan(spec("qlora", memory="24Gi"), 1000, LLAMA_70B)
    message = refused.value.message
    assert refused.value.reason == "DoesNotFit"
    assert "resources.gpuMemory is 24Gi" in message and "It fits with GPUs of" in message
    with pytest.raises(UserError, match=r"It fits with 8 GPUs instead of 4 .*tuning.method lora or qlora"):
        make_plan(spec("full", gpus=4, memory="24Gi", distribution={"strategy": "deepspeed-zero3"}), 1000, full(LLAMA_8B))
    with pytest.raises(UserError, match=r"or with hyperparameters.maxLength \d+"):
        make_plan(spec(memory="24Gi", hyper={"maxLength": 524288}), 1000, LLAMA_8B)


def test_what_cannot_be_compared_on_one_gpu_is_refused_before_it_is_trained() -> None:
    compared = {"evaluation": {"metrics": ["loss"]}, "dataset": {**MINIMAL["dataset"], "eval": {"splitFraction": 0.1}}}
    shards = {"gpus": 8, "memory": "80Gi", "distribution": {"strategy": "deepspeed-zero3"}}
    make_plan(spec(**shards), 1000, LLAMA_70B)
    with pytest.raises(
        UserError, match=r"in 16 bit on one GPU, which takes 132Gi and more; resources.gpuMemory is 80Gi. Remove evaluation"
    ):
        make_plan(spec(**shards, **compared), 1000, LLAMA_70B)
    make_plan(spec(**shards, **compared), 1000, LLAMA_8B)


def test_a_model_that_cannot_compute_activations_again_gets_smaller_batches() -> None:
    assert make_plan(spec(memory="24Gi"), 1000, LLAMA_8B).gradient_checkpointing
    plan = make_plan(spec(memory="48Gi"), 1000, ModelShape(**{**LLAMA_8B.__dict__, "recomputes": False}))
    assert not plan.gradient_checkpointing


def test_steps_of_grpo_count_answers() -> None:
    tuning = {"objective": "grpo", "grpo": {"rewards": [{"type": "exact-match"}], "generations": 8}}
    assert make_plan(spec(tuning=tuning, hyper={"epochs": 1}), 100, TINY).total_steps == 13  # 100 prompts x 8 answers / 64


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sharding_divides_what_it_says(stage: int) -> None:
    """ZeRO, table 1: optimizer state from stage 1 on, gradients from 2, parameters from 3."""
    strategy = f"deepspeed-zero{stage}" if stage else "ddp"
    one, eight = (estimate(spec("full"), full(LLAMA_8B), Setting(strategy if stage else "ddp", world, 1, True)) for world in (1, 8))
    assert (eight.optimizer < one.optimizer) == (stage >= 1)
    assert (eight.gradients < one.gradients) == (stage >= 2)
    assert (eight.weights < one.weights) == (stage >= 3)
    assert eight.activations == one.activations


def test_offload_frees_the_gpu() -> None:
    plain, optimizer, parameters = (
        estimate(spec("full"), full(LLAMA_8B), Setting("deepspeed-zero3", 8, 1, True, offload))
        for offload in ("none", "optimizer", "parameters")
    )
    assert plain.total > optimizer.total > parameters.total and optimizer.optimizer == 0


def test_known_sizes() -> None:
    """Published peaks, within a quarter: QLoRA's paper fits 7B in 5 GB of weights and 65B in 48 GB with short rows."""
    seven = ModelShape(6_740_000_000, 160_000_000, 6_480_000_000, 4096, 32, 4096, 11008, 32_000)
    weights = estimate(spec("qlora"), seven, Setting("ddp", 1, 1, True)).weights
    assert 3.5 * GIB < weights < 6 * GIB
    sixty_five = ModelShape(65_300_000_000, 800_000_000, 64_500_000_000, 8192, 80, 8192, 22016, 32_000)
    job = spec("qlora", hyper={"maxLength": 512, "optimizer": "paged-adamw-8bit"})
    assert estimate(job, sixty_five, Setting("ddp", 1, 1, True)).total < 48 * GIB


@pytest.mark.parametrize(("size", "text"), [(1, "1Mi"), (820 * 1024**2, "820Mi"), (int(6.14 * GIB), "6.1Gi"), (61 * GIB, "61Gi")])
def test_sizes_for_people(size: int, text: str) -> None:
    assert human_bytes(size) == text
    assert Memory(1, 2, 3, 4, 5).total == 15


@pytest.mark.parametrize(
    ("hyper", "gpus", "packed", "said"),
    [
        ({"packing": True, "attention": "sdpa"}, 1, 300, "packed rows cost the square of their tokens together with attention sdpa"),
        ({"packing": True, "attention": "eager"}, 0, 300, "packed rows cost the square of their tokens together with attention eager"),
        ({"packing": True}, 0, None, "packing is off: no attention on CPU keeps packed rows apart"),
        ({"packing": True}, 1, None, "packing is off: no attention of this model keeps packed rows apart"),
        ({"packing": True}, 1, 300, ""),
        ({"attention": "sdpa"}, 1, None, ""),
    ],
)
def test_what_becomes_of_packing_is_said(hyper: dict[str, Any], gpus: int, packed: int | None, said: str) -> None:
    plan = make_plan(spec(gpus=gpus, hyper={"epochs": 2, **hyper}), 1000, TINY, packed=packed, tokens=10_000)
    assert said in plan.reason
    assert bool(said) is ("square of their tokens together" in plan.reason)
    assert plan.total_steps == (2 * 5 if packed else 2 * 16), "64 sequences a step, or 64 rows"
    assert ("64 packed sequences a step" in plan.reason) is (packed is not None)


def test_packed_sequences_are_counted_as_trl_packs_them() -> None:
    import random

    from datasets import Dataset
    from trl.data_utils import pack_dataset

    from finetune_trainer.data.packing import packed_sequences

    draw = random.Random(0)
    lengths = [draw.choice((draw.randint(1, 20), draw.randint(1, 90))) for _ in range(2500)]
    rows = Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
    packed = pack_dataset(rows, 64)
    assert packed_sequences(lengths, 64) == len(packed)
    assert packed_sequences([], 64) == 0 and packed_sequences([64, 64], 64) == 2 and packed_sequences([32] * 4, 64) == 2


def test_what_is_done_otherwise_is_said() -> None:
    assert "; lora.dropout is 0; memory:" in make_plan(spec(), 1000, TINY, notes=["lora.dropout is 0"]).reason
