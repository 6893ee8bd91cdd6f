"""A whole model as ONNX, by onnxruntime-genai's builder, in the layout of Transformers.js."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..process.errors import InfrastructureError

_BUILD_SECONDS = 3600
_CHECK_SECONDS = 300


def can_build(folder: str, scratch: str) -> None:
    """Raise InfrastructureError with the builder's last words where it does not know the model in that folder."""
    _run(folder, scratch, "check", _CHECK_SECONDS)


def build(model: Path, folder: Path, kinds: list[str], tokenizer: Any) -> dict[str, list[Path]]:
    """Write FOLDER as Transformers.js reads it; the files of each kind."""
    folder.mkdir(exist_ok=True)
    made: dict[str, list[Path]] = {}
    for kind in kinds:
        _run(str(model), str(folder), kind, _BUILD_SECONDS)
        made[kind] = sorted((folder / "onnx").glob(f"model_{kind}.onnx*"))
    config = json.loads((model / "config.json").read_text())
    beside = {files[0].name: True for files in made.values() if len(files) > 1}
    config["transformers.js_config"] = {"dtype": kinds[0], **({"use_external_data_format": beside} if beside else {})}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if (model / "generation_config.json").exists():
        shutil.copyfile(model / "generation_config.json", folder / "generation_config.json")
    tokenizer.save_pretrained(folder, save_jinja_files=False)  # Transformers.js looks for a template in tokenizer_config.json alone
    return made


def _run(model: str, folder: str, kind: str, seconds: float) -> None:
    command = [sys.executable, "-m", "finetune_trainer.export.onnx_builder", model, folder, kind]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, env=env)
    except subprocess.TimeoutExpired:
        raise InfrastructureError("ConversionFailed", f"the builder of ONNX takes over {seconds / 60:.0f} minutes") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise InfrastructureError("ConversionFailed", lines[-1][-500:] if lines else f"exit {done.returncode}")
