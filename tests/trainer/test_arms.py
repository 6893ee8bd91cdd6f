"""The arms of an evaluation: what the base is told, what is measured, what it costs; and what sharing and chunks must not change."""

from __future__ import annotations

import json
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune_api.contract import TERMINATION_MESSAGE_LIMIT
from finetune_api.evaluation_status import EvaluationStatus
from finetune_api.spec import Evaluation
from finetune_trainer.data.limits import Limits
from finetune_trainer.evaluation import gate, metrics
from finetune_trainer.evaluation.arms import Prompting, asked_rows, read_baseline
from finetune_trainer.evaluation.measure import Asked, Measured, part_asked, part_measured, token_values
from finetune_trainer.models.generate import _continued, batches
from finetune_trainer.models.likelihood import learned_values
from finetune_trainer.models.load import load_tokenizer
from finetune_trainer.models.shared_prefix import common_prefix, share
from finetune_trainer.process.errors import UserError
from finetune_trainer.stages.evaluate import evaluate
from finetune_trainer.stages.prepare import prepare
from tests.trainer.conftest import COLOURS, ROWS, Bench, chat

LAZY = {"lora": {"rank": 8, "dropout": 0}, "hyperparameters": {"maxSteps": 1, "learningRate": 1e-9, "globalBatchSize": 16, "maxLength": 64}}
LOSS: dict[str, Any] = {"metrics": ["loss"]}


def told(text: str, rows: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """The rows with a system text."""
    return [{"messages": [{"role": "system", "content": text}, *row["messages"]]} for row in rows or ROWS["messages"]]


def asked(bench: Bench, rows: list[dict[str, Any]] | None, baseline: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    """What each arm is asked, by its name, as prepare decided it."""
    from finetune_trainer.data.store import read_rows
    from finetune_trainer.stages.evaluate import _COLUMNS

    spec.setdefault("tuning", LAZY)
    context = bench.context(rows, evaluation={**LOSS, "baseline": baseline or {}, **spec.pop("evaluation", {})}, **spec)
    message = prepare(context).message
    from finetune_trainer.models.fetch import local_path

    tokenizer = load_tokenizer(context, local_path(context))
    held_out = read_rows(context.layout.eval_rows, _COLUMNS, 200)
    found: dict[str, Any] = {arm.name: arm for arm in asked_rows(context, tokenizer, held_out, read_baseline(context), answers=True)}
    return {**found, "message": message, "tokenizer": tokenizer}


def learned(row: dict[str, Any]) -> list[int]:
    return [label for label in row["labels"] if label != -100]


def test_four_arms_measure_the_same_tokens(bench: Bench) -> None:
    """The answers are the same to the token; what stands before them is what the arm says, and none of it is learned."""
    found = asked(bench, ROWS["messages"], {"systemPrompt": "name what it is", "fewShot": 4})
    assert [name for name in found if name[0].isupper()] == ["Base", "Instructed", "FewShot", "Tuned"]
    for own, *others in zip(*(found[name].rows for name in ("Tuned", "Base", "Instructed", "FewShot")), strict=True):
        assert all(learned(row) == learned(own) for row in others)
        assert all(len(row["input_ids"]) == len(row["labels"]) for row in others)
    base, instructed, few = (found[name].prompts[0][0] for name in ("Base", "Instructed", "FewShot"))
    assert "name what it is" not in base and "name what it is" in instructed and "name what it is" in few
    assert few.count("<|assistant|>") == 5 and found["FewShot"].shots == 4
    answers = {answer for _, answer in COLOURS}
    assert sum(few.count(f"<|assistant|>{answer}") for answer in answers) == 4, "examples with their answers"


def test_the_examples_come_from_the_training_rows_alone(bench: Bench) -> None:
    found = asked(bench, ROWS["messages"], {"fewShot": 8})
    few, held_out = found["FewShot"].prompts[0][0], {prompt for prompt, _ in found["Base"].prompts}
    assert found["FewShot"].shots == 8
    own = found["Base"].prompts[0][0]
    shown = few[: -len(own)] if few.endswith(own) else few
    assert not [prompt for prompt in held_out if prompt in shown], "a held-out question is no example"


def test_the_rows_own_system_text_is_the_instruction(bench: Bench) -> None:
    """The base as it is goes without; the tuned model is asked as it was trained."""
    found = asked(bench, told("answer what it is"), {"fewShot": 0})
    assert list(found)[:3] == ["Base", "Instructed", "Tuned"]
    assert "answer what it is" not in found["Base"].prompts[0][0]
    assert found["Instructed"].prompts == found["Tuned"].prompts and "answer what it is" in found["Tuned"].prompts[0][0]


def test_another_system_text_than_the_rows_own_is_told(bench: Bench) -> None:
    found = asked(bench, told("answer what it is"), {"systemPrompt": "say a word", "fewShot": 0})
    assert "serve it as trained" in found["message"]
    assert "say a word" in found["Instructed"].prompts[0][0] and "answer what it is" not in found["Instructed"].prompts[0][0]
    assert "answer what it is" in found["Tuned"].prompts[0][0]
    assert "serve it as trained" not in asked(bench, told("say a word"), {"systemPrompt": "say a word"})["message"]


def test_held_out_rows_with_another_system_text_are_counted(bench: Bench) -> None:
    (bench.data / "eval.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in told("to serve", [chat(f"is {i} new", "yes") for i in "abc"]))
    )
    dataset = {"train": {"uri": "pvc://rows/train.jsonl"}, "eval": {"uri": "pvc://rows/eval.jsonl"}, "checks": {"minExamples": 1}}
    assert "3 evalSystemPromptDiffers" in asked(bench, told("to train"), dataset=dataset)["message"]


def test_rows_that_do_not_agree_keep_their_system_texts(bench: Bench) -> None:
    rows = [told(f"be {i}", [row])[0] for i, row in enumerate(ROWS["messages"])]
    found = asked(bench, rows, {"fewShot": 4})
    assert list(found)[:3] == ["Base", "FewShot", "Tuned"]
    for base, few in zip(found["Base"].prompts, found["FewShot"].prompts, strict=True):
        assert base[0].split("<|user|>")[0] == few[0].split("<|user|>")[0], "its own system text stands first"


NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize("template", [NO_SYSTEM, NO_SYSTEM.replace("{{ raise_exception('no system role') }}", "{% continue %}")])
def test_a_template_without_system_turns_gets_the_text_in_the_first_turn(bench: Bench, template: str) -> None:
    found = asked(bench, ROWS["messages"], {"systemPrompt": "name what it is", "fewShot": 4}, tuning={**LAZY, "chatTemplate": template})
    assert found["Instructed"].prompts[0][0].startswith("<|user|>name what it is\n\n")
    assert found["FewShot"].prompts[0][0].count("name what it is") == 1


ONE_EXCHANGE = "{% if messages | length > 2 %}{{ raise_exception('one exchange') }}{% endif %}" + NO_SYSTEM


@pytest.mark.parametrize("examples", ["auto", 4])
def test_what_a_template_cannot_say_is_left_out_with_a_note(bench: Bench, examples: str | int) -> None:
    found = asked(bench, ROWS["messages"], {"fewShot": examples}, tuning={**LAZY, "chatTemplate": ONE_EXCHANGE})
    assert list(found)[:2] == ["Base", "Tuned"] and "FewShot was left out: " in found["message"] and "one exchange" in found["message"]


@pytest.mark.parametrize(
    ("rows", "objective", "first"),
    [
        ([{"prompt": f"{q}:", "completion": a} for q, a in COLOURS], "sft", "name it\n\n"),
        (ROWS["preference"], "dpo", "name it\n\n"),
        (ROWS["unpaired-preference"], "kto", "name it\n\n"),
    ],
)
def test_rows_of_text_and_of_preferences_have_arms_as_well(bench: Bench, rows: list[dict[str, Any]], objective: str, first: str) -> None:
    tuning = {"objective": objective, "lora": {"rank": 8, "dropout": 0}, "hyperparameters": {**LAZY["hyperparameters"], "maxLength": 48}}
    found = asked(bench, rows, {"systemPrompt": "name it", "fewShot": 4}, tuning=tuning)
    tokenizer = found["tokenizer"]
    for own, few in zip(found["Tuned"].rows, found["FewShot"].rows, strict=True):
        assert learned(few) == learned(own) and len(few["input_ids"]) > len(own["input_ids"])
        if own.get("prompt_ids") is not None:
            assert tokenizer.decode(few["prompt_ids"]).replace(" ", "").startswith(first.replace(" ", ""))
            assert few["prompt_ids"][-len(own["prompt_ids"]) :] == own["prompt_ids"]
            assert (
                few["chosen_ids" if objective == "dpo" else "completion_ids"]
                == own["chosen_ids" if objective == "dpo" else "completion_ids"]
            )


def test_plain_text_has_two_arms(bench: Bench) -> None:
    assert asked_names(bench, ROWS["text"], {"objective": "pretrain"}) == ["Base", "Tuned"]


def asked_names(bench: Bench, rows: list[dict[str, Any]], tuning: dict[str, Any]) -> list[str]:
    context = bench.context(rows, tuning={**LAZY, **tuning}, evaluation=LOSS)
    prepare(context)
    return [*(arm.name for arm in read_baseline(context).arms), "Tuned"]


def test_rows_that_were_cut_are_measured_as_they_were_trained(bench: Bench) -> None:
    """maxLength cuts an answer: all arms measure what is left of it."""
    rows = [chat(f"what is {i}", "yes no " * 10) for i in range(40)]
    tuning = {**LAZY, "hyperparameters": {**LAZY["hyperparameters"], "maxLength": 24}}
    found = asked(bench, rows, {"systemPrompt": "name what it is", "fewShot": 4}, tuning=tuning)
    for own, few in zip(found["Tuned"].rows, found["FewShot"].rows, strict=True):
        assert learned(own) == learned(few) and len(own["input_ids"]) == 24


def test_where_prompts_are_learned_too_answers_alone_are_compared(bench: Bench) -> None:
    found = asked(bench, ROWS["messages"], {"systemPrompt": "name it", "fewShot": 0}, tuning={**LAZY, "assistantOnlyLoss": False})
    for tuned, instructed in zip(found["Tuned"].rows, found["Instructed"].rows, strict=True):
        assert learned(tuned) == learned(instructed) and tuned["labels"][0] == -100


@pytest.mark.parametrize(
    ("baseline", "reason", "match"),
    [
        ({"systemPrompt": "be <|user|> good"}, "BadSystemPrompt", "special token"),
        (
            {"systemPrompt": "word " * 4000},
            "PromptTooLong",
            r"evaluation.baseline.systemPrompt: a held-out row with it is \d+ tokens longer",
        ),
        ({"fewShot": 64}, "NoExamples|PromptTooLong", "evaluation.baseline.fewShot"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_prepare(bench: Bench, baseline: dict[str, Any], reason: str, match: str) -> None:
    with pytest.raises(UserError, match=match) as refused:
        asked(bench, ROWS["messages"], baseline)
    assert refused.value.reason in reason.split("|")


def test_auto_takes_the_most_examples_that_fit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.stages import prepare as stage

    most = asked(bench, ROWS["messages"])["FewShot"]
    assert most.shots == 8
    longest, write = max(len(row["input_ids"]) for row in most.rows), stage.write_baseline
    for room, shots in ((longest + 20, 8), (longest - 20, 4), (20, 0)):
        limits = Limits(vocabulary=500, context=room)
        monkeypatch.setattr(stage, "write_baseline", lambda context, tokenizer, _, limits=limits: write(context, tokenizer, limits))
        found = asked(bench, None)
        assert (found["FewShot"].shots if "FewShot" in found else 0) == shots, room


def test_a_turn_of_an_arm() -> None:
    row = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert Prompting("Tuned").apply(row) == row
    assert Prompting("Base", bare=True).apply(row)["messages"] == row["messages"][1:]
    assert Prompting("Instructed", system="t").apply(row)["messages"][0] == {"role": "system", "content": "t"}
    assert Prompting("Instructed", system="t", folded=True).apply(row)["messages"][0] == {"role": "user", "content": "t\n\nq"}
    assert Prompting("FewShot", system="t", examples=("x y",)).apply({"prompt": "p", "completion": "c"})["prompt"] == "t\n\nx y\n\np"


# whole evaluations


def test_all_arms_are_told_with_what_they_cost(bench: Bench) -> None:
    evaluation = {"metrics": ["loss", "exact-match"], "maxNewTokens": 4, "gate": {}, "baseline": {"systemPrompt": "name what it is"}}
    context = bench.context(ROWS["messages"], tuning=LAZY, evaluation=evaluation)
    bench.train(context)
    result = evaluate(context)
    status = EvaluationStatus.model_validate(result.result)
    assert [arm.name for arm in status.arms] == ["Base", "Instructed", "FewShot", "Tuned"] and status.prompts == status.examples == 18
    sent = {arm.name: arm.prompt_tokens or 0 for arm in status.arms}
    assert sent["Base"] == sent["Tuned"] < sent["Instructed"] < sent["FewShot"]
    assert all(arm.latency_seconds and arm.answer_tokens for arm in status.arms)
    report = context.read_json(context.layout.evaluation_report)
    assert set(report["samples"][0]["answers"]) == set(sent)
    losses = {arm.name: arm.metrics["loss"] for arm in status.arms}
    assert status.compared_with == min((loss, name) for name, loss in losses.items() if name != "Tuned")[1]
    assert status.gate == "NotPassed"


def _measured(name: Any, losses: Any, shots: int = 0) -> Measured:
    return Measured(name, {"loss": np.array([[loss, 1.0] for loss in losses])}, shots=shots)


def test_the_gate_compares_with_the_best_of_the_base() -> None:
    """Better than the base as it is, not better than the base with examples."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, 40)
    arms = [_measured("Base", 3 + noise), _measured("FewShot", 1 + noise, 4), _measured("Tuned", 1 + rng.permutation(noise))]
    best = gate.decide(Evaluation.model_validate({"gate": {}}), 1, arms)
    assert (best.status.compared_with, best.status.gate, best.reason) == ("FewShot", "NotPassed", "PromptingMayDo")
    assert "the base with 4 examples is not measurably worse" in best.message
    bare = gate.decide(Evaluation.model_validate({"gate": {"compareWith": "base"}}), 1, arms)
    assert (bare.status.compared_with, bare.status.gate, bare.reason) == ("Base", "Passed", "PromptingMayDo")
    missing = gate.decide(Evaluation.model_validate({"gate": {"compareWith": "instructed"}}), 1, arms)
    assert missing.status.compared_with == "Base", "there is no such arm"
    arms[-1] = _measured("Tuned", 0.2 + noise)
    assert gate.decide(Evaluation.model_validate({"gate": {}}), 1, arms).reason == "Compared"


def test_a_base_whose_loss_is_no_number_is_not_the_best() -> None:
    arms = [_measured("Base", [float("nan")] * 20), _measured("FewShot", [2.0, 3.0] * 10, 4), _measured("Tuned", [1.0, 1.5] * 10)]
    verdict = gate.decide(Evaluation.model_validate({"gate": {}}), 1, arms)
    assert verdict.status.compared_with == "FewShot" and verdict.status.gate == "Passed"
    assert "loss" not in verdict.status.arms[0].metrics, "no number that a status could hold"


@pytest.mark.parametrize("kind", ["binary", "skewed", "clustered"])
@pytest.mark.parametrize("prompts", [1, 5, 15, 60])
def test_a_gate_holds_its_error_rate(monkeypatch: pytest.MonkeyPatch, kind: str, prompts: int) -> None:
    """Two models without any difference: below the least number of prompts it never passes, above it in at most 2.5 % of cases
    (here 5 %, which 300 experiments reach by chance in one of three hundred).
    """
    monkeypatch.setattr(metrics, "_RESAMPLES", 400)
    metric, spec = ("exact-match" if kind == "binary" else "loss"), Evaluation.model_validate({"gate": {}})
    spec = Evaluation.model_validate({"metrics": [metric], "gate": {"metric": metric}})
    rng, passed, gated = np.random.default_rng(7), 0, set()
    for seed in range(300):
        size = 4 if kind == "clustered" else 1
        if kind == "binary":
            sides = [(rng.random(prompts) < 0.5).astype(float) for _ in range(2)]
        else:
            level = rng.lognormal(0, 1, prompts)
            sides = [np.repeat(level * rng.lognormal(0, 0.3, prompts), size) for _ in range(2)]
        arms = [Measured(name, {metric: np.array([[v, 1.0] for v in side])}) for name, side in zip(("Base", "Tuned"), sides, strict=True)]  # type: ignore[arg-type]
        verdict = gate.decide(spec, seed, arms, np.repeat(np.arange(prompts), size).tolist())
        passed += verdict.status.gate == "Passed"
        gated.add(verdict.status.gate)
    if prompts < metrics.least_prompts(0.95):
        assert gated == {"Inconclusive"}
    else:
        assert passed <= 0.05 * 300 and "Inconclusive" not in gated, passed


def test_a_gate_finds_a_large_effect_at_the_least_number_of_prompts() -> None:
    """The power that the number is made for: 80 %, here at least 70 of a hundred."""
    least, rng = metrics.least_prompts(0.95), np.random.default_rng(3)
    assert least == 15
    passed = 0
    for seed in range(100):
        base = rng.normal(10, 1, least)
        arms = [_measured("Base", base), _measured("Tuned", base - rng.normal(0.8, 1, least))]
        passed += gate.decide(Evaluation.model_validate({"gate": {}}), seed, arms).status.gate == "Passed"
    assert passed >= 70, passed


def test_rows_of_one_prompt_are_drawn_together() -> None:
    """Eight copies of each row tell nothing more: the interval stays as wide, where rows alone would make it a third."""
    rng = np.random.default_rng(0)
    base, tuned = (np.stack([rng.lognormal(0, 0.5, 20), np.ones(20)], axis=1) for _ in range(2))
    many = [np.repeat(side, 8, axis=0) for side in (base, tuned)]
    low, high = metrics.interval("loss", base, tuned, 0.95, 1)
    together = metrics.interval("loss", *many, 0.95, 1, np.repeat(np.arange(20), 8).tolist())
    assert together == pytest.approx((low, high))
    alone = metrics.interval("loss", *many, 0.95, 1)
    assert alone[1] - alone[0] < 0.5 * (high - low)


def test_the_last_words_hold_five_arms_with_everything_measured() -> None:
    """The kubelet keeps 4096 bytes; what was found is never cut."""
    from typing import get_args

    from finetune_api.contract import StageResult, read_stage_result
    from finetune_api.spec import Metric

    spec = Evaluation.model_construct(metrics=list(get_args(Metric)), gate=None, forgetting=None)
    tasks = {f"leaderboard_task_{i}/acc_norm": 0.123456 for i in range(16)}
    arms = []
    for name in ("Base", "Instructed", "FewShot", "Tuned"):
        values = {m: np.array([[1.2345678, 1.0]] * 20) for m in spec.metrics}
        arms.append(
            Measured(
                name,
                values,
                shots=8,
                prompt_tokens=1234.5,
                answer_tokens=99.9,
                latency=12.3,
                scores=tasks if name in ("Base", "Tuned") else {},
            )
        )  # type: ignore[arg-type]
    beside = gate.challenge(spec, 1, 12345, Measured("Champion", arms[0].values, [], 0, 1234.5, 99.9, 12.3), arms[-1])
    assert beside.arm is not None
    verdict = gate.decide(spec, 1, arms, None, beside)
    words = StageResult(
        reason=verdict.reason, message=verdict.message[:3000], result=verdict.status.model_dump(by_alias=True, exclude_none=True)
    ).dumps()
    assert len(words) <= TERMINATION_MESSAGE_LIMIT
    found = read_stage_result(words)
    assert found is not None and len(EvaluationStatus.model_validate(found.result).arms) == 5


def test_a_part_of_what_was_measured_is_as_if_it_had_been_asked_alone() -> None:
    """Rows without a good answer have no value; a preference among unpaired ones is one over the bad answers of that part."""
    rows = [{"label": label} for label in (True, False, True, False, True)]
    likelihoods = np.array([0.5, 0.4, 0.1, 0.9, 0.7])
    whole = Measured("Tuned", {"loss": np.array([[1.0, 1], [2.0, 1], [3.0, 1]])}, ["a", "b", "c"], likelihoods=likelihoods)
    part = part_measured(whole, rows, [0, 1, 4])
    assert part.values["loss"][:, 0].tolist() == [1.0, 3.0] and part.answers == ["a", "c"]
    assert part.values["preference-accuracy"][:, 0].tolist() == [1.0, 1.0], "one bad answer, less likely than both"
    assert np.isnan(part_measured(whole, rows, [0, 4]).values["preference-accuracy"]).any(), "nothing to compare with"
    asked = Asked("Tuned", rows, [("p", "a"), ("q", "b"), ("r", "c")])
    alone = part_asked("Champion", asked, [0, 1, 4])
    assert alone.rows == [rows[0], rows[1], rows[4]] and alone.prompts == [("p", "a"), ("r", "c")]


# sharing and chunks


def small(kind: str, vocabulary: int = 500) -> Any:
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        GraniteConfig,
        GraniteForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        OPTConfig,
        OPTForCausalLM,
    )

    sizes: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=32)),  # soft-capped logits, sliding windows
        "granite": lambda: GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0)),
        "opt": lambda: OPTForCausalLM(OPTConfig(**sizes, ffn_dim=384, word_embed_proj_dim=128)),  # passes its base by
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=128, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)),
    }
    found = models[kind]().eval()
    for parameter in found.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)  # answers that differ
    return found


class Allocated(TorchDispatchMode):
    """How many bytes of new tensors are alive, and were at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self._seen = 0, 0, set[int]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self._seen:
                size = tensor.untyped_storage().nbytes()
                self._seen.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self._gone, key, size)
        return found

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        self._seen.discard(key)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "gpt2", "opt"])
def test_losses_take_the_memory_of_a_forward_pass_without_logits(kind: str) -> None:
    """And are the same to the last digits as from logits of all positions, soft-capping and scaling included."""
    model = small(kind, 32_768)
    ids = torch.randint(3, 32_768, (4, 768))
    mask, learned = torch.ones_like(ids), torch.rand(4, 768) < 0.6
    targets = ids.roll(-1, dims=1)
    learned[:, -1] = False
    with torch.inference_mode():
        with Allocated() as bare:
            model(input_ids=ids, attention_mask=mask, logits_to_keep=1)
        with Allocated() as chunked:
            nll, right = learned_values(model, targets, learned, input_ids=ids, attention_mask=mask)
        with Allocated() as whole:
            logits = model(input_ids=ids, attention_mask=mask).logits.float()
        wanted = torch.nn.functional.cross_entropy(logits[learned], targets[learned], reduction="none")
    assert chunked.peak < 1.2 * bare.peak < whole.peak, (chunked.peak, bare.peak, whole.peak)
    assert torch.allclose(nll, wanted, atol=1e-3) and torch.equal(right, logits.argmax(-1)[learned] == targets[learned])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "gpt2", "opt"])
def test_what_is_shared_changes_nothing(kind: str) -> None:
    """Losses and answers of prompts with a common beginning equal those of each prompt alone; where they would not, nothing is shared."""
    model = small(kind)
    head = torch.randint(3, 500, (60,)).tolist()
    prompts = [head + torch.randint(3, 500, (length,)).tolist() for length in (3, 9, 20)]
    prefix = share(model, prompts)
    assert (prefix is None) == (kind == "gemma2"), "sliding windows depend on where padding stands"
    rows = [{"input_ids": p, "labels": [-100] * (len(p) - 2) + p[-2:]} for p in prompts]
    together, _ = token_values(model, rows, 0)
    alone = np.concatenate([token_values(model, [row], 0)[0] for row in rows])
    assert np.allclose(together, alone, atol=1e-3)
    output, start = _continued(model, 0, prompts, prefix, 8)
    for answer, prompt in zip(output[:, start:].tolist(), prompts, strict=True):
        single, begin = _continued(model, 0, [prompt], None, 8)
        own = single[0, begin:].tolist()
        assert answer[: len(own)] == own


def test_what_is_common_and_what_fits_into_a_batch() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5], [1, 2]]) == 1, "each keeps a token of its own"
    assert common_prefix([[1, 2], [3]]) == common_prefix([[1, 2]]) == 0
    parts = list(batches([10_000, 5, 7, 10_000, 6]))
    assert parts == [[1, 4, 2], [0], [3]]
    assert max(map(len, batches([1] * 200))) == 64
