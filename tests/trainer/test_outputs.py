"""What is published: merged model, Modelfile, configuration, card. The other forms: test_forms.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.export import merging
from finetune_trainer.export.modelfile import modelfile
from finetune_trainer.process.errors import UserError
from finetune_trainer.stages.prepare import prepare
from finetune_trainer.stages.publish import publish
from tests.trainer.bases import copied, make
from tests.trainer.conftest import ROWS, Bench

HYPER = {"maxSteps": 6, "learningRate": 1e-2, "globalBatchSize": 8, "maxLength": 64}


def lora(**more: Any) -> dict[str, Any]:
    return {"lora": {"rank": 8, "alpha": 16, "dropout": 0}, "hyperparameters": HYPER, **more}


@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "ia3"])
def test_the_merged_model_answers_like_base_and_adapter(bench: Bench, method: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tuning = lora(method=method) if method != "ia3" else {"method": method, "hyperparameters": HYPER}
    context = bench.context(ROWS["messages"], tuning=tuning, output={"merged": True}, publish=[{"uri": "pvc://published/m"}])
    bench.train(context)
    result = publish(context)
    folder = bench.folder / "published" / "m"
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32)
    apart = PeftModel.from_pretrained(base, folder).eval()
    ids = torch.tensor([[3, 20, 30, 40, 1, 4]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, apart(input_ids=ids).logits, atol=0.15), "equal up to bf16"
    stored = json.loads((folder / "merged" / "config.json").read_text())
    assert "quantization_config" not in stored, "never merged into 4 bit"
    sums = (folder / "SHA256SUMS").read_text()
    assert "merged/model.safetensors" in sums and result.result["artifacts"][0]["bytes"] > 100_000


def test_merging_into_tied_weights_is_what_was_trained(bench: Bench) -> None:
    """An adapter on the embedding is none on the head that shares its weights: merged, the two are two."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    make("Llama", bench.data / "tied", bench.model, tie_word_embeddings=True)
    tuning = lora(lora={"rank": 4, "alpha": 8, "dropout": 0, "targetModules": ["q_proj", "embed_tokens"]})
    output = {"merged": True}
    context = bench.context(
        ROWS["messages"], model={"uri": "pvc://rows/tied"}, tuning=tuning, output=output, publish=[{"uri": "pvc://published/m"}]
    )
    bench.train(context)
    publish(context)
    folder = bench.folder / "published" / "m"
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    apart = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bench.data / "tied", dtype=torch.float32), folder).eval()
    assert not merged.config.tie_word_embeddings
    ids = torch.tensor([[3, 20, 30, 40, 1, 4]])
    with torch.no_grad():
        wanted = apart(input_ids=ids).logits
        assert torch.allclose(merged(ids).logits, wanted, atol=0.02 * float(wanted.abs().max())), "equal up to bf16"


def test_an_adapter_on_a_tied_head_is_none_on_the_embedding(bench: Bench) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    make("Llama", bench.data / "tied", bench.model, tie_word_embeddings=True)
    base = AutoModelForCausalLM.from_pretrained(bench.data / "tied", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)).eval()
    ids = [[3, 20, 30, 40, 1, 4]]
    wanted = merging._logits(model, ids)
    merging._untie(model)
    merged = model.merge_and_unload()
    merging._compare(wanted, merging._logits(merged, ids))
    assert not merged.config.tie_word_embeddings and merged.lm_head.weight is not merged.model.embed_tokens.weight


def test_a_merge_that_changes_the_model_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.layer import Linear

    context = bench.context(ROWS["messages"], tuning=lora(), output={"merged": True}, publish=[{"uri": "pvc://published/m"}])
    bench.train(context)
    real = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 2 * real(self, adapter))
    with pytest.raises(UserError, match=r"output.merged: the merged model is not what was trained: its logits are up to") as found:
        publish(context)
    assert found.value.reason == "MergeDiffers" and "remove output.merged" in found.value.message


@pytest.mark.parametrize("objective", ["sft", "reward"])
def test_the_published_configuration_is_the_bases(bench: Bench, objective: str) -> None:
    rows = ROWS["preference" if objective == "reward" else "messages"]
    tuning = {"method": "full", "objective": objective, "hyperparameters": {**HYPER, "maxSteps": 1, "learningRate": 1e-4}}
    context = bench.context(rows, tuning=tuning)
    bench.train(context)
    base, published = (json.loads(Path(f, "config.json").read_text()) for f in (bench.model, context.layout.output))
    assert published["use_cache"] is True
    differs = {key for key in base.keys() | published.keys() if base.get(key) != published.get(key)} - {"transformers_version"}
    assert differs == ({"architectures", "id2label", "label2id"} if objective == "reward" else set())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_settings_of_the_bases_generation_are_kept_and_not_used(bench: Bench, method: str) -> None:
    """transformers saves none that contradict themselves, and with some of them no answer is the greedy one, or there are two."""
    from finetune_trainer.stages.evaluate import evaluate

    bench.model = copied(bench.model, bench.folder / "tiny")
    told = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "num_beams": 2, "num_return_sequences": 2, "repetition_penalty": 9.0}
    (bench.model / "generation_config.json").write_text(json.dumps(told))
    tuning = lora(hyperparameters={**HYPER, "maxSteps": 1}) if method == "lora" else {"method": method, "hyperparameters": HYPER}
    asked = {"metrics": ["exact-match"], "maxExamples": 4, "maxNewTokens": 4}
    more = {"output": {"merged": True}} if method == "lora" else {}
    context = bench.context(ROWS["messages"], tuning=tuning, evaluation=asked, publish=[{"uri": "pvc://published/m"}], **more)
    bench.train(context)
    evaluate(context)
    publish(context)
    for folder in (bench.folder / "published" / "m", *([bench.folder / "published" / "m" / "merged"] if more else [])):
        assert json.loads((folder / "generation_config.json").read_text()) == {**told, "eos_token_id": 1, "pad_token_id": 0}


CHATML = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML
NO_USER = "{% if messages | length < 3 %}{{ raise_exception('one turn is not enough') }}{% endif %}" + CHATML


def test_a_template_that_refuses_a_system_turn_gets_a_modelfile_without_one(bench: Bench) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    tokenizer.chat_template = NO_SYSTEM
    text = modelfile(tokenizer, "model-F16.gguf", [])
    assert 'TEMPLATE """<|user|>{{ .Prompt }}<|end|><|assistant|>{{ .Response }}"""' in text and ".System" not in text


def test_what_cannot_be_published_is_refused_before_a_gpu_is_taken(bench: Bench) -> None:
    rows = [{"messages": [{"role": "system", "content": "s"}, *row["messages"]]} for row in ROWS["messages"]]
    tuning = lora(chatTemplate=NO_USER)
    context = bench.context(rows, tuning=tuning, output={"gguf": ["f16"]}, publish=[{"uri": "pvc://published/m"}])
    with pytest.raises(UserError, match=r"output.gguf: the chat template cannot render one turn of a user \(one turn is not enough\)"):
        prepare(context)
    tuning = lora(lora={"rank": 4, "alpha": 8, "dropout": 0, "targetModules": ["q_proj", "embed_tokens"]})
    context = bench.context(ROWS["messages"], tuning=tuning, output={"ggufAdapter": True}, publish=[{"uri": "pvc://published/m"}])
    with pytest.raises(UserError, match=r"output.ggufAdapter: .*embed_tokens.* has no place in a GGUF adapter"):
        prepare(context)


def test_a_whole_model_is_stored_as_its_base_is(bench: Bench) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    half = bench.data / "half"
    AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(bench.model).save_pretrained(half)
    tuning = {"method": "partial", "hyperparameters": HYPER}
    context = bench.context(ROWS["messages"], model={"uri": "pvc://rows/half"}, tuning=tuning)
    bench.train(context)
    output = Path(context.layout.output)
    saved, base = load_file(output / "model.safetensors"), load_file(half / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    assert torch.equal(saved["model.embed_tokens.weight"], base["model.embed_tokens.weight"]), "frozen"
    assert not torch.equal(saved["model.layers.1.mlp.up_proj.weight"], base["model.layers.1.mlp.up_proj.weight"])
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_card_says_what_a_reader_needs(bench: Bench) -> None:
    from finetune_trainer.stages.evaluate import evaluate

    context = bench.context(ROWS["messages"], tuning=lora(), evaluation={"metrics": ["loss"]}, publish=[{"uri": "pvc://published/c"}])
    bench.train(context)
    evaluate(context)
    publish(context)
    card = (bench.folder / "published" / "c" / "README.md").read_text()
    for part in (
        "library_name: peft",
        "| Metric | Base | Base, 8 examples | Tuned |",
        "| loss |",
        "| Tokens of a prompt |",
        "| Seconds of a request |",
        "Improvement",
        "vllm serve",
        "--max-lora-rank 8",
        "transformers 5",
        "sha256:",
        "| Seed | 42 |",
        "Steps | 6",
    ):
        assert part in card, part
    lineage = json.loads((bench.folder / "published" / "c" / "finetune.json").read_text())
    assert lineage["libraries"]["trl"] and lineage["dataset"]["digest"] and lineage["parents"] == []


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused_in_prepare(bench: Bench) -> None:
    with pytest.raises(UserError, match=r"output.gguf: llama.cpp's converter refuses this model or its tokenizer"):
        prepare(bench.context(ROWS["messages"], tuning=lora(), output={"gguf": ["f16"]}))
