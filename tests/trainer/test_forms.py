"""Exported forms, made and asked: GGUF by llama.cpp, ONNX by onnxruntime. The base is a small Llama with SmolLM2's tokenizer."""

from __future__ import annotations

import json

import pytest

from finetune_trainer.stages.publish import publish
from tests.cluster.quickstart import model
from tests.trainer.bases import make
from tests.trainer.conftest import ROWS, Bench

SIZES = {
    "vocab_size": 49152, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 8192, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
HYPER = {"maxSteps": 6, "learningRate": 1e-2, "globalBatchSize": 8, "maxLength": 64}
LORA = {"lora": {"rank": 8, "alpha": 16, "dropout": 0}, "hyperparameters": HYPER}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("forms")
    base = make("Llama", folder / "small", model("smollm2.py", "SmolLM2-135M-Instruct"), **SIZES)
    return Bench(folder, base)


def test_x(trained: Bench) -> None:
    output = {"merged": True, "gguf": ["Q4_K_M", "Q8_0", "f16"], "ggufAdapter": True, "onnx": ["int8", "q4"]}
    context = trained.context(ROWS["messages"], tuning=LORA, output=output, publish=[{"uri": "pvc://published/m"}])
    trained.train(context)
    result = publish(context)
    print(json.dumps(result.result, indent=1))
    print((trained.folder / "published/m/gguf/Modelfile").read_text())
