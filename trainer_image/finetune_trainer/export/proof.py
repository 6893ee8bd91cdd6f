"""Whether an exported form is the model that was tuned: it is asked the probes, and has to pass as a replica does.

Probes are those that evaluate kept in the workspace. A job that evaluates nothing gets its own here, of its first held-out rows (of its
training rows where none are held out): what the tuned model answers greedily, and how likely tuned model and base find it.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_api.probing import MOST_TOKENS, PROBES, Probe, ProbeAnswer, Probes, judge
from finetune_api.status import ExportedForm

from ..data.store import read_rows
from ..data.tokens import IGNORED
from ..job.context import Context
from ..models.likelihood import learned_values
from ..process.errors import InfrastructureError, UserError

_ASK_SECONDS = 1800
_MOST_PROMPT = 2048
"""Tokens: longer prompts are left out of what is asked here."""
_TEXT_PROMPT = 16
"""Tokens of a plain text that stand for its prompt."""
Question = tuple[tuple[int, ...], tuple[int, ...]]
"""(tokens of the prompt, tokens of the answer)"""


@dataclass(frozen=True)
class Answered:
    """What a model or a form says to one question."""

    logprobs: list[float]
    greedy: bool
    """Whether greedy decoding gives just this answer."""


Said = dict[Question, Answered]


def read_probes(context: Context) -> list[Probe] | None:
    """The probes that evaluate kept, or None."""
    path = Path(context.layout.probes)
    return Probes.model_validate_json(path.read_text()).probes if path.exists() else None


@dataclass(frozen=True)
class Exam:
    """What every form is asked."""

    probes: list[Probe]
    greedy: list[Question]
    """To the prompt of each probe, what the tuned model answers greedily: of a probe that evaluate made it may be another answer."""

    @property
    def questions(self) -> list[Question]:
        """All of it, each once."""
        return list(dict.fromkeys([*(question for probe in self.probes for question in _of(probe)), *self.greedy]))


def make_exam(probes: list[Probe], tuned: Any, tokenizer: Any) -> Exam:
    """The probes, and the answers of the tuned model that is loaded."""
    first = [_of(probe)[0] for probe in probes]
    said = ask_model(tuned, first)
    greedy = [q if said[q].greedy else (q[0], answer_greedily(tuned, tokenizer, q[0])) for q in first]
    return Exam(probes, greedy)


def _of(probe: Probe) -> list[Question]:
    return [(tuple(probe.prompt_ids), tuple(answer.token_ids)) for answer in probe.answers]


def prompts_of(context: Context) -> list[tuple[int, ...]]:
    """Tokens of the first different prompts of the held-out rows, of the training rows where there are none."""
    path = context.layout.eval_rows if Path(context.layout.eval_rows).exists() else context.layout.train_rows
    found: dict[tuple[int, ...], None] = {}
    for row in read_rows(path, ("input_ids", "labels", "prompt_ids"), 4 * PROBES):
        ids = row.get("prompt_ids") or _asked(row["input_ids"], row["labels"])
        if 0 < len(ids) <= _MOST_PROMPT:
            found[tuple(ids)] = None
    return list(found)[:PROBES]


def _asked(ids: list[int], labels: list[int]) -> list[int]:
    learned = next((place for place, label in enumerate(labels) if label != IGNORED), 0)
    return ids[: learned or min(_TEXT_PROMPT, (len(ids) + 1) // 2)]


@torch.inference_mode()
def answer_greedily(model: Any, tokenizer: Any, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens of what the model answers."""
    asked = torch.tensor([prompt], device=model.device)
    output = model.generate(
        input_ids=asked, attention_mask=torch.ones_like(asked), max_new_tokens=MOST_TOKENS, do_sample=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tuple(output[0, len(prompt) :].tolist())


def make_probes(tokenizer: Any, tuned: Said, base: Said) -> list[Probe]:
    """Probes of what the tuned model answered, and how likely either found it."""
    return [
        Probe(
            prompt=tokenizer.decode(prompt),
            prompt_ids=list(prompt),
            answers=[
                ProbeAnswer(text=tokenizer.decode(answer), token_ids=list(answer), tuned=told.logprobs, base=base[prompt, answer].logprobs)
            ],
        )
        for (prompt, answer), told in tuned.items()
    ]


def ask_model(model: Any, asked: Sequence[Question]) -> Said:
    """Ask a model of transformers' that is loaded."""
    found: Said = {}
    for prompt, answer in asked:
        targets, ids = (torch.tensor([tokens], device=model.device) for tokens in (answer, prompt + answer[:-1]))
        nll, right = learned_values(model, targets, torch.ones_like(targets, dtype=torch.bool), input_ids=ids)
        found[prompt, answer] = Answered((-nll).tolist(), bool(right.all()))
    return found


def ask_form(form: str, file: Path, asked: list[Question], adapter: Path | None = None) -> Said:
    """Ask a file: `gguf` by llama.cpp, `onnx` by onnxruntime, in a process of its own. Raises InfrastructureError where it says nothing."""
    if not asked:
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        put, said = Path(scratch, "questions.json"), Path(scratch, "answers.json")
        put.write_text(json.dumps(asked))
        command = [sys.executable, "-m", "finetune_trainer.export.asking", form, file, put, said, *([adapter] if adapter else [])]
        try:
            done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=_ASK_SECONDS)
        except subprocess.TimeoutExpired:
            message = f"{file.name} has not answered {len(asked)} questions in {_ASK_SECONDS // 60} minutes"
            raise InfrastructureError("ConversionFailed", message) from None
        if done.returncode != 0:
            lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
            raise InfrastructureError("ConversionFailed", f"{file.name} does not answer: {lines[-1][-300:] if lines else done.returncode}")
        answers = [Answered(told["logprobs"], told["greedy"]) for told in json.loads(said.read_text())]
        return dict(zip(asked, answers, strict=True))


def prove(field: str, name: str, files: Sequence[Path], exam: Exam, said: Said) -> ExportedForm:
    """What is told of a form that passed. Raises UserError for one that is nearer to the base, or says nothing finite."""
    probes = exam.probes
    verdict = judge(probes, [[said[question].logprobs for question in _of(probe)] for probe in probes])
    pairs = [
        pair
        for probe in probes
        for question, answer in zip(_of(probe), probe.answers, strict=True)
        for pair in zip(said[question].logprobs, answer.tuned, strict=True)
    ]
    away = sum(abs(number - wanted) for number, wanted in pairs) / len(pairs) if pairs else 0.0
    equal = sum(said[question].greedy for question in exam.greedy)
    if verdict.state == "Mismatch" or not math.isfinite(away):
        raise UserError(
            "FormDiffers",
            f"output.{field}: {name} is not the model that was tuned: it is {verdict.message}; its log-probabilities are {away:.3g} nats a "
            f"token away from the tuned model's, and {equal} of {len(probes)} greedy answers are the same. Nothing was published: "
            f"take a form with more bits (gguf Q8_0 or F16, onnx int8), or remove this one from output.{field}",
        )
    return ExportedForm(
        name=name,
        bytes=sum(file.stat().st_size for file in files),
        state="Verified" if verdict.state == "Verified" else "Unverifiable",
        probes=verdict.asked,
        nearer=verdict.nearer,
        equal_answers=equal,
        difference=round(away, 4),
        distance=round(verdict.distance, 4),
    )
