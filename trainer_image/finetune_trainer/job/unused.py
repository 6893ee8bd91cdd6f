"""Packages that a process goes without.

peft and TRL import these two wherever they are installed, whatever a job uses: two of the ten seconds that each process of it
takes for its imports, while its GPUs wait.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from .context import Context

LEFT_OUT = "FINETUNE_LEFT_OUT"
"""Environment variable by which `train` tells its workers, before they import anything."""
_MODELS = ("model", "teacher")


def unused_packages(context: Context) -> list[str]:
    """Those of them that this job does not use."""
    tuning, remote_code = context.spec.tuning, context.spec.model.trust_remote_code  # which may import anything
    quantized = tuning.method == "qlora" or tuning.hyperparameters.optimizer.endswith("-8bit")
    logged = tuning.tracking.wandb is not None or any(name.startswith("WANDB_") for name in os.environ)
    uses = {"bitsandbytes": quantized or remote_code or _prequantized(context), "wandb": logged or remote_code}
    return [name for name, used in uses.items() if not used]


def _prequantized(context: Context) -> bool:
    """Whether a model that prepare found comes quantized."""
    for name in _MODELS:
        if (reference := Path(context.layout.reference(name))).exists():
            config = Path(json.loads(reference.read_text())["path"], "config.json")
            if not config.exists() or json.loads(config.read_text()).get("quantization_config"):
                return True
    return False


def leave_out(packages: Iterable[str]) -> None:
    """As if they were not installed; what is imported already stays.

    Source: https://docs.python.org/3/reference/import.html#the-module-cache, None in sys.modules.
    """
    for name in packages:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
