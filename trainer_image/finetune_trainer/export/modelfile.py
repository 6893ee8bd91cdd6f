"""Ollama's Modelfile: https://docs.ollama.com/modelfile."""

from __future__ import annotations

from typing import Any

from ..process.errors import UserError

_PARAMETERS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repeat_penalty",
}  # fmt: skip
"""Settings of generation_config.json, by Ollama's names."""
LEAST_CONTEXT = 4096
"""Tokens that a conversation may have, however short the rows were: Ollama's own default."""


def modelfile(
    tokenizer: Any,
    file: str,
    stops: list[int],
    *,
    system: str | None = None,
    sampling: dict[str, Any] | None = None,
    context: int | None = None,
) -> str:
    """TEMPLATE is read off the model's chat template, SYSTEM is what all rows had, PARAMETERs are those of generation_config.json.

    `sampling`: that file; one that says do_sample false has settings that nobody uses. `context`: tokens of a conversation.
    """
    lines = [f"FROM ./{file}"]
    if tokenizer.chat_template and (template := _ollama_template(tokenizer)) is not None:
        lines.append(f'TEMPLATE """{template}"""')
    if system and '"""' not in system:  # which a Modelfile cannot say
        lines.append(f'SYSTEM """{system}"""')
    told = sampling or {}
    if told.get("do_sample") is not False:
        lines += [f"PARAMETER {theirs} {told[ours]}" for ours, theirs in _PARAMETERS.items() if isinstance(told.get(ours), int | float)]
    if context:
        lines.append(f"PARAMETER num_ctx {context}")
    lines += [f'PARAMETER stop "{token}"' for token in tokenizer.convert_ids_to_tokens(stops)]
    return "\n".join(lines) + "\n"


def _ollama_template(tokenizer: Any) -> str | None:
    """Ollama's TEMPLATE, read off how the chat template renders a system's and a user's turn; None where it cannot be.

    A template that has no place for a system's turn raises, and gets a TEMPLATE without one.
    """
    system, user = "SYSTEM-PLACE", "USER-PLACE"
    asking = [{"role": "user", "content": user}]

    def render(messages: list[dict[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    try:
        text = render([{"role": "system", "content": system}, *asking])
    except Exception:  # whatever a template raises
        text = ""
    if system in text and user in text.partition(system)[2]:
        head, _, rest = text.partition(system)
        between, _, tail = rest.partition(user)
        end = tokenizer.eos_token or "\n"
        cut = between.rfind(end) + len(end) if end in between else 0  # where the system's turn is closed
        cut += len(between[cut:]) - len(between[cut:].lstrip("\n"))
        close, asked = between[:cut], between[cut:]
        return f"{{{{ if .System }}}}{head}{{{{ .System }}}}{close}{{{{ end }}}}{asked}{{{{ .Prompt }}}}{tail}{{{{ .Response }}}}"
    try:
        head, found, tail = render(asking).partition(user)
    except Exception as failure:  # whatever a template raises
        message = f"output.gguf: the chat template cannot render one turn of a user ({str(failure)[:200]}), so Ollama's Modelfile cannot be written"
        raise UserError("ChatTemplateFailed", f"{message}; set tuning.chatTemplate, or remove output.gguf") from None
    return f"{head}{{{{ .Prompt }}}}{tail}{{{{ .Response }}}}" if found else None
