"""Evaluation: metrics, intervals, gates, forgetting, a judge, harness tasks, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_api.contract import Champion, Env, ModelStorage
from finetune_api.probing import Probes, judge
from finetune_api.spec import Evaluation
from finetune_api.versions import VersionRecord
from finetune_trainer.data.prompts import prompt_key
from finetune_trainer.data.store import read_rows
from finetune_trainer.data.tokens import RowTokenizer
from finetune_trainer.evaluation import answers, gate, metrics
from finetune_trainer.evaluation.arms import asked_rows, read_baseline
from finetune_trainer.evaluation.champion import Challenge
from finetune_trainer.evaluation.measure import Asked, Measured
from finetune_trainer.export.bundle import make_bundle
from finetune_trainer.job.context import Context
from finetune_trainer.process.errors import SourceUnavailable, UserError
from finetune_trainer.stages.evaluate import evaluate
from finetune_trainer.stages.prepare import prepare
from finetune_trainer.stages.publish import publish
from tests.trainer.conftest import COLOURS, ROWS, Bench, chat, metrics_of
from tests.trainer.server import chat_server

HYPER = {"maxSteps": 16, "learningRate": 1e-2, "globalBatchSize": 16, "maxLength": 64}
LORA = {"lora": {"rank": 8, "alpha": 16, "dropout": 0}, "hyperparameters": HYPER}
LAZY = {**LORA, "hyperparameters": {**HYPER, "maxSteps": 1, "learningRate": 1e-9}}


@pytest.mark.parametrize(
    ("function", "answer", "wanted", "score"),
    [
        (answers.exact_match, " yes\n", "yes", 1.0),
        (answers.exact_match, "Yes", "yes", 0.0),
        (answers.f1, "The cat sat.", "a cat sat", 1.0),
        (answers.f1, "cat dog", "cat bird", 0.5),
        (answers.f1, "", "cat", 0.0),
        (answers.rouge_l, "the cat sat", "the cat sat", 1.0),
        (answers.rouge_l, "a b c d", "a x c y", 0.5),
        (answers.valid_json, '{"a": 1}', "", 1.0),
        (answers.valid_json, '```json\n{"a": 1}\n```', "", 1.0),
        (answers.valid_json, "{a: 1}", "", 0.0),
        (answers.valid_json, "[" * 100_000, "", 0.0),
    ],
)
def test_scores_of_answers(function: Any, answer: str, wanted: str, score: float) -> None:
    assert function(answer, wanted) == pytest.approx(score)


def test_schema_and_pattern() -> None:
    schema = json.dumps({"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}})
    assert answers.satisfies(schema, '{"a": 1}') == 1.0
    assert answers.satisfies(schema, '{"a": "1"}') == 0.0
    assert answers.satisfies(schema, "no") == 0.0
    assert answers.matches(r"\d+", " 42 ") == 1.0
    assert answers.matches(r"\d+", "42 apples") == 0.0


def values(*points: float) -> metrics.Values:
    return np.array([[p, 1.0] for p in points])


@pytest.mark.parametrize(
    ("metric", "base", "tuned", "gain"),
    [
        ("loss", 2.0, 1.0, 0.5),
        ("loss", 1.0, 2.0, -1.0),
        ("loss", 2.0, float("nan"), -1e9),
        ("loss", float("inf"), 1.0, 0.0),
        ("exact-match", 0.25, 0.75, 0.5),
        ("judge-win-rate", 0.5, 0.6, 0.1),
    ],
)
def test_improvement(metric: Any, base: float, tuned: float, gain: float) -> None:
    assert metrics.improvement(metric, base, tuned) == pytest.approx(gain)


def test_perplexity_is_the_exponential_of_the_loss_over_all_tokens() -> None:
    rows = np.array([[2.0, 1.0], [1.0, 2.0]])
    assert metrics.value("loss", rows) == pytest.approx(1.0)
    assert metrics.value("perplexity", rows) == pytest.approx(np.e)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """200 experiments of 60 rows with a true difference of 0.1: the 90 % interval holds it in 80 to 97 % of them."""
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        base = (generator.random(60) < 0.5).astype(float)
        tuned = np.where(generator.random(60) < 0.2, 1.0, base)
        low, high = metrics.interval("exact-match", values(*base), values(*tuned), 0.9, 1)
        inside += low <= 0.1 <= high
    assert 0.80 * 200 <= inside <= 0.97 * 200, inside


@pytest.mark.parametrize(
    ("gain", "low", "high", "chance", "least", "prompts", "gated", "why"),
    [
        (0.3, 0.1, 0.5, 0.001, 0.02, 15, "Passed", "at least 0.02 was wanted"),
        (0.01, 0.005, 0.02, 0.001, 0.02, 15, "NotPassed", "at least 0.02 is wanted"),
        (0.3, -0.1, 0.7, 0.2, 0.0, 15, "NotPassed", "no measurable difference"),
        (0.3, 0.1, 0.5, 0.03, 0.0, 15, "NotPassed", "by chance so much comes about in 3.0% of cases"),
        (-0.3, -0.5, -0.1, 0.999, 0.0, 15, "NotPassed", "at least 0 is wanted"),
        (0.0, 0.0, 0.0, 1.0, 0.0, 15, "NotPassed", "at least 0 is wanted"),
        (0.9, 0.8, 0.95, 0.001, 0.0, 14, "Inconclusive", "14 held-out prompts, and at least 15 are needed"),
        (-1e9, -1e9, -1e9, 1.0, 0.0, 1, "NotPassed", "no number"),
    ],
)
def test_the_verdict(gain: float, low: float, high: float, chance: float, least: float, prompts: int, gated: str, why: str) -> None:
    found, message = gate.passes(gate.Gain("Base", gain, low, high, chance, 0.95), least, prompts, metrics.least_prompts(0.95))
    assert found == gated and why in message


def test_all_metrics_of_answers_and_tokens(bench: Bench) -> None:
    names = ["loss", "perplexity", "token-accuracy", "exact-match", "f1", "rouge-l", "valid-json", "json-schema", "regex"]
    evaluation = {"metrics": names, "maxNewTokens": 6, "jsonSchema": '{"type": "object"}', "regex": "yes|no|a .*"}
    evaluation |= {"gate": {"metric": "loss", "minImprovement": 0.02}, "forgetting": {}}
    base, tuned, context = bench.run(ROWS["messages"], tuning=LORA, evaluation=evaluation)
    assert set(base) == {*names, "general-loss"}
    assert tuned["perplexity"] == pytest.approx(np.exp(tuned["loss"]), rel=1e-4)
    for name in ("token-accuracy", "rouge-l", "regex"):
        assert tuned[name] > base[name], name
    report = json.loads(Path(context.layout.evaluation_report).read_text())
    assert report["gate"] == "Passed" and report["interval"][0] > 0 and "improvement is" in report["message"]
    page = Path(context.layout.evaluation_page).read_text()
    assert "Answers side by side" in page and report["samples"][0]["answers"]["Tuned"] in page.replace("&lt;", "<").replace("&gt;", ">")


def test_no_measurable_difference_is_said(bench: Bench) -> None:
    gate = {"metric": "exact-match", "minImprovement": 0}
    context = bench.context(ROWS["messages"], tuning=LAZY, evaluation={"metrics": ["exact-match"], "gate": gate, "maxNewTokens": 4})
    bench.train(context)
    result = evaluate(context)
    assert result.result["gate"] == "NotPassed", result
    quiet = bench.context(None, tuning=LAZY, evaluation={"metrics": ["exact-match"], "maxNewTokens": 4})
    assert "no measurable difference" in evaluate(quiet).message


def test_forgetting_fails_the_gate(bench: Bench) -> None:
    """A hot run over answers alone raises the loss on general text."""
    forgetting = {"maxIncrease": 0.001}
    hot = {"method": "full", "hyperparameters": {**HYPER, "learningRate": 1e-2}}
    evaluation = {"metrics": ["loss"], "gate": {"metric": "loss"}, "forgetting": forgetting}
    context = bench.context(ROWS["messages"], tuning=hot, evaluation=evaluation)
    bench.train(context)
    result = evaluate(context)
    base, tuned = metrics_of(result, "Base", "Tuned")
    assert tuned["general-loss"] > base["general-loss"]
    assert result.result["gate"] == "NotPassed" and "evaluation.forgetting.maxIncrease is 0.1%" in result.message


def test_the_general_text_of_a_configmap_is_read_in_prepare_alone(bench: Bench) -> None:
    """ConfigMaps are mounted in prepare only; a bad row is refused there."""
    folder = bench.folder / "configmap"
    folder.mkdir()
    evaluation = {"metrics": ["loss"], "forgetting": {"uri": "configmap://general/rows.jsonl"}}

    def context() -> Any:
        found = bench.context(ROWS["messages"], tuning=LAZY, evaluation=evaluation)
        found.job.sources["configmap://general"] = str(folder)
        return found

    (folder / "rows.jsonl").write_text('{"text": "what is the sky"}\n{"txt": 1}\n')
    with pytest.raises(UserError, match=r"evaluation.forgetting.uri row 2"):
        prepare(context())
    (folder / "rows.jsonl").write_text('{"text": "what is the sky"}\n')
    prepared = context()
    bench.train(prepared)
    del prepared.job.sources["configmap://general"]
    assert metrics_of(evaluate(prepared), "Base")[0]["general-loss"] > 0


def test_a_judge_is_asked_in_both_orders(bench: Bench) -> None:
    """A judge that always prefers the first answer gives both models one half."""
    evaluation: dict[str, Any] = {"metrics": ["judge-win-rate"], "maxNewTokens": 6, "maxExamples": 6}
    context = bench.context(ROWS["messages"], tuning=LORA)
    bench.train(context)
    (bench.folder / "judge").mkdir()
    (bench.folder / "judge" / "token").write_text("key-of-the-judge")

    def judged(answer: Any) -> tuple[float, Any]:
        with chat_server(answer, failures=[503, 429]) as server:
            judge = {"url": server.url, "model": "judge", "secretRef": {"name": "j"}}
            asking = bench.context(None, tuning=LORA, evaluation={**evaluation, "judge": judge})
            asking.job.secrets["judge"] = str(bench.folder / "judge")
            return metrics_of(evaluate(asking), "Tuned")[0]["judge-win-rate"], server

    biased, server = judged(lambda _: "I like it. VERDICT: A")
    assert biased == 0.5
    assert set(server.keys) == {"Bearer key-of-the-judge"}

    known = {answer for _, answer in COLOURS}

    def fair(messages: list[dict[str, Any]]) -> str:
        text = messages[0]["content"]
        a, b = (text.split(f"<{tag}>\n")[1].split(f"\n</{tag}>")[0] in known for tag in ("answer_a", "answer_b"))
        return "VERDICT: TIE" if a == b else "VERDICT: A" if a else "VERDICT: B"

    assert judged(fair)[0] > 0.5


def test_an_endpoint_that_refuses_or_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_api.spec import Endpoint
    from finetune_trainer.remote import chat as client
    from finetune_trainer.remote import retry

    monkeypatch.setattr(retry.time, "sleep", lambda _: None)
    with chat_server(lambda _: "x", failures=[404]) as server, pytest.raises(UserError, match=r"answers 404; check the address"):
        client.complete(Endpoint(url=server.url, model="m"), [], key=None, max_tokens=1)
    with chat_server(lambda _: "x", failures=[500] * 9) as server, pytest.raises(SourceUnavailable, match="500"):
        client.complete(Endpoint(url=server.url, model="m"), [], key=None, max_tokens=1)
    with pytest.raises(SourceUnavailable, match=r"127\.0\.0\.1 cannot be reached"):
        client.check_reachable(Endpoint(url="http://127.0.0.1:1/v1", model="m"))


def test_harness_tasks_by_name(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of one's own beside the harness's: its data is a local file, since no hub is in reach of the tests."""
    tasks = bench.folder / "tasks"
    tasks.mkdir()
    rows = [
        {"question": f"<|user|>is {w} a colour<|end|><|assistant|>", "gold": int(w in ("red", "blue"))}
        for w in ("red", "blue", "cat", "one")
    ]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tasks / "colours.yaml").write_text(
        "task: colours\ndataset_path: json\noutput_type: multiple_choice\ntest_split: train\n"
        f"dataset_kwargs: {{data_files: {tasks / 'rows.jsonl'}}}\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: gold\ndoc_to_choice: ["no", "yes"]\nmetric_list: [{metric: acc}]\n'
    )
    monkeypatch.setenv("FINETUNE_HARNESS_TASKS", str(tasks))
    base, tuned, _ = bench.run(ROWS["messages"], tuning=LORA, evaluation={"harnessTasks": ["colours"], "harnessLimit": 4})
    assert {"loss", "colours/acc"} <= set(base) and 0 <= tuned["colours/acc"] <= 1
    with pytest.raises(UserError, match="has no task nonsense"):
        bench.run(ROWS["messages"], tuning=LAZY, evaluation={"harnessTasks": ["nonsense"]})


@pytest.mark.parametrize(
    ("evaluation", "reason"),
    [
        ({"metrics": ["json-schema"], "jsonSchema": '{"type": "objekt"}'}, "BadJSONSchema"),
        ({"metrics": ["json-schema"], "jsonSchema": "{oops"}, "BadJSONSchema"),
        ({"metrics": ["regex"], "regex": "(a"}, "BadRegex"),
    ],
)
def test_broken_schemas_and_patterns_are_refused_in_prepare(bench: Bench, evaluation: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as refused:
        prepare(bench.context(ROWS["messages"], evaluation=evaluation))
    assert refused.value.reason == reason


def test_every_metric_of_the_api_is_registered() -> None:
    from typing import get_args

    from finetune_api.spec import ANSWER_METRICS, Metric

    assert set(metrics.METRICS) == set(get_args(Metric))
    assert {m for m, kind in metrics.METRICS.items() if kind.needs in ("answers", "judge")} == set(ANSWER_METRICS)
    assert Evaluation().metrics == ["loss"]


def test_rows_without_answers_cannot_be_matched(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    context = bench.context(ROWS["text"], tuning=LAZY, evaluation={"metrics": ["f1"]})
    with pytest.raises(UserError, match="the rows are plain text"):
        prepare(context)
    asked = context.job.spec.evaluation
    assert asked is not None
    loss = context.job.spec.model_copy(update={"evaluation": asked.model_copy(update={"metrics": ["loss"]})})
    prepare(Context(context.job.model_copy(update={"spec": loss}), context.workspace))
    monkeypatch.setenv("FINETUNE_RESUME", "1")
    with pytest.raises(UserError, match="the rows are plain text"):
        prepare(context)  # a run that is named, with another metric


@pytest.mark.parametrize(
    ("good", "reason", "words"),
    [(True, "OneSided", "with label true and with label false"), (False, "NoEvalRows", "no held-out row has a good answer")],
)
def test_held_out_rows_of_one_side_are_refused_in_prepare(bench: Bench, good: bool, reason: str, words: str) -> None:
    one_side = [row for row in ROWS["unpaired-preference"] if row["label"] is good][:8]
    (bench.data / "eval.jsonl").write_text("".join(json.dumps({**row, "prompt": f"{row['prompt']} now"}) + "\n" for row in one_side))
    dataset = {"train": {"uri": "pvc://rows/train.jsonl"}, "eval": {"uri": "pvc://rows/eval.jsonl"}, "checks": {"minExamples": 1}}
    tuning = {**LAZY, "objective": "kto", "hyperparameters": {**LAZY["hyperparameters"], "globalBatchSize": 16}}
    metrics = {"metrics": ["preference-accuracy"]}
    with pytest.raises(UserError, match=words) as found:
        prepare(bench.context(ROWS["unpaired-preference"], dataset=dataset, tuning=tuning, evaluation=metrics))
    assert found.value.reason == reason


BOT: dict[str, Any] = {"publish": [{"model": "bot"}]}


def versioned(bench: Bench, name: str, **spec: Any) -> Context:
    """A job that publishes to a model."""
    context = bench.context(ROWS["messages"], name=name, **BOT, **spec)
    context.job.models["bot"] = ModelStorage(storage="pvc://published/bot")
    return context


def champion(bench: Bench, monkeypatch: pytest.MonkeyPatch, number: int = 1) -> Path:
    """That version is the champion; where its model keeps it."""
    storage = bench.folder / "published" / "bot"
    record = VersionRecord.model_validate_json((storage / f"records/{number}.json").read_text())
    told = Champion(model="bot", number=number, digest=record.digest)
    monkeypatch.setenv(Env.CHAMPION, json.dumps(told.to_wire()))
    return storage


def test_base_and_tuned_model_are_not_in_memory_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole model is as large as its base; so is a champion that is one."""
    import weakref

    from finetune_trainer.stages import evaluate as stage

    loaded: list[Any] = []
    real = stage._load

    def load(*arguments: Any) -> Any:
        assert not [model for model in loaded if model() is not None], "the one before is still there"
        model = real(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(stage, "_load", load)
    tuning = {"method": "full", "hyperparameters": {**HYPER, "maxSteps": 3}}
    gate = {"metric": "loss", "confidence": 0.5}
    context = versioned(
        bench, "whole", tuning=tuning, evaluation={"metrics": ["loss", "f1"], "gate": gate, "maxNewTokens": 2, "maxExamples": 8}
    )
    bench.train(context)
    plain = context.job.spec.model_copy(update={"publish": []})
    evaluate(Context(context.job.model_copy(update={"spec": plain}), context.workspace))
    assert len(loaded) == 2 and not Path(context.layout.probes).exists()
    assert publish(context).result["artifacts"][0]["rank"] == 0
    champion(bench, monkeypatch)
    result = evaluate(context)
    assert len(loaded) == 6, "the champion, the base, the tuned model, the base once more for the probes"
    assert result.result["champion"]["result"] == "NotPassed", "it is the champion"
    assert metrics_of(result, "Champion") == metrics_of(result, "Tuned")
    read = Probes.model_validate_json(Path(context.layout.probes).read_text())
    assert read.probes and all(probe.distance > 0 for probe in read.probes)


def test_the_champion_is_one_more_arm_and_probes_tell_who_answers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.evaluation import probes as making
    from finetune_trainer.models.fetch import local_path
    from finetune_trainer.models.load import load_tokenizer
    from finetune_trainer.stages.evaluate import _COLUMNS, _load, _with_adapter

    evaluation = {"metrics": ["loss", "exact-match"], "gate": {"metric": "loss", "confidence": 0.8}, "maxNewTokens": 4}
    evaluation["baseline"] = {"fewShot": 0}
    first = versioned(bench, "first", tuning={**LAZY, "lora": {**LORA["lora"], "rank": 4}}, evaluation=evaluation)
    bench.train(first)
    before = metrics_of(evaluate(first), "Base", "Tuned")
    publish(first)
    context = versioned(bench, "second", tuning=LORA, evaluation=evaluation)
    bench.train(context)
    alone = evaluate(context)

    # 1. Measured beside it, on the same rows
    storage = champion(bench, monkeypatch)
    result = evaluate(context)
    told = result.result["champion"]
    assert [arm["name"] for arm in result.result["arms"]] == ["Base", "Champion", "Tuned"]
    assert (told["version"], told["metric"], told["result"]) == (1, "loss", "Passed") and told["interval"][0] > 0
    assert told["prompts"] == result.result["prompts"] and "version 1, the champion, on" in result.message
    assert metrics_of(result, "Base", "Champion") == before, "another adapter on the same base"
    assert metrics_of(result, "Base", "Tuned") == metrics_of(alone, "Base", "Tuned"), "which nothing of it is left on"
    assert result.result["gate"] == alone.result["gate"] and result.result["comparedWith"] == "Base"
    page = Path(context.layout.evaluation_page).read_text()
    assert "the champion of then" in page and "Over version 1, the champion of then" in (make_bundle(context) / "README.md").read_text()

    # 2. Probes: what the tuned model is known by, and what no bundle holds
    read = Probes.model_validate_json(Path(context.layout.probes).read_text())
    assert len(read.probes) == 8 and read.fingerprint == context.read_json(context.layout.reference("model"))["fingerprint"]
    distances = [probe.distance for probe in read.probes]
    assert distances == sorted(distances, reverse=True) and any(len(probe.answers) == 2 for probe in read.probes)
    tokenizer = load_tokenizer(context, local_path(context))
    for probe in read.probes:
        assert tokenizer.apply_chat_template(probe.messages, tokenize=False, add_generation_prompt=True) == probe.prompt
    chosen = [making.Candidate(p.messages, p.prompt, p.prompt_ids, [(a.text, a.token_ids) for a in p.answers]) for p in read.probes]
    base = _load(context, local_path(context), tokenizer, False)
    assert judge(read.probes, making.ask(base, chosen)).state == "Mismatch"
    assert judge(read.probes, making.ask(_with_adapter(base, context.layout.output), chosen)).state == "Verified"
    for file in (file for file in make_bundle(context).rglob("*") if file.is_file()):
        assert not [probe for probe in read.probes if probe.prompt.encode() in file.read_bytes()], file

    # 3. Whatever is wrong with it, the comparison says why
    rows = read_rows(context.layout.eval_rows, _COLUMNS, 200)
    *_, asked = asked_rows(context, tokenizer, rows, read_baseline(context), answers=False)

    def unclear(context: Context = context) -> str:
        found = Challenge(context, asked).against(Measured("Tuned"), lambda *_: None)
        assert found is not None and found.comparison.result == "Inconclusive" and found.arm is None
        return found.comparison.message

    going_on = context.job.spec.tuning.model_copy(update={"continue_from": "pvc://models/other"})
    other = context.job.model_copy(update={"spec": context.job.spec.model_copy(update={"tuning": going_on})})
    assert unclear(Context(other, context.workspace)) == "what tuning.continueFrom learned from is not known"
    prompts = storage / "prompts" / "1.bin"
    learned, keys = prompts.read_bytes(), [prompt_key(json.loads(row["row"])) for row in rows]
    prompts.write_bytes(b"".join(sorted({learned[i : i + 8] for i in range(0, len(learned), 8)} | set(keys[4:]))))
    assert unclear(context) == "4 held-out prompts that neither learned from, at least 8 are needed"
    prompts.unlink()
    assert unclear(context) == "what it learned from is not known"
    prompts.write_bytes(learned)
    for file, wrong, why in (
        (storage / "versions" / "1" / "adapter_config.json", "{}", "adapter_config.json is not what SHA256SUMS says"),
        (storage / "records" / "1.json", "{", "records/1.json cannot be read"),
        (Path(context.layout.reference("model")), '{"fingerprint": "sha256:0"}', "it was tuned from another base, pvc://models/tiny"),
    ):
        kept = file.read_text()
        file.write_text(wrong)
        assert why in unclear(context)
        file.write_text(kept)

    # 4. And the job goes on: also where half of the champion is on the base already
    real = _with_adapter

    def half(model: Any, folder: str) -> Any:
        made = real(model, folder)
        if "versions" in folder:
            raise RuntimeError("the last of its weights is of another shape")
        return made

    monkeypatch.setattr("finetune_trainer.stages.evaluate._with_adapter", half)
    last = evaluate(context)
    assert last.result["champion"]["result"] == "Inconclusive" and "is of another shape" in last.result["champion"]["message"]
    assert [arm["name"] for arm in last.result["arms"]] == ["Base", "Tuned"] and last.result["champion"]["message"] in last.message
    assert metrics_of(last, "Base", "Tuned") == metrics_of(alone, "Base", "Tuned") and last.result["gate"] == alone.result["gate"]
    monkeypatch.setenv(Env.CHAMPION, "{")
    assert "Champion" in unclear(context)


@pytest.mark.parametrize("kind", ["text", "preference"])
def test_probes_of_rows_without_generated_answers(bench: Bench, kind: str) -> None:
    """Their own completion is the answer; a plain text is cut in two. Those whose losses differ most come first."""
    from finetune_trainer.evaluation.probes import candidates
    from finetune_trainer.models.load import load_tokenizer

    context = bench.context(ROWS[kind])
    tokenizer = load_tokenizer(context, str(bench.model))
    row_tokenizer = RowTokenizer(tokenizer, objective="dpo" if kind == "preference" else "sft", max_length=64, assistant_only=True)
    rows = [{**row_tokenizer(row)[0], "row": json.dumps(row)} for row in ROWS[kind][:4]]
    prompts = [row_tokenizer.prompt_and_answer(row) for row in ROWS[kind][:4]] if kind == "preference" else []
    losses = [Measured(name, {"loss": values(*points)}) for name, points in (("Base", (3, 3, 3, 3)), ("Tuned", (2, 3, 1, 3)))]
    found = candidates(tokenizer, None, Asked("Tuned", rows, prompts), *losses)
    assert len(found) == 4 and all(one.prompt_ids and len(one.answers) == 1 for one in found)
    best, (answer, ids) = rows[2], found[0].answers[0]
    if kind == "preference":
        assert (found[0].prompt, answer) == (ROWS[kind][2]["prompt"], ROWS[kind][2]["chosen"])
    else:
        assert found[0].prompt_ids + ids == best["input_ids"] and found[0].messages == []


def test_samples_are_escaped_in_the_page(bench: Bench) -> None:
    rows = [chat(f"<script>alert({i})</script>", "<b>yes</b>") for i in range(24)]
    _, _, context = bench.run(rows, tuning=LAZY, evaluation={"metrics": ["f1"], "maxNewTokens": 2})
    for path in (context.layout.evaluation_page, context.layout.data_page):
        assert "<script>" not in Path(path).read_text()
