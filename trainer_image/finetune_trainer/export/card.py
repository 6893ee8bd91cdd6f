"""The model card: https://huggingface.co/docs/hub/model-cards."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from finetune_api.contract import JobFile
from finetune_api.evaluation_status import PROMPTING_MAY_DO
from finetune_api.spec import WHOLE_MODEL_METHODS
from finetune_api.status import ExportedForm

from .usage import Usage


@dataclass(frozen=True)
class CardFacts:
    """What a card tells."""

    job: JobFile
    dataset: dict[str, Any]
    base: dict[str, Any]
    evaluation: dict[str, Any] | None
    parents: list[dict[str, Any]]
    versions: dict[str, str]
    plan: dict[str, Any] | None
    usage: Usage
    forms: list[ExportedForm] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether the result is a model, not an adapter."""
        return self.job.spec.tuning.method in WHOLE_MODEL_METHODS

    @property
    def hub(self) -> str | None:
        """The base's repository on the Hugging Face hub."""
        uri = self.job.spec.model.uri
        return uri.removeprefix("hf://").partition("@")[0] if uri.startswith("hf://") else None


def model_card(facts: CardFacts) -> str:
    """README.md of the published result."""
    job, tuning, hyper = facts.job, facts.job.spec.tuning, facts.job.spec.tuning.hyperparameters
    task = "text-classification" if tuning.objective == "reward" else "text-generation"
    lines = [
        "---",
        *([f"base_model: {json.dumps(facts.hub)}"] if facts.hub else []),
        "library_name: " + ("transformers" if facts.whole else "peft"),
        f"pipeline_tag: {task}",
        f"tags: [finetune-operator, {tuning.objective}, {tuning.method}]",
        "---",
        f"# {job.name}",
        "",
        f"{'A model' if facts.whole else 'An adapter'} made by finetune-operator from `{job.spec.model.uri}`.",
        "",
        "## Evaluation",
        "",
        *_scores(facts.evaluation),
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        f"| Base model | `{facts.base['uri']}` (`{facts.base['fingerprint'][:19]}`) |",
        *[f"| Goes on from | `{parent['uri']}` (`{parent['fingerprint'][:19]}`) |" for parent in facts.parents],
        f"| Data | {facts.dataset['train']} rows, {facts.dataset['tokens']} tokens, format {facts.dataset['format']}, `{facts.dataset['digest'][:19]}` |",
        f"| Method | {tuning.objective}, {tuning.method} |",
        f"| Learning rate | {hyper.learning_rate:g}, {hyper.lr_scheduler_type}, {hyper.optimizer} |",
        f"| Batch | {hyper.global_batch_size} rows a step |",
        f"| Length | {hyper.max_length} tokens{', packed' if 'packed sequences a step' in (facts.plan or {}).get('reason', '') else ''} |",
        *(
            [f"| Steps | {facts.plan['totalSteps']} on {facts.plan['worldSize']} process(es), {facts.plan['strategy']} |"]
            if facts.plan
            else []
        ),
        f"| Seed | {hyper.seed} |",
        f"| Libraries | {', '.join(f'{name} {number}' for name, number in facts.versions.items())} |",
        "",
        *_forms(facts.forms),
        "## Use",
        "",
        *_served(facts.evaluation),
        *facts.usage.lines(),
        "",
        "`finetune.json` holds the full lineage, `SHA256SUMS` the digests of all files.",
    ]
    return "\n".join(lines) + "\n"


def _scores(evaluation: dict[str, Any] | None) -> list[str]:
    if evaluation is None:
        return ["Not evaluated."]
    arms = evaluation["arms"]
    titles = {
        "Base": "Base",
        "Instructed": "Base, instructed",
        "FewShot": f"Base, {next((arm['shots'] for arm in arms if arm['name'] == 'FewShot'), 0)} examples",
        "Champion": "Champion of then",
        "Tuned": "Tuned",
    }
    metrics = list(dict.fromkeys(metric for arm in arms for metric in arm["metrics"]))
    rows = [_row(metric, [arm["metrics"].get(metric) for arm in arms]) for metric in metrics]
    costs = {"promptTokens": "Tokens of a prompt", "answerTokens": "Tokens of an answer", "latencySeconds": "Seconds of a request"}
    rows += [_row(title, [arm.get(key) for arm in arms]) for key, title in costs.items() if any(key in arm for arm in arms)]
    span = evaluation.get("interval") or []
    gain = f"Improvement over {titles[evaluation['comparedWith']].lower()} {evaluation['improvement']:.4g}"
    gain += (f", between {span[0]:.4g} and {span[1]:.4g}" if span else "") + "."
    told = f"On {evaluation['examples']} held-out rows of {evaluation['prompts']} prompts that were not trained on. {gain}"
    if evaluation["reason"] == PROMPTING_MAY_DO:
        told += " The base with an instruction or examples is not measurably worse: prompting may do."
    if champion := evaluation.get("champion"):
        told += f" {_against(champion)}"
    return [told, "", "| Metric | " + " | ".join(titles[arm["name"]] for arm in arms) + " |", "|---" * (len(arms) + 1) + "|", *rows]


def _against(champion: dict[str, Any]) -> str:
    """What the comparison with the champion of then found."""
    if not champion.get("interval"):
        return f"Version {champion['version']}, the champion of then, could not be compared with: {champion.get('message', '')}."
    low, high = champion["interval"]
    found = f"improvement {champion['improvement']:.4g}, between {low:.4g} and {high:.4g} ({champion['metric']})"
    return f"Over version {champion['version']}, the champion of then, on {champion['prompts']} prompts that neither learned from: {found}."


def _forms(forms: list[ExportedForm]) -> list[str]:
    if not forms:
        return []
    return [
        "## Forms",
        "",
        "Each was asked held-out prompts: how many of its greedy answers are the tuned model's, and how far its log-probabilities are from "
        "the tuned model's and those of the base from them, in nats a token.",
        "",
        "| Form | MB | Same answers | Difference | Base's |",
        "|---|---|---|---|---|",
        *(
            f"| `{form.name}` | {form.bytes / 1e6:.1f} | "
            + (
                f"{form.equal_answers} of {form.probes} | {form.difference:.3g} | {form.distance:.3g} |"
                if form.probes
                else "not asked | | |"
            )
            for form in forms
        ),
        "",
    ]


def _row(name: str, numbers: list[float | None]) -> str:
    return f"| {name} | " + " | ".join("" if number is None else f"{number:.4g}" for number in numbers) + " |"


def _served(evaluation: dict[str, Any] | None) -> list[str]:
    """The system text that the model was trained with, where all rows agree on one."""
    system = (evaluation or {}).get("systemPrompt") or ""
    if not system:
        return []
    fence = "`" * (max(3, *(len(run) + 1 for run in re.findall("`+", system)), 0))
    return ["Serve it with the system text that it was trained with:", "", f"{fence}text", system, fence, ""]
