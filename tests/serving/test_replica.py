"""A replica beside a real vLLM: what is let in, what it is found to answer as, and what becomes of it when the engine dies."""

from __future__ import annotations

import threading
import urllib.error
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from finetune_trainer.models.weights import ADAPTER, ADAPTER_CONFIG

from .conftest import Replica, asked
from .engine import BASE
from .versions import MODEL, with_tensors


def test_a_version_is_loaded_and_verified(replica: Replica) -> None:
    before = replica.says(BASE)
    replica.order(replica.shelf.publish(1, *replica.adapters["good"]))
    state, message = replica.settled()[f"{MODEL}@1"]
    assert state == "Verified" and "other tokens" not in message
    report = replica.report()
    assert (report.generation, report.engine, report.base_fingerprint) == (1, "vllm 0.32.0", replica.shelf.fingerprint)
    assert report.models[0].distance is not None and report.models[0].distance > 0.02 and report.models[0].verified_at
    assert replica.says(f"{MODEL}@1") != before
    assert replica.names() == {BASE, f"{MODEL}@1"}, "no name but those that were ordered"


def test_what_must_not_be_loaded_is_refused_and_the_engine_goes_on(replica: Replica, tiny_model: Path) -> None:
    shelf, adapters = replica.shelf, replica.adapters
    words = replica.says(f"{MODEL}@1")

    def nan(tensors: dict[str, np.ndarray]) -> None:
        tensors[max(tensors)][-1, -1] = np.nan

    def extra(tensors: dict[str, np.ndarray]) -> None:
        name = min(tensors)
        for side in "AB":
            tensors[name.replace("layers.0", "layers.7").replace("lora_A", f"lora_{side}")] = tensors[
                name.replace("lora_A", f"lora_{side}")
            ]

    def token(folder: Path) -> None:
        text = (tiny_model / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace("<|end|>", "<|finish|>"))

    def dora(folder: Path) -> None:
        config = folder / ADAPTER_CONFIG
        config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))

    good = adapters["good"][0]
    cases = {
        11: (shelf.publish(11, adapters["other"][0]), ADAPTER, "tuned from another one"),
        12: (shelf.publish(12, good, change=with_tensors(nan)), ADAPTER, "no numbers"),
        13: (shelf.publish(13, good, change=lambda folder: (folder / ADAPTER).unlink()), ADAPTER, "holds no"),
        14: (shelf.publish(14, good, change=lambda f: (f / ADAPTER).write_bytes((f / ADAPTER).read_bytes()[:-100])), ADAPTER, "no whole"),
        15: (shelf.publish(15, adapters["large"][0]), ADAPTER, "spec.maxLoraRank"),
        16: (shelf.publish(16, good, change=with_tensors(extra)), ADAPTER, "layers.7"),
        17: (shelf.publish(17, good, change=token), "tokenizer.json", "<|finish|>"),
        18: (shelf.publish(18, good, change=dora), ADAPTER_CONFIG, "DoRA"),
        19: (shelf.publish(19, good).model_copy(update={"base_fingerprint": "sha256:another"}), "fingerprint", "spec.base"),
        20: (shelf.publish(20, good).model_copy(update={"digest": "sha256:" + "0" * 64}), "SHA256SUMS", "publish the version again"),
        21: (shelf.publish(21, good, change=lambda f: (f / "notes.txt").write_text("21")), ADAPTER, "damaged or cut off"),
        22: (shelf.publish(22, good, change=lambda f: (f / "notes.txt").write_text("22")), ADAPTER, "is not there"),
    }
    damaged = shelf.root / "versions" / "21" / ADAPTER
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (shelf.root / "versions" / "22" / ADAPTER).unlink()
    replica.order(shelf.ordered(1), *(model for model, _, _ in cases.values()))
    settled = replica.settled()
    for number, (_, file, why) in cases.items():
        state, message = settled[f"{MODEL}@{number}"]
        assert state == "Refused" and file in message and why in message, (number, state, message)
    assert settled[f"{MODEL}@1"][0] == "Verified"
    assert replica.names() == {BASE, f"{MODEL}@1"}
    assert replica.says(f"{MODEL}@1") == words
    assert replica.report().ready


def test_what_answers_as_the_base_is_a_mismatch_and_gets_no_name(replica: Replica) -> None:
    shelf = replica.shelf
    shelf.publish(2, replica.adapters["none"][0], replica.adapters["better"][1])
    replica.order(shelf.ordered(1, MODEL))
    replica.until(lambda _: MODEL in replica.names())
    words = replica.says(f"{MODEL}@1")
    replica.order(shelf.ordered(1), shelf.ordered(2, MODEL))
    settled = replica.settled()
    assert settled[f"{MODEL}@2"][0] == "Mismatch" and "0 of 8" in settled[f"{MODEL}@2"][1]
    assert replica.says(MODEL) == words, "the champion before goes on answering"


def test_a_champion_takes_over_its_name_without_a_gap(replica: Replica) -> None:
    shelf = replica.shelf
    shelf.publish(3, *replica.adapters["better"])
    replica.order(shelf.ordered(1, MODEL))
    replica.settled()
    old = replica.says(MODEL)
    heard, over = [], threading.Event()

    def talk() -> None:
        while not over.is_set():
            try:
                heard.append(replica.says(MODEL))
            except urllib.error.HTTPError as failure:
                heard.append(f"{failure.code}")

    talker = threading.Thread(target=talk)
    talker.start()
    try:
        replica.order(shelf.ordered(3, MODEL), shelf.ordered(1))
        assert replica.settled()[f"{MODEL}@3"][0] == "Verified"
        new = replica.says(f"{MODEL}@3")
        replica.until(lambda _: heard[-1] == new)
    finally:
        over.set()
        talker.join()
    # one that is being answered goes on with the new weights
    assert old[:2] != new[:2] and {text[:2] for text in heard} == {old[:2], new[:2]}, heard


def test_a_version_without_probes_is_not_taken_for_verified(replica: Replica) -> None:
    shelf = replica.shelf
    shelf.publish(4, replica.adapters["good"][0])
    replica.order(shelf.ordered(4))
    state, message = replica.settled()[f"{MODEL}@4"]
    assert state == "Unverifiable" and "probes/4.json" in message


def test_a_chat_template_that_makes_other_tokens_is_told(replica: Replica) -> None:
    adapter, probes = replica.adapters["good"]
    others = [probe.model_copy(update={"messages": [{"role": "system", "content": "a"}, *probe.messages]}) for probe in probes.probes]
    replica.order(replica.shelf.publish(7, adapter, probes.model_copy(update={"probes": others})))
    state, message = replica.settled()[f"{MODEL}@7"]
    assert state == "Verified" and message.endswith("the base's chat template makes other tokens of 8 of them than were evaluated")


def test_a_storage_that_does_not_answer_is_waited_for_and_others_go_on(replica: Replica) -> None:
    shelf = replica.shelf
    away = shelf.ordered(3).model_copy(update={"name": f"{MODEL}@5", "storage": "s3://bucket/models", "s3_endpoint": "http://127.0.0.1:1"})
    unmounted = shelf.ordered(3).model_copy(update={"name": f"{MODEL}@6", "storage": "pvc://elsewhere/models"})
    replica.order(away, unmounted, shelf.ordered(1))
    report = replica.until(lambda r: r.models[2].state == "Verified" and all(model.message for model in r.models))
    assert [model.state for model in report.models] == ["Pending", "Pending", "Verified"]
    assert "127.0.0.1" in report.models[0].message and "not mounted" in report.models[1].message


def test_an_engine_that_was_killed_is_given_everything_again(replica: Replica) -> None:
    shelf = replica.shelf
    replica.order(shelf.ordered(1), shelf.ordered(3, MODEL))
    replica.settled()
    words = replica.says(MODEL)
    replica.engine.kill()
    report = replica.until(lambda r: not r.ready, 30)
    assert {model.state for model in report.models} == {"Pending"} and report.message
    with pytest.raises(urllib.error.HTTPError, match="503"):
        asked(f"{replica.agent}/health")
    replica.engine.start()
    replica.engine.wait()
    settled = replica.settled()
    assert {state for state, _ in settled.values()} == {"Verified"}
    replica.until(lambda _: MODEL in replica.names())
    assert replica.says(MODEL) == words


def test_what_was_asked_too_long_ago_is_asked_again(replica: Replica) -> None:
    shelf = replica.shelf
    replica.order(shelf.ordered(3, MODEL))
    replica.settled()
    first = replica.report().models[0].verified_at
    replica.order(shelf.ordered(3, MODEL), verify_before=datetime.now(UTC).isoformat())
    report = replica.until(lambda r: r.models[0].verified_at != first)
    assert report.models[0].state == "Verified"


def test_what_is_not_ordered_is_unloaded_and_its_files_go(replica: Replica) -> None:
    replica.order()
    replica.until(lambda report: not report.models and replica.names() == {BASE})
    folder = replica.engine.folder / "models" / "adapters"
    replica.until(lambda _: not list(folder.iterdir()))
    assert replica.says(BASE)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"models": [{"name": "a@1"}]}, "models.0.model"),
        ({"verifyBefore": "yesterday"}, "verifyBefore: 'yesterday' is no time"),
        (
            {"models": [{"name": f"a@{n}", "aliases": ["a"], "model": "a", "number": n, "storage": "", "digest": ""} for n in (1, 2)]},
            "a is ordered twice",
        ),
    ],
)
def test_an_order_that_is_none_is_answered_with_its_field(replica: Replica, body: object, told: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        asked(f"{replica.agent}/models", body, "PUT")
    assert refused.value.code == 400 and told in refused.value.read().decode()
