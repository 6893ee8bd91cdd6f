"""The kernels that are picked, and that `varlen` gives what a dense mask gives. The kernel itself needs a GPU: here a plain one stands in."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.utils import import_utils

from finetune_api.status import Plan
from finetune_trainer.models import kernels, load
from finetune_trainer.models.architecture import model_class
from finetune_trainer.models.kernels import VARLEN, PackedRows, pick_attention, use_liger_kernels
from finetune_trainer.process.errors import InfrastructureError
from finetune_trainer.training import devices

from .conftest import ROWS, Bench, history

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 4},
    "Gemma3Text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi3": {},
    "Olmo2": {},
    "SmolLM3": {},
}


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: PackedRows, scale: float | None) -> torch.Tensor:
    """What varlen_attn computes: row for row, causal, within the window."""
    starts, found = rows.cu_seqlens.tolist(), []
    assert rows.cu_seqlens.dtype == torch.int32 and rows.max_seqlen == max(b - a for a, b in pairwise(starts))
    for start, stop in pairwise(starts):
        q, k, v = (part[start:stop].transpose(0, 1) for part in (query, key, value))
        seen = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        if rows.window is not None:
            seen &= ~torch.ones_like(seen).tril(-rows.window)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        found.append(out.transpose(0, 1))
    return torch.cat(found)


def small_model(family: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **FAMILIES[family]})
    return getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_varlen_is_a_dense_mask_for_less(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    calls: list[PackedRows] = []
    monkeypatch.setattr(kernels, "_varlen", lambda q, k, v, rows, scale: calls.append(rows) or plain(q, k, v, rows, scale))
    kernels.register_varlen()
    model = small_model(family)
    assert kernels.supports_varlen(type(model), model.config)
    lengths = [5, 1, 9, 12]
    ids = torch.randint(2, 90, (1, sum(lengths)))
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    padded = torch.ones(2, 6, dtype=torch.long)
    padded[1, :2] = 0
    batches = {
        "packed": {"input_ids": ids, "position_ids": places},
        "one row": {"input_ids": ids},
        "padded": {"input_ids": ids[:, :12].reshape(2, 6), "attention_mask": padded},
    }
    wanted = {}
    for name, batch in batches.items():
        model.set_attn_implementation("sdpa")
        wanted[name] = model(**batch, use_cache=False).logits
        model.set_attn_implementation(VARLEN)
        found = model(**batch, use_cache=False).logits
        seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        assert torch.allclose(found[seen], wanted[name][seen], atol=1e-5), name
        assert bool(calls) == (name == "packed")  # the kernel is for packed rows, and they get it
        calls.clear()
    changed = ids.clone()
    changed[0, :5] = (changed[0, :5] + 7) % 90
    model.set_attn_implementation(VARLEN)
    other = model(input_ids=changed, position_ids=places, use_cache=False).logits
    assert torch.equal(other[:, 5:], model(**batches["packed"], use_cache=False).logits[:, 5:])
    assert not torch.allclose(other[:, :5], wanted["packed"][:, :5])
    model.train()
    model.gradient_checkpointing_enable()
    model(**batches["packed"], labels=ids, use_cache=False).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_mask_that_looks_ahead_is_dense() -> None:
    def both_ways(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query // 4) == (key // 4)

    found = kernels.varlen_mask(batch_size=1, q_length=8, kv_length=8, mask_function=both_ways, allow_is_causal_skip=False)
    assert isinstance(found, torch.Tensor) and found.shape == (1, 1, 8, 8) and bool(found[0, 0, 0, 3])


def test_dropout_is_refused() -> None:
    parts = [torch.zeros(1, 2, 3, 8)] * 3
    with pytest.raises(ValueError, match="no dropout"):
        kernels.varlen_attention(None, *parts, PackedRows(torch.tensor([0, 3]), 3, None), dropout=0.1)


def test_under_autocast_the_kernel_gets_half_precision() -> None:
    query, value = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert kernels._half(query, value) == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels._half(query, query) == torch.bfloat16
    assert kernels._half(query, query) == torch.float32


AMPERE, TURING = (8, 0), (7, 5)
HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("expected", "wanted", "family", "given"),
    [
        ("sdpa", "auto", "Llama", {"cuda": False}),
        (VARLEN, "auto", "Llama", {}),
        (VARLEN, "auto", "Llama", {"dtype": torch.float16}),
        ("flash_attention_2", "auto", "Llama", {"flash": True}),
        ("sdpa", "auto", "Llama", {"dtype": FULL, "flash": True}),
        ("sdpa", "auto", "Llama", {"capability": TURING}),
        ("sdpa", "auto", "Llama", {"padding_free": False}),
        ("sdpa", "auto", "Llama", {"compiled": True}),
        ("sdpa", "auto", "Llama", {"config": {"attention_dropout": 0.1}}),
        ("sdpa", "auto", "Llama", {"config": {"head_dim": 512}}),
        ("eager", "auto", "Gemma2", {}),  # soft-capped scores, which sdpa has not either
        ("eager", "auto", "GptOss", {}),
        ("sdpa", "sdpa", "Llama", {}),
        ("eager", "eager", "Llama", {"flash": True}),
        ("flash_attention_2", "flash-attention-2", "Llama", {}),
    ],
)
def test_what_is_picked(monkeypatch: pytest.MonkeyPatch, expected: str, wanted: str, family: str, given: dict[str, Any]) -> None:
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: given.get("flash", False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: given.get("capability", AMPERE))
    config = getattr(transformers, f"{family}Config")(**given.get("config", {}))
    kind = model_class(transformers.AutoModelForCausalLM, config)
    options = {"cuda": given.get("cuda", True), "padding_free": given.get("padding_free", True), "compiled": given.get("compiled", False)}
    assert pick_attention(wanted, kind, config, given.get("dtype", HALF), **options) == expected


def test_a_model_with_code_of_its_own_keeps_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: AMPERE)
    config = transformers.LlamaConfig()
    assert model_class(transformers.AutoModelForCausalLM, SimpleNamespace()) is None
    assert pick_attention("auto", None, config, HALF, cuda=True, padding_free=True) == "sdpa"


@pytest.mark.skipif(not import_utils.is_liger_kernel_available(), reason="liger-kernel is not installed")
def test_liger_is_for_gpus_and_models_that_it_knows() -> None:
    assert use_liger_kernels("auto", "llama", cuda=True) and use_liger_kernels("auto", "qwen3", cuda=True)
    assert not use_liger_kernels("auto", "gpt2", cuda=True)
    assert not use_liger_kernels("auto", "llama", cuda=False)
    assert not use_liger_kernels("off", "llama", cuda=True)


@pytest.mark.skipif(not import_utils.is_liger_kernel_available(), reason="liger-kernel is not installed")
def test_liger_leaves_the_forward_pass_alone(bench: Bench, tiny_model: Path) -> None:
    """It would compute the loss itself: a reward model has no vocabulary, orpo and distill read the logits, TRL has its own loss."""
    from finetune_trainer.stages.prepare import prepare
    from finetune_trainer.training.arguments import common_arguments

    context = bench.context(ROWS["messages"])
    plan = Plan.model_validate(prepare(context).result["plan"])
    code = """
import json, sys, torch, transformers
from transformers.integrations.liger import apply_liger_kernel
for kind in (transformers.AutoModelForSequenceClassification, transformers.AutoModelForCausalLM):
    model = kind.from_pretrained(sys.argv[1])
    apply_liger_kernel(model, json.loads(sys.argv[2]))
    assert model.forward.__func__ is type(model).forward
    assert "Liger" in repr(model.model.norm.__class__) + repr(model.model.norm.forward)
"""  # in a process of its own: it changes modules of transformers
    words = [sys.executable, "-c", code, str(tiny_model), json.dumps(common_arguments(context, plan, cuda=False)["liger_kernel_config"])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


class Cuda:
    """torch.cuda of one GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gib = 1 << 30
        found = {
            "current_device": 0, "get_device_properties": SimpleNamespace(name="H100", uuid="a"), "mem_get_info": (70 * gib, 80 * gib),
            "max_memory_allocated": 7 * gib, "max_memory_reserved": 9 * gib, "memory_reserved": 8 * gib,
        }  # fmt: skip
        for name, value in found.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


def test_memory_at_the_peak_is_told_beside_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch)
    devices.check_distinct()
    used = devices.gather_memory()
    assert [(rank["reserved"] >> 30, rank["context"] >> 30, rank["uuid"]) for rank in used] == [(9, 2, "a")]
    plan = Plan(world_size=1, per_device_batch_size=1, gradient_accumulation=1, strategy="ddp", estimated_memory_per_gpu="12Gi")
    assert devices.describe_peak(used, plan) == "peak memory 11Gi of an estimated 12Gi"


@pytest.mark.parametrize(("uuids", "hosts", "refused"), [("aa", "xx", True), ("ab", "xx", False), ("aa", "xy", False)])
def test_two_ranks_on_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch, uuids: str, hosts: str, refused: bool) -> None:
    Cuda(monkeypatch)
    monkeypatch.setattr(devices.socket, "gethostname", lambda: "x")
    gang = [{"rank": n, "host": host, "uuid": uuid, "name": "H100"} for n, (host, uuid) in enumerate(zip(hosts, uuids, strict=True))]
    monkeypatch.setattr("finetune_trainer.process.ranks.all_gather", lambda _: gang)
    if not refused:
        devices.check_distinct()
        return
    with pytest.raises(InfrastructureError) as found:
        devices.check_distinct()
    assert found.value.reason == "SharedDevice" and "ranks 0, 1" in str(found.value)


@pytest.mark.parametrize("packing", [True, False])
def test_training_with_varlen_is_training(monkeypatch: pytest.MonkeyPatch, bench: Bench, packing: bool) -> None:
    """The same losses as with a dense mask, through TRL's collator: packed, and without padding where rows are not packed."""
    hyper = {"packing": packing, "maxSteps": 4, "globalBatchSize": 4, "maxLength": 64, "learningRate": 1e-3}
    lora = {"rank": 4, "alpha": 8, "dropout": 0}

    def losses(name: str, attention: str = "auto") -> list[float]:
        asked = {**hyper, "attention": attention}
        context = bench.context(ROWS["messages"], name=name, tuning={"lora": lora, "hyperparameters": asked})
        words = bench.train(context)
        assert f"{name} attention" in words.message and "Liger" not in words.message
        saved = "".join(p.read_text() for p in Path(context.layout.output).rglob("*config.json"))
        assert saved and VARLEN not in saved
        assert json.loads(Path(context.layout.devices).read_text())["ranks"] == []
        return [line["loss"] for line in history(context) if line.get("loss") is not None]

    dense = losses("sdpa", "sdpa")
    calls: list[PackedRows] = []
    monkeypatch.setattr(kernels, "_varlen", lambda q, k, v, rows, scale: calls.append(rows) or plain(q, k, v, rows, scale))
    monkeypatch.setattr(
        load, "pick_attention", lambda *_, padding_free, **__: kernels.register_varlen() or VARLEN if padding_free else "sdpa"
    )
    assert losses(VARLEN) == pytest.approx(dense, rel=1e-3)
    assert calls
