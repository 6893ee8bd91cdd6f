"""The baseline that people write by hand: transformers.Trainer with LoRA and padding. MODEL ROWS OUTPUT STEPS BATCH LENGTH."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Train, and print the trainer's own log."""
    base, rows, output = sys.argv[1:4]
    steps, batch, length = map(int, sys.argv[4:7])
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = (prompt + answer)[:length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ([-100] * len(prompt) + answer)[:length]}

    data = Dataset.from_list([encode(json.loads(line)) for line in Path(rows).read_text().splitlines()])
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32", attn_implementation="sdpa")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=output, max_steps=steps, per_device_train_batch_size=batch, learning_rate=2e-4, lr_scheduler_type="cosine", logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, include_num_input_tokens_seen="non_padding", disable_tqdm=True, seed=42, data_seed=42,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=DataCollatorForSeq2Seq(tokenizer)).train()


if __name__ == "__main__":
    main()
