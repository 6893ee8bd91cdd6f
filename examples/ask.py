"""Ask the base and the tuned model the same question, that of the first row of a file, and print both answers.

    python ask.py BASE ADAPTER ROWS.jsonl

BASE is a folder or a name of the Hugging Face Hub, ADAPTER what a FineTuneJob published, ROWS.jsonl has `messages`, of which the
last one is the answer that is right.
"""

import json
import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def main(base: str, adapter: str, rows: str) -> None:
    """Print question, both answers and the right one."""
    with open(rows) as file:
        *asked, right = json.loads(next(file))["messages"]
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    # the adapter's own generation_config.json knows the token that ends a turn
    settings = GenerationConfig.from_pretrained(adapter, max_new_tokens=24, do_sample=False)

    def answer() -> str:
        tokens = model.generate(**prompt, generation_config=settings)[0, prompt["input_ids"].shape[1] :]
        return " ".join(tokenizer.decode(tokens, skip_special_tokens=True).split())

    print(f"question: {asked[-1]['content']}")
    with model.disable_adapter():
        print(f"base:     {answer()}")
    print(f"tuned:    {answer()}")
    print(f"right:    {right['content']}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
