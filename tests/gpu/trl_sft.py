"""`trl sft` with its steps timed and its peak memory taken: `python -m tests.gpu.trl_sft OUT.json ARGUMENTS OF TRL SFT`."""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Run TRL's own script; nothing of it is changed but for a callback that looks."""
    out, sys.argv = Path(sys.argv[1]), ["trl-sft", *sys.argv[2:]]
    import torch
    from transformers import Trainer, TrainerCallback

    lines: list[dict[str, Any]] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs and state.is_world_process_zero:
                lines.append({"seconds": time.monotonic(), "tokens": float(logs["num_tokens"]), "loss": float(logs["loss"])})

        def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.is_world_process_zero:
                found: dict[str, Any] = {"steps": lines, "attention": getattr(more["model"].config, "_attn_implementation", "")}
                if torch.cuda.is_available():
                    free, total = torch.cuda.mem_get_info()
                    context = max(0, total - free - torch.cuda.memory_reserved())
                    found["measured"] = torch.cuda.max_memory_reserved() + context
                out.write_text(json.dumps(found))

    original = Trainer.__init__

    def init(trainer: Any, *arguments: Any, **more: Any) -> None:
        original(trainer, *arguments, **more)
        trainer.add_callback(Watch())

    Trainer.__init__ = init
    runpy.run_module("trl.scripts.sft", run_name="__main__")


if __name__ == "__main__":
    main()
