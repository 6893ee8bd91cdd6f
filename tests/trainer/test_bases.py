"""Bases that cannot be trained are refused in prepare, by field and with what to do; common ones of other families train."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_trainer.models import weights
from finetune_trainer.models.architecture import size
from finetune_trainer.models.weights import fingerprint
from finetune_trainer.stages.evaluate import evaluate
from finetune_trainer.stages.prepare import prepare
from finetune_trainer.stages.publish import publish
from tests.trainer.bases import HYPER, MIXTURE, Sizes, copied, make, refused, tuning
from tests.trainer.conftest import ROWS, Bench, chat, history


def _pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 4965799096\n"
    (folder / "model.safetensors").write_text(text)


def _pointer_for_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9085657\n")


def _cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _shards(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({n: weights[n] for n in names if places[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    change(folder, places)


def _no_second_shard(folder: Path) -> None:
    _shards(folder, lambda f, _: (f / "model-00002-of-00002.safetensors").unlink())


def _index_of_more(folder: Path) -> None:
    def more(f: Path, places: dict[str, str]) -> None:
        (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**places, "lm_head.bias": next(iter(places.values()))}}))

    _shards(folder, more)


def _other_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")


def _part_of_the_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1" not in k}, folder / "model.safetensors", metadata={"format": "pt"})


def _other_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:100].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _no_numbers(folder: Path) -> None:
    weights = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _no_settings(folder: Path) -> None:
    (folder / "generation_config.json").write_text('["greedy"]')


def _no_token(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, "<|end|>"]}')


def _odd_activation(folder: Path) -> None:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "hidden_act": "swooth"}))


def _odd_rope(folder: Path) -> None:
    told = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps({**told, "rope_parameters": rope}))


def _no_tokenizer(folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        (_pointer, "LFSPointer", "model.safetensors is a Git LFS pointer, not the file itself; run `git lfs pull`"),
        (_pointer_for_tokenizer, "LFSPointer", "tokenizer.json is a Git LFS pointer"),
        (_cut_off, "WeightsNotReadable", "no whole .safetensors file"),
        (_no_second_shard, "WeightsMissing", "names 2 files, of which 1 are not there: model-00002-of-00002.safetensors"),
        (_index_of_more, "WeightsMissing", "1 tensors that no file holds, for example lm_head.bias"),
        (_other_name, "WeightsMissing", "holds no model.safetensors, only model.fp16.safetensors"),
        (_part_of_the_weights, "WeightsMissing", "9 weights of LlamaForCausalLM are in no file, for example model.layers.1."),
        (_other_shape, "WeightsMismatch", "model.embed_tokens.weight: [100, 64] in the file, [327, 64] by config.json"),
        (_no_numbers, "WeightsNotFinite", "tensor model.layers.1.mlp.up_proj.weight holds values that are no numbers"),
        (_no_settings, "ModelNotReadable", "generation_config.json is no JSON object"),
        (_no_token, "ModelNotReadable", "generation_config.json: eos_token_id is [1, '<|end|>']; write the number of a token"),
        (_odd_activation, "ModelNotReadable", "config.json is not understood: transformers knows no 'swooth'"),
        (_odd_rope, "ModelNotReadable", "config.json is not understood: Missing required keys in `rope_parameters`"),
        (_no_tokenizer, "TokenizerNotReadable", "put the tokenizer.json and tokenizer_config.json of the base beside its weights"),
    ],
)
def test_a_model_that_is_not_whole(bench: Bench, change: Any, reason: str, words: str) -> None:
    folder = copied(bench.model, bench.data / "base")
    change(folder)
    found = refused(bench, folder)
    assert found.reason == reason and words in found.message
    assert reason == "TokenizerNotReadable" or found.message.startswith("model.uri pvc://rows/base")


def test_weights_that_the_model_has_no_place_for_are_told(bench: Bench) -> None:
    """A config.json with fewer layers than there are: transformers would leave the others out in silence."""
    copied(bench.model, bench.data / "base", num_hidden_layers=1)
    plan = prepare(bench.context(ROWS["messages"], model={"uri": "pvc://rows/base"}, tuning=tuning())).result["plan"]
    assert "9 tensors of the base's files belong to no part of the model by its config.json, for example model.layers.1." in plan["reason"]


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_a_quantized_base(bench: Bench, method: str) -> None:
    folder = copied(bench.model, bench.data / "base", quantization_config={"quant_method": method, "bits": 4, "group_size": 128})
    found = refused(bench, folder)
    assert found.reason == "QuantizedBase"
    assert f"model.uri pvc://rows/base: its weights are stored quantized ({method})" in found.message and "in 16 bit" in found.message


@pytest.mark.parametrize(
    ("family", "kind", "settings", "words"),
    [
        ("Bert", "ForMaskedLM", {}, "BertForMaskedLM, an encoder"),
        ("Roberta", "ForMaskedLM", {}, "RobertaForMaskedLM, an encoder"),
        ("T5", "ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4}, "an encoder-decoder"),
        ("Bart", "ForConditionalGeneration", {"d_model": 32, "decoder_layers": 1, "encoder_layers": 1}, "an encoder-decoder"),
        ("Llama", "ForSequenceClassification", {"tie_word_embeddings": True}, "whose output are classes and not words"),
        ("ViT", "ForImageClassification", {}, "ViTForImageClassification, which transformers has no causal language model for"),
    ],
)
def test_what_writes_no_text(bench: Bench, family: str, kind: str, settings: Sizes, words: str) -> None:
    found = refused(bench, make(family, bench.data / "base", bench.model, kind=kind, **settings))
    assert found.reason == "WrongArchitecture" and words in found.message and "name a decoder" in found.message
    assert found.message.startswith("model.uri pvc://rows/base is ")


def test_a_reward_model_needs_a_class_for_it(bench: Bench) -> None:
    folder = make("Mamba", bench.data / "base", bench.model, state_size=8)
    found = refused(bench, folder, ROWS["preference"], tuning=tuning(objective="reward"))
    assert found.reason == "WrongArchitecture" and "tuning.objective reward" in found.message


def test_an_adapter_is_no_base(bench: Bench) -> None:
    folder = bench.data / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    assert "it is an adapter: name its base in model.uri and the adapter in tuning.continueFrom" in refused(bench, folder).message
    for file in bench.model.iterdir():
        shutil.copyfile(file, folder / file.name)
    assert "holds a model and an adapter" in refused(bench, folder).message, "transformers would load the base that the adapter names"


def test_tokens_beyond_the_vocabulary(bench: Bench) -> None:
    """Refused when rows hold them; a tokenizer that is larger and whose tokens do not occur does no harm."""
    from transformers import AutoTokenizer

    folder = copied(bench.model, bench.data / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[PRODUCT]"])
    tokenizer.save_pretrained(folder)
    rows = [*ROWS["messages"][:3], chat("buy [PRODUCT] red", "yes [PRODUCT]")]
    found = refused(bench, folder, rows, dataset={"train": {"uri": "pvc://rows/train.jsonl"}, "checks": {"minExamples": 1}})
    assert found.reason == "TokensBeyondVocabulary"
    assert "1 row(s), the first train" in found.message and "'[PRODUCT]' (ID 327; the model has 327)" in found.message
    prepare(bench.context(ROWS["messages"], model={"uri": "pvc://rows/base"}, tuning=tuning()))


def test_padding_that_the_model_does_not_know_is_not_used(bench: Bench) -> None:
    from transformers import AutoTokenizer

    from finetune_trainer.models.load import load_tokenizer

    folder = copied(bench.model, bench.data / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 327
    tokenizer.save_pretrained(folder)
    context = bench.context(ROWS["messages"], model={"uri": "pvc://rows/base"}, tuning=tuning())
    assert load_tokenizer(context, str(folder)).pad_token == "<|end|>"
    bench.train(context)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**told, "eos_token": None, "pad_token": None}))
    assert "name its eos_token in tokenizer_config.json" in refused(bench, folder).message


LONG = [chat(" ".join(["red"] * (50 + n)), " ".join(["yes"] * 20)) for n in range(8)]


@pytest.mark.parametrize(
    ("family", "settings", "more", "words"),
    [
        ("GPT2", {}, {}, "the model has 64 positions"),
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}, {}, "the model has 64 positions"),
        (
            "GPT2",
            {"n_positions": 64},
            {"method": "prompt", "lora": None, "virtualTokens": {"count": 20}},
            "with 20 virtual tokens in front",
        ),
        ("GPTJ", {"rotary_dim": 8}, {}, "the model has 64 positions"),
        ("OpenAIGPT", {}, {}, "the model has 64 positions"),
    ],
)
def test_rows_longer_than_the_positions(bench: Bench, family: str, settings: Sizes, more: Sizes, words: str) -> None:
    folder = make(family, bench.data / "base", bench.model, **{"max_position_embeddings": 64, **settings})
    asked = {key: value for key, value in tuning(**more).items() if value is not None}
    found = refused(bench, folder, LONG, tuning=asked)
    assert found.reason == "LongerThanPositions" and words in found.message and "Set hyperparameters.maxLength to" in found.message
    room = 64 - (20 if "virtualTokens" in asked else 0)
    assert f"maxLength to {room}" in found.message
    prepare(bench.context(ROWS["messages"], name="short", model={"uri": "pvc://rows/base"}, tuning=asked))


def test_rows_beyond_what_rotary_positions_were_made_for_are_told(bench: Bench) -> None:
    folder = copied(bench.model, bench.data / "base", max_position_embeddings=32)
    context = bench.context(LONG, model={"uri": "pvc://rows/base"}, tuning=tuning())
    result = prepare(context).result
    assert result["dataset"]["warnings"]["beyondContext"] == len(LONG)
    (told,) = json.loads(Path(context.layout.data_report).read_text())["problems"]["beyondContext"]["first"]
    assert "train row 8 (train.jsonl:8)" in told and "the model was made for 32" in told and "set hyperparameters.maxLength to 32" in told
    scaled = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "rope_parameters": scaled}))
    result = prepare(bench.context(LONG, name="scaled", model={"uri": "pvc://rows/base"}, tuning=tuning())).result
    assert "beyondContext" not in result["dataset"].get("warnings", {})


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("GPT2", {}),
        ("GptOss", {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32, **MIXTURE}),
        ("Mamba", {"state_size": 8}),
        ("Mixtral", {"output_router_logits": True, **MIXTURE}),
        ("Qwen3Moe", {"head_dim": 8, **MIXTURE}),
        ("MiniMax", {"head_dim": 8, **MIXTURE}),
    ],
)
def test_common_families_train_with_what_is_set_by_default(bench: Bench, family: str, settings: Sizes) -> None:
    make(family, bench.data / "base", bench.model, **settings)
    asked = {
        "metrics": ["loss", "f1"],
        "maxExamples": 4,
        "maxNewTokens": 2,
        "baseline": {"systemPrompt": LONG[0]["messages"][0]["content"]},
    }
    context = bench.context(
        ROWS["messages"], model={"uri": "pvc://rows/base"}, tuning={"hyperparameters": {**HYPER, "learningRate": 1e-2}}, evaluation=asked
    )
    bench.train(context)
    assert len(evaluate(context).result["arms"]) >= 3, "with what all prompts begin with"
    saved = load_file(Path(context.layout.output) / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name)
    losses = [line["loss"] for line in history(context) if line.get("loss") is not None]
    assert len(losses) == 2 and all(loss < 20 for loss in losses)
    plan = json.loads(Path(context.layout.plan).read_text())
    assert ("lora.dropout is 0 instead of 0.05" in plan["reason"]) is (family in ("Mixtral", "Qwen3Moe", "MiniMax"))


def _as_fp8(folder: Path) -> None:
    """Linear layers in FP8 with a scale for each block, as DeepSeek and Qwen publish them."""
    weights = load_file(folder / "model.safetensors")
    linear = [name for name, tensor in weights.items() if "_proj" in name and tensor.ndim == 2]
    for name in linear:
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        weights[name.replace(".weight", ".weight_scale_inv")] = torch.ones(1, 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _as_mxfp4(folder: Path) -> None:
    """Experts in MXFP4, as OpenAI publishes gpt-oss: blocks of 32 numbers in 4 bit, and their exponents."""
    weights = load_file(folder / "model.safetensors")
    for name in [n for n in weights if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, width, height = weights.pop(name).shape
        weights[f"{name}_blocks"] = torch.randint(0, 255, (experts, height, width // 32, 16), dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.full((experts, height, width // 32), 120, dtype=torch.uint8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "settings", "change", "stored"),
    [
        ("Llama", {}, _as_fp8, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}),
        ("GptOss", {"head_dim": 8, **MIXTURE}, _as_mxfp4, {"quant_method": "mxfp4"}),
    ],
)
def test_what_is_published_in_fewer_bits_trains_in_sixteen(bench: Bench, family: str, settings: Sizes, change: Any, stored: Sizes) -> None:
    folder = make(family, bench.data / "base", bench.model, **settings)
    names = set(load_file(folder / "model.safetensors"))
    change(folder)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "quantization_config": stored}))
    result = {"output": {"merged": True}, "publish": [{"uri": "pvc://published/m"}]}
    context = bench.context(
        ROWS["messages"], model={"uri": "pvc://rows/base"}, tuning=tuning(hyperparameters={**HYPER, "learningRate": 1e-2}), **result
    )
    assert bench.train(context).result["steps"] == 2
    publish(context)
    merged = bench.folder / "published" / "m" / "merged"
    assert set(load_file(merged / "model.safetensors")) == names, "under the names of weights in 16 bit"
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert "tuning.method to lora" in refused(bench, folder, name="qlora", tuning=tuning(method="qlora")).message


def test_sizes_that_differ_between_layers_are_told(bench: Bench) -> None:
    """Gemma 4 has heads of two sizes, Gemma 3n a width for each layer; transformers names no one value then, or a list."""
    from types import SimpleNamespace

    from transformers import Gemma4TextConfig

    assert size(Gemma4TextConfig(), "head_dim") == 512
    assert size(SimpleNamespace(intermediate_size=[64, 128]), "moe_intermediate_size", "intermediate_size") == 128
    assert size(SimpleNamespace(), "hidden_size") is None


@pytest.mark.parametrize("looked_at", [1, 21 * 9_999, 1 << 30])
def test_some_of_each_tensor_is_looked_at(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, looked_at: int) -> None:
    monkeypatch.setattr(weights, "_LOOKED_AT", looked_at)
    weights.check_numbers(tiny_model, "model.uri")


def test_a_fingerprint_tells_weights_apart(tiny_model: Path, tmp_path: Path) -> None:
    """Of equal names and sizes; and the same model is the same wherever it lies, as files or as the hub's cache links them."""
    one, other = (copied(tiny_model, tmp_path / name) for name in ("one", "other"))
    assert fingerprint(one) == fingerprint(other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(one) != fingerprint(other)
    import hashlib

    blob = tmp_path / hashlib.sha256((one / "model.safetensors").read_bytes()).hexdigest()
    before = fingerprint(one)
    (one / "model.safetensors").rename(blob)
    (one / "model.safetensors").symlink_to(blob)
    assert fingerprint(one) == before
    assert torch.equal(load_file(one / "model.safetensors")["model.norm.weight"] + 1, weights["model.norm.weight"])
