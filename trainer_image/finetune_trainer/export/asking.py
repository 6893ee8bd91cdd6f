"""Ask one exported form, in a process of its own: how likely it finds given answers.

    python -m finetune_trainer.export.asking FORM FILE QUESTIONS ANSWERS [ADAPTER]

FORM is gguf or onnx; QUESTIONS a JSON list of [tokens of the prompt, tokens of the answer], ANSWERS is written: a list of
{logprobs, greedy}. A process of its own gives back its memory, and llama.cpp may end it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..process.limits import usable_cores

Logits = np.ndarray[Any, Any]
Ask = Callable[[list[int], int], Logits]
"""(tokens, since) -> [len(tokens) - since, vocabulary]: the logits after each token from place `since` on."""
_CHUNK = 256
"""Tokens whose logits are held at once."""


def main(form: str, file: str, questions: str, answers: str, adapter: str | None = None) -> None:
    """Write what the form answers."""
    asked: list[tuple[list[int], list[int]]] = json.loads(Path(questions).read_text())
    if form == "onnx":
        ask = onnx_logits(file)
        found = [_judged(ask, *question) for question in asked]
    else:
        from .llama import loaded

        longest = max(len(prompt) + len(answer) for prompt, answer in asked)
        with loaded(Path(file), longest, usable_cores(), Path(adapter) if adapter else None) as model:
            found = [_judged(model.logits, *question) for question in asked]
    Path(answers).write_text(json.dumps(found))


def _judged(ask: Ask, prompt: list[int], answer: list[int]) -> dict[str, Any]:
    """Log-probability of each token of the answer, and whether greedy decoding gives that answer."""
    logits = ask(prompt + answer[:-1], len(prompt) - 1).astype(np.float64)
    highest = logits.max(-1, keepdims=True)
    total = highest[:, 0] + np.log(np.exp(logits - highest).sum(-1))
    chosen = logits[np.arange(len(answer)), answer]
    return {"logprobs": (chosen - total).tolist(), "greedy": bool((logits.argmax(-1) == answer).all())}


def onnx_logits(file: str) -> Ask:
    """What asks a decoder in ONNX with the inputs and outputs of onnxruntime-genai's builder."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    inputs, outputs = session.get_inputs(), [output.name for output in session.get_outputs()]
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}

    def ask(tokens: list[int], since: int) -> Logits:
        past = {  # batch 1, nothing seen yet
            i.name: np.zeros([1 if n == 0 else d if isinstance(d, int) else 0 for n, d in enumerate(i.shape)], kinds[i.type])
            for i in inputs
            if i.name.startswith("past")
        }
        parts: list[Logits] = []
        for start in range(0, len(tokens), _CHUNK):
            part = tokens[start : start + _CHUNK]
            end = start + len(part)
            told = {"input_ids": [part], "attention_mask": [[1] * end], "position_ids": [list(range(start, end))]}
            feed = {i.name: np.array(told[i.name], np.int64) for i in inputs if i.name in told}
            found = dict(zip(outputs, session.run(None, {**feed, **past}), strict=True))
            past = {name: found[name.replace("past_key_values", "present")] for name in past}
            parts.append(found["logits"][0, max(0, since - start) :])
        return np.concatenate(parts)

    return ask


if __name__ == "__main__":
    main(*sys.argv[1:])
