"""What is legal in a FineTuneJob but rarely wise: warnings at apply, and by `finetune validate`. Pure.

The field's advice: try prompting and retrieval first, start with 50 to 1,000 good examples, keep an evaluation set apart
(https://platform.openai.com/docs/guides/fine-tuning-best-practices); learning rates as in the papers of each method.
"""

from __future__ import annotations

from .spec import VIRTUAL_TOKEN_METHODS, WHOLE_MODEL_METHODS, FineTuneJobSpec
from .uris import parse_uri

_FEW_EXAMPLES = 50
_MANY_EPOCHS = 10


def _usual_rates(spec: FineTuneJobSpec) -> tuple[float, float, str]:
    """(least, most, for what): beyond them something is nearly always wrong."""
    tuning = spec.tuning
    if tuning.objective in ("dpo", "kto", "orpo", "grpo"):
        return 1e-8, 1e-4, f"objective {tuning.objective}"
    if tuning.method in VIRTUAL_TOKEN_METHODS or tuning.method == "ia3":
        return 1e-5, 0.5, f"method {tuning.method}"
    if tuning.method in WHOLE_MODEL_METHODS:
        return 1e-7, 2e-4, f"method {tuning.method}"
    return 1e-6, 2e-3, f"method {tuning.method}"


def advice(spec: FineTuneJobSpec) -> list[str]:
    """Warnings, each naming the field; empty when nothing is unusual."""
    hyper, found = spec.tuning.hyperparameters, []
    least, most, what = _usual_rates(spec)
    if hyper.learning_rate > most:
        found.append(f"spec.tuning.hyperparameters.learningRate {hyper.learning_rate:g} is very high for {what} (seldom above {most:g})")
    elif hyper.learning_rate < least:
        found.append(f"spec.tuning.hyperparameters.learningRate {hyper.learning_rate:g} is very low for {what} (seldom below {least:g})")
    if hyper.max_steps is None and hyper.epochs > _MANY_EPOCHS:
        found.append(f"spec.tuning.hyperparameters.epochs {hyper.epochs:g}: so many passes mostly learn the rows by heart; 1 to 5 is usual")
    if spec.dataset.eval is None:
        found.append("spec.dataset.eval is not set: nothing will tell whether the model got better; try {splitFraction: 0.1}")
    elif spec.evaluation is None:
        found.append("spec.evaluation is not set: the tuned model is not compared with its base")
    if spec.publish and (spec.evaluation is None or spec.evaluation.gate is None):
        found.append("spec.publish without spec.evaluation.gate: the result is published even when it is worse than its base")
    if spec.dataset.checks.min_examples < _FEW_EXAMPLES:
        found.append(
            f"spec.dataset.checks.minExamples {spec.dataset.checks.min_examples}: below {_FEW_EXAMPLES} examples, prompting or retrieval "
            "is mostly better than tuning"
        )
    if spec.distribution.gpus_per_node > 0 and spec.resources.gpu_memory is None:
        found.append("spec.resources.gpuMemory is not set: whether the model fits its GPUs is not checked before they are taken")
    base = parse_uri(spec.model.uri)
    if base.scheme == "hf" and not base.revision:
        found.append("spec.model.uri names no revision: the model may change between two runs; add @ and a commit")
    return found
