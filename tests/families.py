"""Model families as they are published: the configuration class, the chat template and its special tokens, over a stand-in vocabulary.

Weights are random and few. What is real is what the trainer looks at: the class, the template, which tokens end what.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.shell import REPO

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 2048,
}  # fmt: skip
_QWEN = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
_MISTRAL = (
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
_PHI = ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_DEEPSEEK = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>", "<｜tool▁outputs▁end｜>",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One family."""

    config: str
    """transformers' configuration class."""
    template: str
    """Name of a template of TRL, or of a file in tests/templates/."""
    special: tuple[str, ...]
    eos: str
    """The tokenizer's own eos_token."""
    end: str
    """What ends a turn."""
    bos: str | None = None
    added: tuple[str, ...] = ()
    """Tokens of the vocabulary that are not special."""
    settings: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    """Settings of LoRA that the class asks for."""

    @property
    def source(self) -> Path:
        """The file of the template."""
        import trl

        own = REPO / "tests" / "templates" / f"{self.template}.jinja"
        return own if own.exists() else Path(trl.__file__).parent / "chat_templates" / f"{self.template}.jinja"


FAMILIES: dict[str, Family] = {
    "Qwen3": Family("Qwen3Config", "qwen3", _QWEN, "<|im_end|>", "<|im_end|>", added=("<think>", "</think>", "<tool_call>", "</tool_call>")),
    "gpt-oss": Family(
        "GptOssConfig",
        "gptoss",
        ("<|startoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
        "<|return|>",
        "<|return|>",
        settings={"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128},
    ),
    "Phi-3": Family("Phi3Config", "phi3", _PHI, "<|endoftext|>", "<|end|>", "<s>"),
    "Phi-3.5": Family("Phi3Config", "phi3_5", _PHI, "<|endoftext|>", "<|end|>", "<s>"),
    "Phi-4": Family("Phi3Config", "phi-4", ("<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>"), "<|endoftext|>", "<|im_end|>"),
    "DeepSeek-R1-Distill-Qwen": Family(
        "Qwen2Config", "deepseek_r1_distill", _DEEPSEEK, _DEEPSEEK[1], _DEEPSEEK[1], _DEEPSEEK[0], ("<think>", "</think>")
    ),
    "DeepSeek-R1-Distill-Llama": Family(
        "LlamaConfig", "deepseek_r1_distill", _DEEPSEEK, _DEEPSEEK[1], _DEEPSEEK[1], _DEEPSEEK[0], ("<think>", "</think>")
    ),
    "Nemotron-3-Nano": Family(
        "NemotronHConfig", "nemotron_3_nano", ("<s>", *_QWEN), "<|im_end|>", "<|im_end|>", "<s>", ("<think>", "</think>"),
        {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16}, {"targetModules": ["in_proj", "q_proj", "v_proj"]},
    ),
    "Gemma-3": Family("Gemma3TextConfig", "gemma3", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<end_of_turn>", "<bos>"),
    "Mistral-7B-v0.2": Family("MistralConfig", "mistral-7b-v0.2", ("<s>", "</s>"), "</s>", "</s>", "<s>"),
    "Mistral-Nemo": Family("MistralConfig", "mistral-nemo", _MISTRAL, "</s>", "</s>", "<s>"),
    "Mistral-Small-3.2": Family(
        "MistralConfig", "mistral-small-3.2", (*_MISTRAL, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[ARGS]", "[CALL_ID]"), "</s>", "</s>", "<s>"
    ),
    "Llama-3": Family("LlamaConfig", "llama3", _LLAMA, "<|end_of_text|>", "<|eot_id|>", "<|begin_of_text|>"),
    "Llama-3.1": Family("LlamaConfig", "llama3_1", _LLAMA, "<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>"),
    "Llama-3.2": Family("LlamaConfig", "llama3_2", _LLAMA, "<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>"),
}  # fmt: skip


@functools.cache
def _vocabulary() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(["what is a colour yes it is"], trainer)
    return str(raw.to_str())


def tokenizer_of(family: Family) -> Any:
    """The family's tokens over a byte-level vocabulary, with its template."""
    from tokenizers import Tokenizer
    from transformers import AddedToken, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_vocabulary()),
        pad_token="<pad>",
        eos_token=family.eos,
        bos_token=family.bos,
        additional_special_tokens=[t for t in family.special if t not in (family.eos, family.bos)],
    )
    tokenizer.add_tokens([AddedToken(token, special=False) for token in family.added])
    tokenizer.chat_template = family.source.read_text()
    return tokenizer


def make(family: Family, folder: Path) -> Path:
    """Save a tiny model of the family."""
    import torch
    import transformers

    torch.manual_seed(0)
    tokenizer = tokenizer_of(family)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = getattr(transformers, family.config)(**{**_SIZES, "vocab_size": len(tokenizer), **ids, **family.settings})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
