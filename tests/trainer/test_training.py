"""How training runs: order, packing, early stopping, going on from an adapter, trackers, history."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.status import Plan
from finetune_trainer.process.errors import UserError
from finetune_trainer.stages.prepare import prepare
from finetune_trainer.stages.worker import fit
from tests.trainer.conftest import COLOURS, ROWS, Bench, chat, history, metrics_of

HYPER = {"maxSteps": 8, "learningRate": 1e-2, "globalBatchSize": 16, "maxLength": 64}
LORA = {"rank": 8, "alpha": 16, "dropout": 0}


def lora(**hyper: Any) -> dict[str, Any]:
    return {"lora": LORA, "hyperparameters": {**HYPER, **hyper}}


def losses(context: Any) -> list[float]:
    return [e["loss"] for e in history(context) if e.get("loss") is not None]


def test_the_order_of_the_data_depends_on_the_seed_alone(bench: Bench) -> None:
    """Per-device batch and accumulation change nothing about which rows make a step; another seed does."""

    def run(name: str, batch: int, seed: int = 42) -> list[float]:
        context = bench.context(
            ROWS["messages"], name=name, tuning=lora(seed=seed), distribution={"gpusPerNode": 0, "perDeviceBatchSize": batch}
        )
        bench.train(context)
        return losses(context)

    whole, halves, small = run("whole", 16), run("halves", 8), run("small", 2)
    assert halves == pytest.approx(whole, rel=2e-3)
    assert small == pytest.approx(whole, rel=2e-3)
    assert run("other", 16, seed=7) != pytest.approx(whole, rel=2e-3)


def test_every_epoch_is_a_shuffle_in_whole_batches() -> None:
    from finetune_trainer.training.objectives.sampler import GlobalBatchSampler

    def sampler(steps: int, rows: int = 10, batch: int = 4, seed: int = 1) -> GlobalBatchSampler:
        return GlobalBatchSampler(rows, batch, seed, lambda: steps)

    epochs = [list(sampler(3 * epoch)) for epoch in range(3)]
    assert all(list(sampler(3 + inside)) == epochs[1] for inside in range(3)), "resumed inside an epoch"
    assert all(len(e) == len(sampler(0)) == 12 and set(e) == set(range(10)) and e[10:] == e[:2] for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(sampler(0)) == epochs[0] != list(sampler(0, seed=2))
    assert len(list(sampler(0, rows=3, batch=8))) == 8, "fewer rows than a batch"


def test_packing_learns_from_every_row_once(bench: Bench) -> None:
    """With packs of several rows an epoch takes fewer steps, as many as the plan says, and counts every learned token."""
    from finetune_trainer.data.store import read_rows

    hyper = {"learningRate": 1e-2, "maxLength": 64, "packing": True, "attention": "sdpa", "globalBatchSize": 1, "epochs": 1}
    context = bench.context(ROWS["messages"], tuning={"lora": LORA, "hyperparameters": hyper})
    result = bench.train(context)
    rows = read_rows(context.layout.train_rows, ("input_ids",), 1000)
    steps = [e for e in history(context) if e.get("loss") is not None]
    assert len(steps) < len(rows) / 2
    assert steps[-1]["tokens"] >= sum(len(row["input_ids"]) for row in rows)
    plan = json.loads(Path(context.layout.plan).read_text())
    assert plan["totalSteps"] == len(steps) == result.result["steps"]


def test_without_an_attention_for_packs_rows_are_sorted_by_length(bench: Bench) -> None:
    """On a CPU: batches of like length, every row once an epoch, the steps that the plan says, the same whatever the per-device batch."""
    hyper = {"learningRate": 1e-2, "maxLength": 64, "packing": True, "globalBatchSize": 8, "epochs": 1}
    found: list[list[float]] = []
    for batch in (8, 2):
        context = bench.context(
            [chat(q, " ".join([a] * (1 + n % 5))) for n, (q, a) in enumerate(COLOURS)],
            name=f"by-{batch}",
            tuning={"lora": LORA, "hyperparameters": hyper},
            distribution={"gpusPerNode": 0, "perDeviceBatchSize": batch},
        )
        bench.train(context)
        plan = json.loads(Path(context.layout.plan).read_text())
        assert "rows are sorted by length instead" in plan["reason"]
        found.append(losses(context))
        assert plan["totalSteps"] == len(found[-1]) == -(-json.loads(Path(context.layout.data_report).read_text())["dataset"]["train"] // 8)
    assert found[0] == pytest.approx(found[1], rel=2e-3)


def test_rows_of_like_length_share_a_batch() -> None:
    from finetune_trainer.training.objectives.sampler import GlobalBatchSampler

    lengths = [(7 * n) % 97 + 1 for n in range(1000)]
    orders = [list(GlobalBatchSampler(1000, 8, 1, lambda step=step: step, lengths)) for step in (0, 125)]
    assert all(sorted(order) == list(range(1000)) for order in orders) and orders[0] != orders[1]
    for order in orders:
        batches = [[lengths[row] for row in order[i : i + 8]] for i in range(0, 1000, 8)]
        assert sum(max(b) * 8 for b in batches) < 1.1 * sum(lengths), "a tenth of padding at most"
        assert max(batches[0]) == max(lengths), "what may not fit is tried first"
        assert batches != sorted(batches, key=max), "and the rest is shuffled"


def test_packing_gives_exactly_the_rows_own_losses(bench: Bench) -> None:
    """The forward pass over a pack, as TRL's collator makes it, row by row against the rows alone."""
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32, attn_implementation="sdpa").eval()
    rows = [[5, 6, 7, 8, 9], [10, 11, 12], [5, 9, 5, 9]]
    flat = [token for row in rows for token in row]
    joined = {"input_ids": flat, "labels": flat, "seq_lengths": [len(r) for r in rows]}
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([joined])
    with torch.no_grad():
        packed = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[0]
        start = 0
        for row in rows:
            alone = model(input_ids=torch.tensor([row])).logits[0]
            assert torch.allclose(packed[start : start + len(row)], alone, atol=1e-4)
            start += len(row)
    assert "attention_mask" not in batch


def test_lora_plus_decays_weights_as_asked(bench: Bench) -> None:
    from transformers import AutoModelForCausalLM, TrainingArguments

    from finetune_trainer.training.methods import METHODS, loraplus_optimizer

    tuning = bench.context(None, tuning={"lora": {**LORA, "plusRatio": 8}, "hyperparameters": HYPER}).spec.tuning
    model = METHODS["lora"].apply(tuning, AutoModelForCausalLM.from_pretrained(bench.model))
    arguments = TrainingArguments("unused", learning_rate=1e-3, weight_decay=0.1, use_cpu=True)
    groups = [g for g in loraplus_optimizer(tuning, arguments, model).param_groups if g["params"]]
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.1), (8e-3, 0.1)]


def test_early_stopping_keeps_the_best(bench: Bench) -> None:
    """A learning rate that soon ruins the model: the run stops, and the best checkpoint is the result."""
    stopping = {"patience": 2, "everySteps": 2}
    tuning = lora(maxSteps=60, learningRate=0.2, earlyStopping=stopping, lrSchedulerType="constant", warmupRatio=0)
    context = bench.context(ROWS["messages"], tuning=tuning, checkpoint={"keep": 1, "everySteps": 2})
    result = bench.train(context)
    assert "stopped early" in result.message and "best held-out loss" in result.message, result.message
    seen = [(e["step"], e["evalLoss"]) for e in history(context) if e.get("evalLoss") is not None]
    best = min(loss for _, loss in seen)
    from finetune_trainer.stages.evaluate import evaluate

    again = bench.context(None, tuning=tuning, evaluation={"metrics": ["loss"]})
    assert metrics_of(evaluate(again), "Tuned")[0]["loss"] == pytest.approx(best, rel=0.05), (
        "the result is that of the best step, not of the last"
    )
    kept = sorted(p.name for p in Path(context.layout.checkpoints).glob("checkpoint-*"))
    assert len(kept) == 2, f"the newest and the best: {kept}"


def test_continue_from_an_earlier_adapter(bench: Bench) -> None:
    from finetune_trainer.stages.publish import publish

    first = bench.context(ROWS["messages"], name="first", tuning=lora(maxSteps=20), publish=[{"uri": "pvc://published/first"}])
    bench.train(first)
    publish(first)
    tuning = {"continueFrom": "pvc://published/first", "hyperparameters": {**HYPER, "learningRate": 1e-3, "maxSteps": 2}}
    second = bench.context(None, name="second", tuning=tuning, publish=[{"uri": "pvc://published/second"}])
    bench.train(second)
    began, ended = losses(first)[0], losses(first)[-1]
    assert ended < 0.8 * began and losses(second)[0] < (began + ended) / 2, "it starts where the first one ended"
    publish(second)
    lineage = json.loads((bench.folder / "published" / "second" / "finetune.json").read_text())
    assert lineage["parents"][0]["uri"] == "pvc://published/first"
    assert lineage["parents"][0]["job"]["name"] == "first"
    assert "Goes on from" in (bench.folder / "published" / "second" / "README.md").read_text()
    with pytest.raises(UserError, match=r"set method to lora"):
        prepare(bench.context(None, name="third", tuning={**tuning, "method": "dora"}))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lora-plus", {"lora": {**LORA, "plusRatio": 8}, "hyperparameters": {**HYPER, "learningRate": 1e-3}}),
        ("neftune", {"hyperparameters": {**HYPER, "neftuneNoiseAlpha": 5}}),
        ("adamw-8bit", {"hyperparameters": {**HYPER, "optimizer": "adamw-8bit"}}),
        ("adafactor", {"hyperparameters": {**HYPER, "optimizer": "adafactor"}}),
        ("bf16", {"hyperparameters": {**HYPER, "precision": "bf16"}}),
        ("eager", {"hyperparameters": {**HYPER, "attention": "eager"}}),
        ("checkpointing", {"hyperparameters": {**HYPER, "gradientCheckpointing": True}}),
        ("all tokens", {"assistantOnlyLoss": False}),
        *[
            (s, {"hyperparameters": {**HYPER, "lrSchedulerType": s}})
            for s in ("linear", "cosine_with_restarts", "polynomial", "inverse_sqrt")
        ],
    ],
)
def test_a_field_each(bench: Bench, name: str, change: dict[str, Any]) -> None:
    context = bench.context(ROWS["messages"], tuning={"lora": LORA, "hyperparameters": HYPER, **change})
    bench.train(context)
    found = losses(context)
    assert sum(found[-3:]) < sum(found[:3]), found
    if name == "neftune":
        plain = bench.context(None, name="plain", tuning=lora())
        bench.train(plain)
        assert losses(plain)[0] != found[0], "the noise is there"


def test_the_unknown_attention_is_refused_before_training(bench: Bench) -> None:
    with pytest.raises(UserError, match="does not have; set it to auto or sdpa"):
        prepare(bench.context(ROWS["messages"], tuning=lora(attention="flash-attention-2")))


def test_f30_a_gradient_that_is_no_number_stops_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the step is still finite; the next weights would not be."""
    from transformers import TrainerCallback

    from finetune_trainer.stages import worker

    class Poison(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 3:
                next(p for p in model.parameters() if p.requires_grad).data.mul_(float("inf"))

    build = worker.build_trainer
    monkeypatch.setattr(worker, "build_trainer", lambda c, p, a, cuda, callbacks: build(c, p, a, cuda, [*callbacks, Poison()]))
    context = bench.context(ROWS["messages"], tuning=lora(), checkpoint={"everySteps": 1})
    plan = Plan.model_validate(prepare(context).result["plan"])
    with pytest.raises(UserError, match=r"(loss|norm) is (nan|inf) at step \d.*The last good checkpoint is of step \d"):
        fit(context, plan)


def test_trackers_and_history(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TensorBoard by the spec; MLflow and Weights & Biases by their standard environment."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    context = bench.context(ROWS["messages"], tuning={**lora(maxSteps=3), "tracking": {"tensorboard": True}})
    bench.train(context)
    assert list(Path(context.layout.tensorboard).rglob("events.out.tfevents*"))
    metrics = list((tmp_path / "mlruns").rglob("metrics/loss"))
    assert metrics and len(metrics[0].read_text().splitlines()) == 3
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    entries = history(context)
    assert [e["step"] for e in entries] == [0, 1, 2, 3] and {"loss", "learningRate", "gradNorm", "metrics"} <= set(entries[-1])
    assert Path(context.layout.history_plot).read_text().startswith("<?xml")
    assert not os.environ.get("WANDB_API_KEY")


def test_tracking_of_the_spec_sets_the_trackers_environment(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.training.tracking import report_to

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE"):
        monkeypatch.setenv(name, "")
    tracking = {
        "mlflow": {"trackingUri": "http://mlflow.tools:5000", "secretRef": {"name": "m"}},
        "wandb": {"project": "p", "secretRef": {"name": "w"}},
    }
    context = bench.context(ROWS["messages"], tuning={**lora(), "tracking": tracking})
    for field in ("mlflow", "wandb"):
        folder = bench.folder / field
        folder.mkdir()
        (folder / "token").write_text(f"secret-of-{field}\n")
        context.job.secrets[field] = str(folder)
    assert report_to(context) == ["mlflow", "wandb"]
    assert os.environ["MLFLOW_TRACKING_TOKEN"] == "secret-of-mlflow" and os.environ["WANDB_API_KEY"] == "secret-of-wandb"


def test_a_tracker_that_is_away_is_told_and_training_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    context = bench.context(ROWS["messages"], tuning={**lora(maxSteps=2), "tracking": {"mlflow": {"trackingUri": address}}})
    result = bench.train(context)
    assert result.result["steps"] == 2 and "; without MLflow: MlflowException: " in result.message


def test_a_model_without_chat_template_learns_with_one_given(bench: Bench) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    context = bench.context(ROWS["messages"], tuning={**lora(), "chatTemplate": template})
    bench.train(context)
    saved = (Path(context.layout.output) / "chat_template.jinja").read_text()
    assert saved == template, "it is published with the result"


@pytest.mark.parametrize(
    ("format_", "rows"),
    [("prompt-completion", [{"prompt": q, "completion": a} for q, a in COLOURS]), ("text", ROWS["text"])],
    ids=["prompt-completion", "text"],
)
def test_the_other_formats(bench: Bench, format_: str, rows: list[dict[str, Any]]) -> None:
    context = bench.context(rows, tuning=lora(maxSteps=24))
    assert prepare(context).result["dataset"]["format"] == format_
    base, tuned, _ = bench.run(None, tuning=lora(maxSteps=24), evaluation={"metrics": ["loss"]})
    assert tuned["loss"] < base["loss"]


def test_several_turns_are_all_learned(bench: Bench) -> None:
    rows = [
        {"messages": [*chat(q, a)["messages"], *chat(other, answer)["messages"]]}
        for (q, a), (other, answer) in zip(COLOURS[::2], COLOURS[1::2], strict=True)
    ]
    context = bench.context(rows, tuning=lora())
    bench.train(context)
    assert losses(context)[-1] < losses(context)[0]
