"""The result of training in the workspace: written, in the precision of its base, and looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from finetune_api.spec import WHOLE_MODEL_METHODS

from ..job.context import Context
from ..job.files import write_text
from ..models.fetch import local_path
from ..models.stopping import write_generation_config
from ..process.errors import UserError


def save_result(context: Context, trainer: Any) -> None:
    """Write the adapter or the model on rank 0; all ranks take part. Raises UserError when nothing was learned or saved."""
    output = Path(context.layout.output)
    trainer.save_model(str(output))
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    trainer.processing_class.save_pretrained(str(output))
    if context.spec.tuning.method in WHOLE_MODEL_METHODS:
        _as_stored(output, local_path(context))
        restore_config(output, local_path(context), reward=context.spec.tuning.objective == "reward")
    if context.spec.tuning.objective != "reward":
        write_generation_config(context, trainer.processing_class, local_path(context), output)
    _verify(output)


def _as_stored(output: Path, base: str) -> None:
    """Whole models are trained in fp32; one whose base is stored in 16 bit is stored so too."""
    config = json.loads(Path(base, "config.json").read_text())
    name = config.get("dtype") or config.get("torch_dtype")
    if name not in ("bfloat16", "float16"):
        return
    from safetensors.torch import load_file, save_file

    for file in sorted(output.glob("*.safetensors")):
        tensors = {key: t.to(getattr(torch, name)) if t.dtype == torch.float32 else t for key, t in load_file(file).items()}
        partial = file.with_name(f".{file.name}.partial")
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(file)
    written = json.loads((output / "config.json").read_text())
    write_text(output / "config.json", json.dumps({**written, "dtype": name}, indent=2) + "\n")


def restore_config(output: Path, base: str, *, reward: bool = False) -> None:
    """The configuration as the base's: what training switched off or filled in (cache, padding) is not the model's."""
    was, written = (json.loads(Path(folder, "config.json").read_text()) for folder in (base, output))
    for name in ("torch_dtype", "quantization_config"):
        was.pop(name, None)
    own = ("dtype", "transformers_version", *(("architectures", "id2label", "label2id", "pad_token_id") if reward else ()))
    kept = {**was, **{name: written[name] for name in own if name in written}}
    write_text(output / "config.json", json.dumps(kept, indent=2, sort_keys=True) + "\n")


def _verify(output: Path) -> None:
    """An adapter under ZeRO-3 once was saved empty."""
    from safetensors import safe_open

    files = sorted(output.glob("*.safetensors"))
    count = nonzero = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                count += 1
                nonzero += bool(tensors.get_tensor(name).any())
    if not files or not count or not nonzero:
        raise UserError(
            "EmptyResult", f"the saved result has {count} tensors, {nonzero} of them with a non-zero value; nothing was learned or saved"
        )
