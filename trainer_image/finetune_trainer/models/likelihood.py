"""How likely a model finds given tokens, in the memory of a forward pass: logits are made of the asked positions alone, a few at a time.

A vocabulary of 128k makes the logits of all positions larger than everything else that a forward pass holds. So the trunk runs once,
and the model's own code after it (head, soft-capping, scaling) sees the hidden states of some positions, then of the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

_LEAST_BYTES = 16 << 20
"""Logits of a step may take so much, however small the hidden states are."""


def causal_model(model: Any) -> Any:
    """The causal language model inside an adapter's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _replaced_forward(module: Any, forward: Any) -> Iterator[None]:
    """The module's forward is another one for a while."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


_TRUNKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


@torch.inference_mode()
def _trunk(causal: Any) -> Any:
    """The module that makes the hidden states: the model's base, or the decoder in it where the base is passed by (OPT); else the model."""
    if causal not in _TRUNKS:
        called: list[Any] = []
        token = torch.zeros((1, 1), dtype=torch.long, device=causal.device)
        for module in (causal.base_model, causal.base_model.get_decoder() if hasattr(causal.base_model, "get_decoder") else causal):
            if module is causal or called:
                continue
            handle = module.register_forward_pre_hook(lambda module, _: called.append(module))
            causal(input_ids=token, use_cache=False)
            handle.remove()
        _TRUNKS[causal] = called[0] if called else None  # itself would keep it alive
    return _TRUNKS[causal] or causal


@torch.inference_mode()
def hidden_states(model: Any, **inputs: Any) -> tuple[torch.Tensor, Any]:
    """(the trunk's last hidden states, its whole output) of a forward pass of which no logits are kept."""
    trunk = _trunk(causal_model(model))
    seen: list[Any] = []
    forward = trunk.forward

    def noting(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen.append(output)
        return _with_states(output, output[0][:, -1:])

    with _replaced_forward(trunk, noting):
        model(**inputs)
    return seen[0][0], seen[0]


def _with_states(output: Any, states: torch.Tensor) -> Any:
    if isinstance(output, tuple):
        return (states, *output[1:])
    kept = {key: value for key, value in output.items() if key not in ("last_hidden_state", "past_key_values")}
    return type(output)(last_hidden_state=states, **kept)


@torch.inference_mode()
def learned_values(model: Any, targets: torch.Tensor, learned: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(negative log-likelihood, whether it is the likeliest) of each learned target, in their order.

    `targets` and `learned` are of the shape of the inputs' last positions: the target of a position is the token after it.
    """
    causal = causal_model(model)
    trunk = _trunk(causal)
    if trunk is causal:  # a model whose head cannot be told from its trunk
        logits = model(**inputs).logits[:, -targets.shape[1] :][learned]
        parts = [_judge(part, wanted) for part, wanted in zip(logits.split(256), targets[learned].split(256), strict=True)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    states, output = hidden_states(model, **inputs)
    output = _with_states(output, states[:1, :1])  # the caches go, of which nothing more is wanted
    wanted = targets[learned]
    chosen = learned.nonzero()
    chosen[:, 1] += states.shape[1] - targets.shape[1]  # virtual tokens stand in front
    nll = torch.empty(len(wanted), dtype=torch.float32, device=wanted.device)
    right = torch.empty(len(wanted), dtype=torch.bool, device=wanted.device)
    step = _step(causal, states)
    anything = inputs["input_ids"][:1, :1]
    for start in range(0, len(wanted), step):
        rows, columns = chosen[start : start + step].unbind(1)
        part = _with_states(output, states[rows, columns][None])
        with _replaced_forward(trunk, lambda *_, part=part, **__: part):
            logits = causal(input_ids=anything, use_cache=False).logits[0]
        nll[start : start + step], right[start : start + step] = _judge(logits, wanted[start : start + step])
    return nll, right


def log_probabilities(model: Any, prompt_ids: list[int], answer_ids: list[int]) -> list[float]:
    """Log-probability of each token of an answer after its prompt, which has one token at least."""
    joined = torch.tensor([[*prompt_ids, *answer_ids]], device=causal_model(model).device)
    learned = torch.zeros_like(joined, dtype=torch.bool)
    learned[0, len(prompt_ids) - 1 : -1] = True
    nll, _ = learned_values(model, joined.roll(-1, 1), learned, input_ids=joined, attention_mask=torch.ones_like(joined))
    return [-float(number) for number in nll.cpu()]


def _judge(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    right = logits.argmax(-1) == wanted
    return torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none"), right


def _step(causal: Any, states: torch.Tensor) -> int:
    """How many positions' logits, with their copies in fp32, take as much memory as the hidden states: far less than a layer takes."""
    head = causal.get_output_embeddings()
    vocabulary = int(head.weight.shape[0] if hasattr(head, "weight") else causal.config.get_text_config().vocab_size)
    room = max(_LEAST_BYTES, states.numel() * states.element_size())
    return int(max(1, room // (vocabulary * (states.element_size() + 8))))
