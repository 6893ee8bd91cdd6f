"""Distillation: a teacher's logits, and answers that a teacher writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.spec import Distillation, Model
from finetune_trainer.data.store import read_rows
from finetune_trainer.process.errors import UserError
from finetune_trainer.stages.prepare import prepare
from finetune_trainer.training.objectives.distill import distillation_loss
from tests.trainer.conftest import COLOURS, ROWS, Bench
from tests.trainer.server import chat_server

HYPER = {"maxSteps": 16, "learningRate": 1e-2, "globalBatchSize": 16, "maxLength": 64}
BASE = {"objective": "distill", "lora": {"rank": 8, "alpha": 16, "dropout": 0}, "hyperparameters": HYPER}


def test_the_divergence_against_its_definition() -> None:
    torch.manual_seed(0)
    student, taught, labels = torch.randn(2, 4, 7), torch.randn(2, 4, 7), torch.tensor([[-100, 1, 2, 3], [-100, -100, 4, 5]])
    settings = Distillation(teacher=Model(uri="pvc://a/b"), alpha=0.3, temperature=2.0)
    expected = 0.0
    for row in range(2):
        for place in range(1, 4):
            label = int(labels[row, place])
            if label == -100:
                continue
            s, t = student[row, place - 1], taught[row, place - 1]
            p, q = (t / 2).softmax(-1), (s / 2).softmax(-1)
            expected += 0.3 * -float(s.log_softmax(-1)[label]) + 0.7 * 4 * float((p * (p / q).log()).sum())
    assert float(distillation_loss(student, taught, labels, settings)) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_loss(taught, taught, labels, settings.model_copy(update={"alpha": 0.0}))) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(("mine", "theirs"), [(7, 9), (9, 7)])
def test_vocabularies_that_are_padded_to_other_sizes(mine: int, theirs: int) -> None:
    """As Qwen2.5's: one tokenizer of 7 tokens, embeddings of 7 and 9. Compared is what both have."""
    torch.manual_seed(0)
    student, taught, labels = torch.randn(2, 4, mine), torch.randn(2, 4, theirs), torch.tensor([[-100, 1, 2, 3], [-100, -100, 4, 5]])
    settings = Distillation(teacher=Model(uri="pvc://a/b"), alpha=0, temperature=1.0)
    same = distillation_loss(student[..., :7], taught[..., :7], labels, settings)
    assert float(distillation_loss(student, taught, labels, settings)) == pytest.approx(float(same), rel=1e-5)


def test_a_student_learns_from_a_teacher_with_a_padded_vocabulary(bench: Bench) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = AutoModelForCausalLM.from_pretrained(bench.model)
    teacher.resize_token_embeddings(352)
    teacher.save_pretrained(bench.data / "teacher")
    AutoTokenizer.from_pretrained(bench.model).save_pretrained(bench.data / "teacher")
    told = {**BASE, "hyperparameters": {**HYPER, "maxSteps": 2}, "distillation": {"teacher": {"uri": "pvc://rows/teacher"}}}
    assert bench.train(bench.context(ROWS["messages"], tuning=told)).result["steps"] == 2


def test_a_student_learns_what_only_its_teacher_knows(bench: Bench) -> None:
    """Rows with wrong answers, weight 0 on them: what falls is the distance to the teacher's distribution."""
    from finetune_trainer.stages.publish import publish

    full = {"method": "full", "hyperparameters": {**HYPER, "learningRate": 3e-3, "maxSteps": 40}}
    teacher = bench.context(ROWS["messages"], name="teacher", tuning=full, publish=[{"uri": "pvc://published/teacher"}])
    bench.train(teacher)
    publish(teacher)
    tuning = {**BASE, "distillation": {"teacher": {"uri": "pvc://published/teacher"}, "alpha": 0, "temperature": 1}}
    base, tuned, context = bench.run(ROWS["messages"], name="student", tuning=tuning, evaluation={"metrics": ["loss"]})
    assert tuned["loss"] < 0.9 * base["loss"], "it came nearer to the answers, which it learned from the teacher alone"
    lineage = json.loads(Path(context.layout.reference("teacher")).read_text())
    assert lineage["uri"] == "pvc://published/teacher"


def test_a_teacher_behind_an_endpoint_writes_the_answers(bench: Bench) -> None:
    right = dict(COLOURS)
    with chat_server(lambda messages: right[messages[-1]["content"]], failures=[500]) as server:
        distillation = {"mode": "generate", "endpoint": {"url": server.url, "model": "big"}}
        spec: dict[str, Any] = {"tuning": {**BASE, "distillation": distillation}, "evaluation": {"metrics": ["loss"]}}
        base, tuned, context = bench.run(ROWS["prompt-only"], **spec)
        asked = len(server.asked)
        prepare(context)
        assert len(server.asked) == asked, "a retry asks nothing again"
        another = {**BASE, "distillation": {**distillation, "endpoint": {"url": server.url, "model": "bigger"}}}
        prepare(bench.context(ROWS["prompt-only"], tuning=another))
        assert len(server.asked) == 2 * asked, "what another teacher wrote is not taken for this one's"
    assert tuned["loss"] < 0.8 * base["loss"]
    rows = [json.loads(r["row"]) for r in read_rows(context.layout.train_rows, ("row",), 100)]
    assert all(right[row["prompt"]] == row["completion"] for row in rows)
    assert asked == len({q for q, _ in COLOURS})


@pytest.mark.parametrize(
    ("rows", "held_out", "words"),
    [
        ("text", {"splitFraction": 0.25}, "the rows are plain text"),
        ("prompt-only", {"uri": "pvc://rows/none.jsonl"}, "none.jsonl does not exist"),
    ],
)
def test_what_can_be_refused_is_refused_before_a_teacher_is_asked(bench: Bench, rows: str, held_out: dict[str, Any], words: str) -> None:
    with chat_server(lambda _: "blue") as server:
        distillation = {"mode": "generate", "endpoint": {"url": server.url, "model": "big"}}
        dataset = {"train": {"uri": "pvc://rows/train.jsonl"}, "eval": held_out, "checks": {"minExamples": 1}}
        with pytest.raises(UserError, match=words):
            prepare(
                bench.context(ROWS[rows], dataset=dataset, tuning={**BASE, "distillation": distillation}, evaluation={"metrics": ["f1"]})
            )
        assert not server.asked


def test_a_teacher_model_writes_the_answers(bench: Bench) -> None:
    distillation = {"mode": "generate", "teacher": {"uri": "pvc://models/tiny"}, "maxNewTokens": 5}
    context = bench.context(ROWS["messages"], tuning={**BASE, "distillation": distillation})
    prepare(context)
    rows = [json.loads(r["row"])["messages"] for r in read_rows(context.layout.train_rows, ("row",), 100)]
    assert any(turns[-1]["content"] != dict(COLOURS)[turns[0]["content"]] for turns in rows), "its own answers, not the data's"


def test_another_vocabulary_is_refused(bench: Bench, tmp_path: Path) -> None:
    import shutil

    if True:
        shutil.copytree(bench.model, tmp_path / "other")
        document = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
        document["added_tokens"].append({**document["added_tokens"][-1], "id": len(document["model"]["vocab"]), "content": "<|new|>"})
        (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(document))
    shutil.copytree(tmp_path / "other", bench.data / "other")
    tuning = {**BASE, "distillation": {"teacher": {"uri": "pvc://rows/other"}}}
    with pytest.raises(UserError, match="the teacher's vocabulary"):
        prepare(bench.context(ROWS["messages"], tuning=tuning))
