"""What this machine has: its GPUs, and the packages that the stages need. Imports nothing that may be missing."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REQUIRED = {
    "torch": "torch", "transformers": "transformers", "trl": "trl", "peft": "peft", "accelerate": "accelerate", "datasets": "datasets",
    "pyarrow": "pyarrow", "safetensors": "safetensors", "pydantic": "pydantic", "PyYAML": "yaml", "rich": "rich", "Jinja2": "jinja2",
    "duckdb": "duckdb", "rensa": "rensa", "py3langid": "py3langid", "jsonschema": "jsonschema",
}  # fmt: skip
"""By distribution: the module. Without one of them no stage runs."""
OPTIONAL = {"bitsandbytes": "bitsandbytes", "liger-kernel": "liger_kernel", "flash-attn": "flash_attn", "triton": "triton"}
"""Without them less is checked."""
_PROBE = """
import json, torch
found = {"build": torch.version.cuda, "gpus": []}
for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    gpu = torch.cuda.get_device_properties(index)
    found["gpus"].append({"name": gpu.name, "memory": gpu.total_memory, "capability": [gpu.major, gpu.minor]})
if found["gpus"]:
    half = torch.bfloat16 if found["gpus"][0]["capability"] >= [8, 0] else torch.float16
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=half) for _ in range(2))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(13):
        if turn == 3:
            begin.record()
        a @ b
    end.record()
    torch.cuda.synchronize()
    found["matmul_tflops"] = round(10 * 2 * 8192**3 / begin.elapsed_time(end) / 1e9, 1)
print(json.dumps(found))
"""


@dataclass
class Machine:
    """The GPUs as torch sees them, and the versions of what runs on them."""

    python: str
    versions: dict[str, str]
    missing: list[str]
    optional_missing: list[str]
    devices: int
    """GPUs that the operating system shows."""
    cuda_build: str | None = None
    """CUDA of the torch that is installed; None for a CPU build."""
    gpus: list[dict[str, Any]] = field(default_factory=list)
    """GPUs that torch can use."""
    matmul_tflops: float | None = None
    """What a large half-precision matrix product reaches here."""

    def to_wire(self) -> dict[str, Any]:
        """For the JSON document."""
        return asdict(self)


def look() -> Machine:
    """Look at this machine; torch is asked in a process of its own, so that none holds a GPU while the stages run."""
    versions = {name: found for name in [*REQUIRED, *OPTIONAL] if (found := _version(name)) is not None}
    machine = Machine(
        python=platform.python_version(),
        versions=versions,
        missing=[name for name in REQUIRED if name not in versions],
        optional_missing=[name for name in OPTIONAL if name not in versions],
        devices=_devices(),
    )
    if "torch" in versions:
        done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found = json.loads(done.stdout.splitlines()[-1])
            machine.cuda_build, machine.gpus, machine.matmul_tflops = found["build"], found["gpus"], found.get("matmul_tflops")
        else:
            machine.missing.append(f"a torch that works ({done.stderr.strip().splitlines()[-1:] or ['no word']}"[:300] + ")")
    return machine


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> int:
    files = [entry for entry in Path("/dev").iterdir() if re.fullmatch(r"nvidia[0-9]+", entry.name)] if Path("/dev").is_dir() else []
    if files:
        return len(files)
    try:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:
        return 0
    return len(re.findall(r"^GPU [0-9]+:", told.stdout, re.M))
