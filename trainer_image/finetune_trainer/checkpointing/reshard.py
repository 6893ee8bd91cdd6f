"""Resume DeepSpeed in another world size: its optimizer state is cut for the processes that wrote it.

DeepSpeed's universal checkpoints hold every parameter whole (https://www.deepspeed.ai/tutorials/universal-checkpointing/).
One is made beside the sharded one, once, when it is needed.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

from ..job.files import write_text
from ..process.errors import InfrastructureError
from .checkpoints import ResumePoint

log = logging.getLogger("finetune.reshard")


def to_universal(resume: ResumePoint) -> None:
    """Make the universal checkpoint. Raises InfrastructureError with DeepSpeed's words."""
    assert resume.folder is not None
    folder = Path(resume.folder)
    tag = (folder / "latest").read_text().strip()
    target, partial = folder / f"{tag}_universal", folder / f"{tag}_universal.partial"
    if (folder / "latest_universal").exists():
        return
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    log.info("checkpoint %s of %d processes is made into a universal one", folder.name, resume.world_size)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(folder / tag)]
    command += ["--output_folder", str(partial), "--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InfrastructureError("ReshardFailed", f"checkpoint {folder.name} cannot be resharded: {done.stderr.strip()[-1500:]}")
    partial.rename(target)
    write_text(folder / "latest_universal", target.name)
