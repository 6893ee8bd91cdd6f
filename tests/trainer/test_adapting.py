"""What of a base an adapter changes: what cannot be changed is refused in prepare, by field and with what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from finetune_trainer.models.fetch import fetch_base_model
from finetune_trainer.process.errors import UserError
from finetune_trainer.stages.prepare import prepare
from finetune_trainer.stages.publish import publish
from finetune_trainer.training.shape import describe_model
from tests.trainer.bases import HYPER, LORA, MIXTURE, SIZES, Sizes, make, refused, tuning
from tests.trainer.conftest import ROWS, Bench

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
IMAGES = {"vision_config": VISION, "mm_tokens_per_image": 4, "boi_token_index": 5, "eoi_token_index": 6, "image_token_index": 7}


@pytest.mark.parametrize(
    ("family", "settings", "lora", "words"),
    [
        (
            "GPT2",
            {},
            {"targetModules": ["q_proj", "v_proj"]},
            "no module of this model (gpt2) is named q_proj, v_proj; its linear layers are ",
        ),
        ("GPT2", {}, {"targetModules": ["c_attn", "v_proj"]}, "is named v_proj"),
        (
            "GPT2",
            {},
            {"targetModules": ["c_attn", "lm_head"]},
            "with objective sft the loss is computed from the weights of lm_head directly",
        ),
        ("GPT2", {}, {"targetModules": ["ln_f"]}, "tuning.method lora does not work on models of type gpt2"),
        ("Mamba", {"state_size": 8}, {"targetModules": ["out_proj"]}, "incompatible with Mamba-based models"),
    ],
)
def test_modules_that_cannot_be_adapted(bench: Bench, family: str, settings: Sizes, lora: Sizes, words: str) -> None:
    found = refused(bench, make(family, bench.data / "base", bench.model, **settings), tuning=tuning(lora={**LORA, **lora}))
    assert words in found.message and "targetModules" in found.message


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Falcon", {}),  # one key and value for all heads
        ("FalconH1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}),
        ("Mixtral", MIXTURE),
        ("Qwen3", {"head_dim": 16}),
    ],
)
def test_learned_keys_and_values_fit_the_layers_or_are_refused(bench: Bench, family: str, settings: Sizes) -> None:
    folder = make(family, bench.data / "base", bench.model, **settings)
    asked = {"method": "prefix", "virtualTokens": {"count": 4}, "hyperparameters": HYPER}
    if family == "Qwen3":
        prepare(bench.context(ROWS["messages"], model={"uri": "pvc://rows/base"}, tuning=asked))
    else:
        assert "tuning.method prefix does not work on models of type" in refused(bench, folder, tuning=asked).message


def test_a_router_that_gives_more_than_a_tensor_is_left_out(bench: Bench) -> None:
    """Of Llama 4 and Phi-3.5-MoE; as they are linear layers by their class, PEFT adapts them, and the first step fails."""
    folder = make("Phimoe", bench.data / "base", bench.model, **MIXTURE)
    context = bench.context(ROWS["messages"], model={"uri": "pvc://rows/base"}, tuning=tuning())
    base = describe_model(context, str(fetch_base_model(context)))
    assert any("q_proj" in name for name in base.modules) and not any("router" in name for name in base.modules)
    found = refused(bench, folder, name="named", tuning=tuning(lora={**LORA, "targetModules": ["router", "q_proj"]}))
    assert "router of models of type phimoe is no plain linear layer" in found.message


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_linear_layers_of_a_class_of_their_own_are_adapted(bench: Bench, method: str) -> None:
    """Falcon's, and those of bitsandbytes."""
    make("Falcon", bench.data / "base", bench.model)
    context = bench.context(ROWS["messages"], model={"uri": "pvc://rows/base"}, tuning=tuning(method=method))
    bench.train(context)
    assert any("query_key_value" in name for name in load_file(Path(context.layout.output) / "adapter_model.safetensors"))


def test_layers_that_look_tokens_up_take_no_vectors_in_their_place(bench: Bench) -> None:
    folder = make("Gemma4Text", bench.data / "base", bench.model, kind="Gemma4ForCausalLM", head_dim=8, vocab_size_per_layer_input=327)
    found = refused(bench, folder, tuning={"method": "prompt", "hyperparameters": HYPER})
    assert "tuning.method prompt does not work on models of type gemma4_text, whose layers look tokens up" in found.message


def test_methods_that_a_family_does_not_have(bench: Bench) -> None:
    folder = make("Mixtral", bench.data / "base", bench.model, **MIXTURE)
    assert "the experts of a mixture" in refused(bench, folder, tuning=tuning(method="dora")).message
    folder = make("GptOss", bench.data / "other", bench.model, head_dim=8, **MIXTURE)
    found = refused(bench, folder, tuning={"method": "ia3", "hyperparameters": HYPER})
    assert (
        found.reason == "MethodNotSupported"
        and "ia3 does not work on models of type gpt_oss: PEFT has no setting for them. Set" in found.message
    )
    make("CTRL", bench.data / "old", bench.model, dff=64)
    asked = {"hyperparameters": {**HYPER, "gradientCheckpointing": True}, "lora": LORA}
    found = refused(bench, bench.data / "old", name="old", tuning=asked)
    assert "models of type ctrl cannot compute activations again; set it to false" in found.message
    hyper = {**HYPER, "attention": "sdpa"}
    found = refused(bench, folder, tuning={"hyperparameters": hyper, "lora": LORA})
    assert found.message == "hyperparameters.attention sdpa is not supported by models of type gpt_oss; set it to auto"


@pytest.mark.parametrize("method", ["lora", "full", "partial"])
def test_of_a_base_of_text_and_images_the_language_model_learns(bench: Bench, method: str) -> None:
    """The rest has no gradient from text: DDP would wait for it, and what serves adapters may refuse it."""
    text = {**SIZES, "head_dim": 8, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
    make("Gemma3", bench.data / "base", bench.model, kind="ForConditionalGeneration", text_config=text, **IMAGES)
    asked = {"method": method, "hyperparameters": HYPER, **({"lora": LORA} if method == "lora" else {})}
    context = bench.context(ROWS["messages"], model={"uri": "pvc://rows/base"}, tuning=asked)
    base = describe_model(context, str(fetch_base_model(context)))
    assert base.modules and all(("language_model" in name or name.startswith("lm_head")) for name in base.modules)
    if method == "lora":
        bench.train(context)
        assert load_file(Path(context.layout.output) / "adapter_model.safetensors")


def test_an_adapter_of_another_base_is_not_gone_on_from(bench: Bench) -> None:
    first = bench.context(ROWS["messages"], name="first", tuning=tuning(), publish=[{"uri": "pvc://published/first"}])
    bench.train(first)
    publish(first)
    shutil.rmtree(bench.folder / "workspace-first")
    make("Llama", bench.data / "base", bench.model, hidden_size=96)
    asked = {"continueFrom": "pvc://published/first", "hyperparameters": HYPER}
    found = refused(bench, bench.data / "base", name="other", tuning=asked)
    assert found.reason == "WrongAdapter" and "was made on another base" in found.message and "set model.uri" in found.message
    plan = prepare(bench.context(ROWS["messages"], name="same", tuning=asked)).result["plan"]
    assert plan["totalSteps"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task_type": "SEQ_CLS"}, r"was made for another task \(SEQ_CLS\) than tuning.objective sft"),
        ({"target_modules": ["q_proj", "lm_head"]}, "the loss is computed from the weights of the head directly"),
        ({"r": 4}, r"was made on another base: .* is \[8, 64\] in the adapter and would be \[4, 64\] here"),
    ],
)
def test_an_adapter_that_training_would_refuse(bench: Bench, changes: Sizes, words: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    modules = changes.get("target_modules", ["q_proj"])
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(bench.model), LoraConfig(r=8, target_modules=modules, task_type="CAUSAL_LM"))
    made.save_pretrained(bench.data / "adapter")
    told = json.loads((bench.data / "adapter" / "adapter_config.json").read_text())
    (bench.data / "adapter" / "adapter_config.json").write_text(json.dumps({**told, **changes}))
    context = bench.context(ROWS["messages"], tuning={"continueFrom": "pvc://rows/adapter", "hyperparameters": HYPER})
    with pytest.raises(UserError, match=words) as found:
        prepare(context)
    assert found.value.reason == "WrongAdapter"
