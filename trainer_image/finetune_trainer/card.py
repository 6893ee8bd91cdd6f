"""The model card: https://huggingface.co/docs/hub/model-cards."""

from __future__ import annotations

import json
from typing import Any

from finetune_api.contract import JobFile


def model_card(job: JobFile, dataset: dict[str, Any], base: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    """README.md of the published result."""
    tuning, hyper = job.spec.tuning, job.spec.tuning.hyperparameters
    hub = job.spec.model.uri.removeprefix("hf://").partition("@")[0] if job.spec.model.uri.startswith("hf://") else None
    header = [
        "---",
        *([f"base_model: {json.dumps(hub)}"] if hub else []),
        "library_name: " + ("transformers" if tuning.method == "full" else "peft"),
        "pipeline_tag: text-generation",
        "tags: [finetune-operator, " + tuning.objective + ", " + tuning.method + "]",
        "---",
    ]
    lines = [
        *header,
        f"# {job.name}",
        "",
        f"{'A model' if tuning.method == 'full' else 'An adapter'} made by finetune-operator from `{job.spec.model.uri}`.",
        "",
        "## Evaluation",
        "",
        *_scores(evaluation),
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        f"| Base model | `{base['uri']}` (`{base['fingerprint'][:19]}`) |",
        f"| Data | {dataset['train']} rows, {dataset['tokens']} tokens, format {dataset['format']}, `{dataset['digest'][:19]}` |",
        f"| Method | {tuning.objective}, {tuning.method} |",
        f"| Learning rate | {hyper.learning_rate:g}, {hyper.lr_scheduler_type} |",
        f"| Batch | {hyper.global_batch_size} rows a step |",
        f"| Length | {hyper.max_length} tokens |",
        f"| Seed | {hyper.seed} |",
        "",
        "## Use",
        "",
        "```python",
        *_usage(job),
        "```",
        "",
        "`finetune.json` holds the full lineage, `SHA256SUMS` the digests of all files.",
    ]
    return "\n".join(lines) + "\n"


def _scores(evaluation: dict[str, Any] | None) -> list[str]:
    if evaluation is None:
        return ["Not evaluated."]
    rows = [f"| {metric} | {evaluation['base'][metric]:.4g} | {evaluation['tuned'][metric]:.4g} |" for metric in evaluation["base"]]
    return [f"On {evaluation['examples']} held-out rows that were not trained on.", "", "| Metric | Base | Tuned |", "|---|---|---|", *rows]


def _usage(job: JobFile) -> list[str]:
    if job.spec.tuning.method == "full":
        return [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("PATH")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        ]
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'base = AutoModelForCausalLM.from_pretrained("BASE")',
        'model = PeftModel.from_pretrained(base, "PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
    ]
