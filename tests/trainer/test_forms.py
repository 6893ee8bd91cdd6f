"""Exported forms, made and asked: GGUF by llama.cpp, ONNX by onnxruntime and by Transformers.js under Node."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from finetune_api.contract import Published
from finetune_api.probing import Probe, ProbeAnswer
from finetune_trainer.export import asking, gguf_model, onnx_builder, proof
from finetune_trainer.export.gguf_model import Facts, Tensor
from finetune_trainer.process.errors import UserError
from finetune_trainer.stages.publish import publish
from tests.cluster import javascript
from tests.cluster.quickstart import model
from tests.trainer.bases import copied, make, refused
from tests.trainer.conftest import ROWS, Bench
from tests.trainer.test_card import paste

SIZES = {
    "vocab_size": 49152, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 8192, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
HYPER = {"maxSteps": 6, "learningRate": 1e-2, "globalBatchSize": 8, "maxLength": 64}
TUNING = {"method": "rslora", "lora": {"rank": 8, "alpha": 4, "dropout": 0}, "hyperparameters": HYPER}
SYSTEM = 'You name colours. Say "none" where there is none.'
ALL = {"merged": True, "gguf": ["Q4_K_M", "q8_0", "f16"], "ggufAdapter": True, "onnx": ["q4", "int8"]}


@dataclass
class Exported:
    """What was published, and what it was asked."""

    folder: Path
    job: Path
    result: Published
    exam: proof.Exam


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """All forms of a small Llama with SmolLM2's tokenizer, which llama.cpp's converter knows."""
    folder = tmp_path_factory.mktemp("forms")
    base = make("Llama", folder / "small", model("smollm2.py", "SmolLM2-135M-Instruct"), **SIZES)
    (base / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}))
    bench, exams = Bench(folder, base), []
    rows = [{"messages": [{"role": "system", "content": SYSTEM}, *row["messages"]]} for row in ROWS["messages"]]
    context = bench.context(rows, tuning=TUNING, output=ALL, publish=[{"uri": "pvc://published/m"}])
    bench.train(context)
    with pytest.MonkeyPatch.context() as patch:
        real = proof.make_exam
        patch.setattr(proof, "make_exam", lambda *told: exams.append(real(*told)) or exams[0])
        result = Published.model_validate(publish(context).result)
    yield Exported(folder / "published" / "m", Path(context.layout.job), result, exams[0])


def test_every_form_is_asked_and_told_of(exported: Exported) -> None:
    told = {form.name: form for form in exported.result.forms}
    assert {form.state for form in told.values()} == {"Verified"} and {form.probes for form in told.values()} == {8}
    bounds = {
        "merged": 0.05, "gguf/adapter.gguf": 0.01, "gguf/model-F16.gguf": 0.01, "gguf/model-Q8_0.gguf": 0.02, "gguf/model-Q4_K_M.gguf": 0.3,
        "onnx/onnx/model_int8.onnx": 0.02, "onnx/onnx/model_q4.onnx": 0.3,
    }  # fmt: skip
    assert set(told) == set(bounds)
    for name, most in bounds.items():
        form, place = told[name], exported.folder / name
        assert form.difference < most < form.distance, f"{name}: the tuned model, by its own runtime"
        assert form.bytes == sum(file.stat().st_size for file in (place.iterdir() if place.is_dir() else [place]))
    assert told["gguf/model-F16.gguf"].equal_answers == 8
    card = (exported.folder / "README.md").read_text()
    assert re.search(r"\| `gguf/model-Q4_K_M.gguf` \| [0-9.]+ \| [0-8] of 8 \|", card)
    assert [form["name"] for form in json.loads((exported.folder / "finetune.json").read_text())["forms"]] == list(told)
    assert not (exported.job / "forms").exists(), "no room is taken any more"


def test_the_modelfile_says_what_llama_cpp_renders(exported: Exported) -> None:
    import xllamacpp

    text = (exported.folder / "gguf" / "Modelfile").read_text()
    found = re.fullmatch(r'FROM ./(\S+)\nTEMPLATE """(.*?)"""\nSYSTEM """(.*?)"""\n((?:PARAMETER [^\n]+\n)+)', text, re.DOTALL)
    assert found is not None, text
    file, template, system, parameters = found.groups()
    assert file == "model-Q4_K_M.gguf" and system == SYSTEM, "the first that was asked for"
    assert parameters.splitlines() == [
        f"PARAMETER {told}" for told in ("temperature 0.6", "top_p 0.9", "num_ctx 4096", 'stop "<|im_end|>"')
    ]
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup, settings.hostnames, settings.port = (
        str(exported.folder / "gguf" / file), 256, False, ["127.0.0.1"], 0,
    )  # fmt: skip
    server = xllamacpp.Server(settings)
    asked = {"messages": [{"role": "system", "content": system}, {"role": "user", "content": "What is red?"}]}
    request = urllib.request.Request(f"{server.listening_address}/apply-template", json.dumps(asked).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        wanted = json.load(answer)["prompt"]
    rendered = re.sub(r"\{\{ if \.System \}\}(.*?)\{\{ end \}\}", r"\1", template, flags=re.DOTALL)
    for name, value in (("System", system), ("Prompt", "What is red?"), ("Response", "")):
        rendered = rendered.replace(f"{{{{ .{name} }}}}", value)
    assert rendered == wanted


@pytest.mark.parametrize(("dtype", "asked"), [("q4", "default"), ("int8", "int8")])
def test_transformers_js_answers_as_onnxruntime_does(exported: Exported, dtype: str, asked: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = exported.folder / "onnx"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    talks = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}] for text in ("What is red?", "Hello")]
    wanted = [greedy(asking.onnx_logits(str(folder / "onnx" / f"model_{dtype}.onnx")), tokenizer, talk, 8) for talk in talks]
    assert javascript.answers(folder, asked, talks, 8, tmp_path) == wanted


def greedy(ask: asking.Ask, tokenizer: Any, messages: list[dict[str, str]], most: int) -> str:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer: list[int] = []
    while len(answer) < most and (not answer or answer[-1] != tokenizer.eos_token_id):
        answer.append(int(ask(ids + answer, len(ids) + len(answer) - 1)[-1].argmax()))
    return str(tokenizer.decode(answer, skip_special_tokens=True))


def test_weights_that_fit_into_no_file_lie_beside_it(exported: Exported, tmp_path: Path) -> None:
    import onnx

    built, folder = tmp_path / "built", copied(exported.folder / "onnx", tmp_path / "large")
    built.mkdir()
    onnx.save(
        onnx.load(folder / "onnx" / "model_q4.onnx"), built / "model.onnx", save_as_external_data=True, location="model.onnx.data",
        size_threshold=1024,
    )  # fmt: skip
    (built / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"head_size": 64}}}))
    shutil.rmtree(folder / "onnx")
    onnx_builder.lay_out(built, folder / "onnx", "model_q4.onnx", 10_000)
    assert (folder / "onnx" / "model_q4.onnx_data").stat().st_size > 5_000_000
    config = json.loads((folder / "config.json").read_text())
    config["transformers.js_config"]["use_external_data_format"] = {"model_q4.onnx": True}
    (folder / "config.json").write_text(json.dumps(config))
    talk = [{"role": "user", "content": "What is red?"}]
    beside, whole = (javascript.answers(place, "q4", [talk], 4, tmp_path) for place in (folder, exported.folder / "onnx"))
    assert beside == whole


def exchanged(weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The rows in another order."""
    return weights[::-1].copy()


def not_a_number(weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.full_like(weights, np.nan)


@pytest.mark.parametrize(("disturb", "said"), [(exchanged, r"on [0-6] of 8 probes"), (not_a_number, r"are nan nats a token away")])
def test_disturbed_weights_are_refused(exported: Exported, disturb: Callable[..., Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "model-F16.gguf"
    shutil.copyfile(exported.folder / "gguf" / "model-F16.gguf", file)
    tensor = next(t for t in gguf.GGUFReader(file, "r+").tensors if t.name == "token_embd.weight")
    tensor.data[:] = disturb(tensor.data)
    with pytest.raises(UserError, match=said) as found:
        proof.prove("gguf", file.name, [file], exported.exam, proof.ask_form("gguf", file, exported.exam.questions))
    assert found.value.reason == "FormDiffers" and "greedy answers are the same" in found.value.message


def test_what_cannot_be_told_apart_is_published_and_said() -> None:
    answer = ProbeAnswer(text="a", token_ids=[1, 2], tuned=[-1.0, -2.0], base=[-1.001, -2.0])
    probes = [Probe(prompt="p", prompt_ids=[1], answers=[answer])] * 8
    question, other = ((1,), (1, 2)), ((1,), (3,))
    said = {question: proof.Answered([-1.0, -2.0], False), other: proof.Answered([-0.5], True)}
    told = proof.prove("gguf", "f", [], proof.Exam(probes, [other] * 7 + [question]), said)
    assert (told.state, told.equal_answers) == ("Unverifiable", 7) and told.distance == pytest.approx(0.0005)
    assert proof.prove("merged", "f", [], proof.Exam([], []), {}).state == "Unverifiable", "a reward model answers nothing"


def llama(layers: int) -> list[Tensor]:
    """The tensors of a Llama in GGUF."""
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    block = [Tensor(f"blk.{i}.{part}.weight", (4096, 4096)) for i in range(layers) for part in parts]
    norms = [Tensor(f"blk.{i}.{part}_norm.weight", (4096,)) for i in range(layers) for part in ("attn", "ffn")]
    return [
        *block,
        *norms,
        Tensor("token_embd.weight", (32000, 4096)),
        Tensor("output.weight", (32000, 4096)),
        Tensor("output_norm.weight", (4096,)),
    ]


@pytest.mark.parametrize(
    ("layers", "grouped", "counted"),
    [(32, False, {Type.Q4_K: 193, Type.Q6_K: 33}), (80, True, {Type.Q4_K: 441, Type.Q5_K: 40, Type.Q6_K: 81})],
    ids=["7B", "70B"],
)
def test_the_mixture_is_that_of_llama_cpp(layers: int, grouped: bool, counted: dict[Type, int]) -> None:
    """The numbers are those that llama.cpp prints when it loads a Q4_K_M of Llama 2."""
    assert Counter(gguf_model.types_of(llama(layers), Facts("llama", layers, grouped=grouped), "Q4_K_M").values()) == counted


@pytest.mark.parametrize(("kind", "most"), [(Type.Q4_K, 0.09), (Type.Q5_0, 0.05), (Type.Q6_K, 0.025), (Type.Q8_0, 0.008)])
def test_quantised_rows_are_those_that_they_were(kind: Type, most: float) -> None:
    """Relative to the weights; and byte by byte where the package gguf quantises too."""
    weights = np.random.default_rng(0).standard_normal((3, 70, 512)).astype(np.float16)
    found = gguf_model.quantised(weights, kind)
    away = gguf.quants.dequantize(found, kind) - weights
    assert 0.2 * most < np.sqrt((away**2).mean()) < most
    if kind in (Type.Q5_0, Type.Q8_0):
        assert (found == gguf.quants.quantize(weights.astype(np.float32), kind)).mean() > 0.999, "but for halves"


def test_a_quantised_file_says_what_the_converted_one_did(exported: Exported) -> None:
    half, small = (gguf.GGUFReader(exported.folder / "gguf" / f"model-{kind}.gguf") for kind in ("F16", "Q4_K_M"))
    own = {"general.file_type", "general.quantization_version", "GGUF.kv_count"}
    fields = {name: field.contents() for name, field in half.fields.items() if name not in own}
    assert {name: field.contents() for name, field in small.fields.items() if name not in own} == fields
    kinds = {t.name: t.tensor_type for t in small.tensors}
    assert kinds["token_embd.weight"] == Type.Q6_K and kinds["blk.0.attn_q.weight"] == Type.Q4_K, "the embedding is the head's"
    for before, after in zip(half.tensors, small.tensors, strict=True):
        weights, wanted = gguf.quants.dequantize(after.data[:64], after.tensor_type), before.data[:64].astype(np.float32)
        assert before.name == after.name and np.abs(weights - wanted).max() < 0.1 * np.abs(wanted).max()


def test_an_architecture_that_cannot_be_onnx_is_refused_in_prepare(bench: Bench) -> None:
    folder = make("OPT", bench.data / "opt", bench.model, ffn_dim=64, word_embed_proj_dim=32)
    told = refused(bench, folder, output={"onnx": ["q4"]})
    assert told.reason == "NoONNX" and "not currently supported; remove output.onnx" in told.message


def test_the_card_runs_as_it_is_pasted(exported: Exported) -> None:
    said = paste(exported.folder, exported.job / "tools")
    assert any("ollama create" in text for text, _ in said)
