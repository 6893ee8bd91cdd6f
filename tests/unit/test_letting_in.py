"""What an adapter must be before an engine sees it: settings, tensors, numbers, tokens; and files that are what was ordered, from S3 too."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from safetensors.numpy import save_file

from finetune_api.contract import S3_KEYS, SUMS, Env
from finetune_api.endpoint import EndpointBase
from finetune_api.probing import Probe, ProbeAnswer, judge
from finetune_api.serving import OrderedModel, ReplicaFile
from finetune_trainer.export.bundle import digests
from finetune_trainer.process.errors import StageError, UserError
from finetune_trainer.remote import retry
from finetune_trainer.serving.checks import Base, check_adapter, check_base
from finetune_trainer.serving.replica import context_of, fetch, served_version
from finetune_trainer.serving.storage import Refused, fetch_version, fetch_whole, read, storage_of

Q, LAYERS = "model.layers.{}.self_attn.q_proj", 2
SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "init_lora_weights": True}


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def base_at(folder: Path, **config: Any) -> Base:
    folder.mkdir()
    names = {"model.embed_tokens.weight": (20, 8), **{f"{Q.format(n)}.weight": (6, 8) for n in range(LAYERS)}}
    names["model.layers.0.mlp.experts.gate_up_proj"] = (3, 8, 5)
    save_file({name: floats(*shape) for name, shape in names.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True, **config}))
    return Base(folder, "sha256:base")


def pair(module: str, rank: int = 4, wide: int = 8, high: int = 6, kind: str = "lora_") -> dict[str, np.ndarray]:
    end = "" if kind.endswith("embedding_") else ".weight"
    return {f"base_model.model.{module}.{kind}A{end}": floats(rank, wide), f"base_model.model.{module}.{kind}B{end}": floats(high, rank)}


GOOD = {**pair(Q.format(0)), **pair(Q.format(1))}


def adapter_at(folder: Path, tensors: dict[str, np.ndarray], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    return folder


@pytest.mark.parametrize(
    ("name", "tensors", "settings"),
    [
        ("plain", GOOD, {}),
        ("other names before the layers", pair("language_model." + Q.format(1)), {}),
        ("the head of tied embeddings", pair("lm_head", high=20), {}),
        ("embeddings, the other way around", pair("model.embed_tokens", wide=20, high=8, kind="lora_embedding_"), {}),
        ("fused experts, of no plain shape", pair("model.layers.0.mlp.experts.base_layer", high=99), {}),
        ("gaussian", GOOD, {"init_lora_weights": "gaussian"}),
    ],
)
def test_good_adapters_are_let_in(tmp_path: Path, name: str, tensors: dict[str, np.ndarray], settings: dict[str, Any]) -> None:
    check_adapter(adapter_at(tmp_path / "a", tensors, **settings), base_at(tmp_path / "base"), 8)


def _with(value: float) -> dict[str, np.ndarray]:
    damaged = {name: tensor.copy() for name, tensor in GOOD.items()}
    damaged[max(damaged)][-1, -1] = value
    return damaged


@pytest.mark.parametrize(
    ("tensors", "settings", "told"),
    [
        (pair(Q.format(7)), {}, "model.layers.7.self_attn.q_proj"),
        (pair(Q.format(0), wide=16), {}, "[6, 16]"),
        (pair(Q.format(0), high=7), {}, "[7, 8]"),
        (pair(Q.format(0), rank=16), {}, "spec.maxLoraRank"),
        (dict([*pair(Q.format(0)).items()][:1]), {}, "without its B"),
        ({**GOOD, "base_model.model.lm_head.weight": floats(20, 8)}, {}, "base_model.model.lm_head.weight"),
        ({**GOOD, f"base_model.model.{Q.format(0)}.lora_magnitude_vector": floats(6)}, {}, "lora_magnitude_vector"),
        (_with(np.nan), {}, max(GOOD)),
        (_with(-np.inf), {}, max(GOOD)),
        ({name: tensor.astype(np.int32) for name, tensor in GOOD.items()}, {}, "dtype I32"),
        (GOOD, {"peft_type": "LOHA"}, "LOHA"),
        (GOOD, {"use_dora": True}, "DoRA"),
        (GOOD, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (GOOD, {"bias": "all"}, "bias"),
        (GOOD, {"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_others_are_refused_with_file_tensor_and_fix(
    tmp_path: Path, tensors: dict[str, np.ndarray], settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(Refused, match="adapter_(model.safetensors|config.json)") as refused:
        check_adapter(adapter_at(tmp_path / "a", tensors, **settings), base_at(tmp_path / "base"), 8)
    assert told in str(refused.value)


def test_numbers_are_looked_at_to_the_last_one(tmp_path: Path) -> None:
    large = pair(Q.format(0), wide=3 << 20)
    large[min(large)][-1, -1] = np.nan
    base = base_at(tmp_path / "base", quantization_config={"quant_method": "awq"})  # packed: no shape to compare with
    with pytest.raises(Refused, match="lora_A.weight holds values that are no numbers"):
        check_adapter(adapter_at(tmp_path / "a", large), base, 8)


def test_another_base_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base")
    check_base(_ordered("sha256:" + "0" * 64), base)
    with pytest.raises(Refused, match="sha256:other"):
        check_base(_ordered("sha256:" + "0" * 64).model_copy(update={"base_fingerprint": "sha256:other"}), base)


def _ordered(digest: str, storage: str = "s3://models/team/bot", endpoint: str | None = None) -> OrderedModel:
    return OrderedModel(name="bot@3", model="bot", number=3, storage=storage, s3_endpoint=endpoint, digest=digest)


def _published(folder: Path) -> str:
    adapter_at(folder, GOOD)
    (folder / "model-merged.gguf").write_bytes(b"not for engines")
    return _summed(folder)


def _summed(folder: Path) -> str:
    (folder / SUMS).write_text(digests(folder))
    return f"sha256:{hashlib.sha256((folder / SUMS).read_bytes()).hexdigest()}"


def test_a_version_comes_out_of_a_bucket_as_it_was_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(Env.ALLOWED_HOSTS, "127.0.0.1")
    monkeypatch.setattr(retry, "_PAUSES", ())
    adapter_at(tmp_path / "a", GOOD)
    base_at(tmp_path / "a" / "merged")
    digest = _summed(tmp_path / "a")
    keys = tmp_path / "keys"
    keys.mkdir()
    for name in S3_KEYS:
        (keys / name).write_text("the-secret-key")
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")
        client.create_bucket(Bucket="models")
        file = ReplicaFile(name="e", namespace="n", uid="u", base=EndpointBase(uri="hf://o/m"), secrets={"model-bot": str(keys)})
        order = _ordered(digest, endpoint=endpoint)
        storage = storage_of(context_of(file, str(tmp_path / "models")), order)
        with pytest.raises(Refused, match=f"versions/3/{SUMS} is not there"):
            fetch_version(storage, order, tmp_path / "here")
        for path in (tmp_path / "a").rglob("*.*"):
            client.upload_file(str(path), "models", f"team/bot/versions/3/{path.relative_to(tmp_path / 'a')}")
        client.upload_file(str(tmp_path / "a" / SUMS), "models", f"team/bot/versions/3/{SUMS}")
        folder = fetch_version(storage, order, tmp_path / "here")
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert read(storage, "probes/3.json") is None
        merged = order.model_copy(update={"folder": "merged"})
        assert fetch(file, str(tmp_path / "models"), merged).message.startswith("model://bot@3 is there, sha256:")
        assert sorted(path.name for path in (tmp_path / "models" / "base").iterdir()) == ["config.json", "model.safetensors"]
        client.put_object(Bucket="models", Key="team/bot/versions/3/merged/config.json", Body=b"{}")
        with pytest.raises(Refused, match="versions/3/merged/config.json .* is not what SHA256SUMS says"):
            fetch_whole(storage, merged, tmp_path / "elsewhere")
        client.put_object(Bucket="models", Key="team/bot/versions/3/adapter_config.json", Body=b"{}")
        with pytest.raises(Refused, match="adapter_config.json .* is not what SHA256SUMS says"):
            fetch_version(storage, order, tmp_path / "elsewhere")
        assert not list((tmp_path / "elsewhere").iterdir())
    finally:
        server.stop()
    with pytest.raises(StageError, match="cannot be reached"):
        fetch_version(storage, order, tmp_path / "elsewhere")


def test_names_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    claim = tmp_path / "claim"
    file = ReplicaFile(name="e", namespace="n", uid="u", base=EndpointBase(uri="hf://o/m"), sources={"pvc://c": str(claim)})
    context = context_of(file, str(tmp_path / "models"))
    digest = _published(claim / "bot" / "versions" / "3")
    storage = storage_of(context, _ordered(digest, "pvc://c/bot"))
    assert fetch_version(storage, _ordered(digest), tmp_path / "here").name == digest.removeprefix("sha256:")
    with pytest.raises(Refused, match="no sha256"):
        fetch_version(storage, _ordered("sha256:../../../etc"), tmp_path / "here")
    (claim / "away").symlink_to(tmp_path)
    with pytest.raises(UserError, match="leads out of the volume"):
        fetch_version(storage_of(context, _ordered(digest, "pvc://c/away")), _ordered(digest), tmp_path / "elsewhere")
    with pytest.raises(UserError, match="not mounted"):
        storage_of(context, _ordered(digest, "pvc://other/bot"))


def test_the_base_is_fetched_and_a_whole_model_is_known_by_its_digest(tmp_path: Path) -> None:
    base_at(tmp_path / "claim")
    (tmp_path / "claim" / SUMS).write_text(digests(tmp_path / "claim"))
    file = ReplicaFile(name="e", namespace="n", uid="u", base=EndpointBase(uri="pvc://c"), sources={"pvc://c": str(tmp_path / "claim")})
    for _ in range(2):  # a pod's init containers may run again
        assert fetch(file, str(tmp_path / "models")).reason == "Fetched"
    reference = json.loads((tmp_path / "models" / "base.json").read_text())
    assert (tmp_path / "models" / "base").resolve() == Path(reference["path"]) and reference["fingerprint"].startswith("sha256:")
    assert served_version(reference) is None


def _whole(tmp_path: Path, change: Any = None) -> tuple[ReplicaFile, OrderedModel, Path]:
    """A whole model as published; `change` happens to its files before."""
    folder = tmp_path / "claim" / "bot" / "versions" / "3"
    folder.parent.mkdir(parents=True)
    base_at(folder)
    if change is not None:
        change(folder)
    uri = {"uri": "model://bot"}
    file = ReplicaFile(name="e", namespace="n", uid="u", base=EndpointBase(**uri), sources={"pvc://c": str(tmp_path / "claim")})
    return file, _ordered(_summed(folder), "pvc://c/bot"), folder


def test_a_whole_model_is_let_in_as_it_was_published(tmp_path: Path) -> None:
    file, version, folder = _whole(tmp_path)
    for _ in range(2):
        assert fetch(file, str(tmp_path / "models"), version).reason == "Fetched"
    assert (tmp_path / "models" / "base").resolve() == folder, "the claim's own"
    reference = json.loads((tmp_path / "models" / "base.json").read_text())
    assert served_version(reference) == version and reference["fingerprint"].startswith("sha256:")


def _damaged(folder: Path) -> None:
    weights = folder / "model.safetensors"
    tensors = {"a": floats(4, 4), "b": floats(700, 700)}
    tensors["b"][-1, -1] = np.inf
    save_file(tensors, weights)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (
            None,
            lambda f: (f / "config.json").write_text("{}"),
            "versions/3/config.json .* is not what SHA256SUMS says: .*publish the version",
        ),
        (None, lambda f: (f / "model.safetensors").unlink(), "versions/3/model.safetensors is not there"),
        (None, lambda f: (f / "generation_config.json").write_text("{}"), "versions/3/generation_config.json is not listed .* remove it"),
        (None, lambda f: (f / SUMS).write_text("other"), "not sha256:.* as published"),
        (None, lambda f: (f / SUMS).unlink(), "SHA256SUMS is not there: the version was removed"),
        (_damaged, None, "model.safetensors: tensor b holds values that are no numbers .* name another version"),
        (lambda f: (f / "model.safetensors").write_bytes(b"12"), None, "model.safetensors .* is no whole .safetensors file"),
        (lambda f: (f / "config.json").unlink(), None, "holds no config.json: it is no whole model; publish one with output.merged"),
    ],
)
def test_another_whole_model_is_refused_with_file_tensor_and_fix(tmp_path: Path, before: Any, after: Any, told: str) -> None:
    file, version, folder = _whole(tmp_path, before)
    if after is not None:
        after(folder)
    with pytest.raises(UserError, match=told) as refused:
        fetch(file, str(tmp_path / "models"), version)
    assert refused.value.reason == "VersionRefused" and not (tmp_path / "models" / "base").exists()


def test_those_tokens_are_asked_that_tell_most() -> None:
    base = [-1.0] * 20
    tuned = [number - (0.5 if i % 3 == 0 else 0.001) for i, number in enumerate(base)]
    answer = ProbeAnswer(text="", token_ids=list(range(100, 120)), tuned=tuned, base=base)
    assert answer.telling() == [0, 1, 3, 6, 9, 12, 15, 18], "in their order"
    probe = Probe(prompt="", prompt_ids=[1], answers=[answer]).narrowed()
    assert probe.answers[0].token_ids == [100 + i for i in answer.telling()]
    assert judge([probe], [[probe.answers[0].tuned]]).state == "Verified"
    assert judge([probe], [[probe.answers[0].base]]).state == "Mismatch"
    assert judge([probe], [[[float("nan"), *probe.answers[0].tuned[1:]]]]).state == "Mismatch"


def test_the_agent_starts_without_torch() -> None:
    code = "import finetune_trainer.serving.web, finetune_trainer.__main__, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
