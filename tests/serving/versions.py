"""Versions of a FineTunedModel as publish leaves them: real adapters by PEFT, with probes by transformers."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_api.contract import SUMS
from finetune_api.probing import Probe, ProbeAnswer, Probes
from finetune_api.serving import OrderedModel
from finetune_api.versions import VersionPaths
from finetune_trainer.export.bundle import digests
from finetune_trainer.models.weights import ADAPTER

MODEL = "support-bot"
Change = Callable[[Path], None]
Says = Callable[[list[int], list[int]], list[float]]
"""(prompt, answer) -> log-probability of each of the answer's tokens"""


class Shelf:
    """The storage of one FineTunedModel on a volume."""

    def __init__(self, root: Path, base: Path, fingerprint: str) -> None:
        self.root, self.base, self.fingerprint, self.model = root, base, fingerprint, root.name

    def publish(self, number: int, adapter: Path, probes: Probes | None = None, change: Change | None = None) -> OrderedModel:
        """A version; `change` happens to its files before they are published."""
        folder = self.root / VersionPaths.artifact(number)
        shutil.copytree(adapter, folder)
        if change is not None:
            change(folder)
        (folder / SUMS).write_text(digests(folder))
        if probes is not None:
            path = self.root / VersionPaths.probes(number)
            path.parent.mkdir(exist_ok=True)
            path.write_text(probes.model_dump_json(by_alias=True))
        return self.ordered(number)

    def ordered(self, number: int, *aliases: str) -> OrderedModel:
        """An order of it."""
        digest = hashlib.sha256((self.root / VersionPaths.artifact(number) / SUMS).read_bytes()).hexdigest()
        return OrderedModel(
            name=f"{self.model}@{number}",
            aliases=list(aliases),
            model=self.model,
            number=number,
            storage=f"pvc://claim/{self.model}",
            digest=f"sha256:{digest}",
            rank=8,
            base_fingerprint=self.fingerprint,
        )


def make_adapter(base: Path, folder: Path, seed: int, *, rank: int = 8, strength: float = 0.05, targets: Any = "all-linear") -> Probes:
    """An adapter of random weights (with `strength` 0 it is none), and what it and its base say to eight prompts."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM"),
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name and strength:
            torch.nn.init.normal_(weight, std=strength)
    model.save_pretrained(folder)

    def untuned(prompt: list[int], answer: list[int]) -> list[float]:
        with model.disable_adapter():
            return log_probabilities(model, prompt, answer)

    return make_probes(base, seed, lambda prompt, answer: log_probabilities(model, prompt, answer), untuned)


def log_probabilities(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """Of each of the answer's tokens."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
    return [float(torch.log_softmax(logits[len(prompt) + i - 1], -1)[token]) for i, token in enumerate(answer)]


def make_probes(base: Path, seed: int, tuned: Says, untuned: Says) -> Probes:
    """Eight prompts, and what two models say to them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    numbers, probes = random.Random(seed), []
    for _ in range(8):
        messages = [{"role": "user", "content": "".join(numbers.choices("abcdefgh ", k=12))}]
        prompt = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        answer = [numbers.randrange(5, 320) for _ in range(6)]
        answers = [ProbeAnswer(text="", token_ids=answer, tuned=tuned(prompt, answer), base=untuned(prompt, answer))]
        probes.append(Probe(messages=messages, prompt="", prompt_ids=prompt, answers=answers))
    return Probes(probes=probes)


def with_tensors(change: Callable[[dict[str, Any]], None]) -> Change:
    """The adapter's weights, changed."""

    def apply(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(folder / ADAPTER)
        change(tensors)
        save_file(tensors, folder / ADAPTER)

    return apply
