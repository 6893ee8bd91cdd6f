"""A real vLLM on this machine's CPU, from its own environment, and a base that it starts with in half a minute."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.control_plane import free_port
from tests.cluster.environment import site_packages

MOST_RANK, MOST_TOKENS = 16, 256
BASE = "tiny-endpoint"
_SETTINGS = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
}


class Vllm:
    """One server, which can be killed and started again at the same address."""

    def __init__(self, model: Path, folder: Path, name: str = BASE, also: Sequence[str] = ()) -> None:
        """`also`: further names of the base, as those of a whole model are."""
        self.model, self.folder, self.names, self.port = model, folder, (name, *also), free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin; `wait` says when it answers."""
        words = ["--host", "127.0.0.1", "--port", self.port, "--model", self.model, "--served-model-name", *self.names]
        words += ["--enable-lora", "--max-loras", 4, "--max-cpu-loras", 32, "--max-lora-rank", MOST_RANK, "--max-model-len", MOST_TOKENS]
        words += ["--enforce-eager", "--dtype", "float32", "--no-enable-log-requests", "--disable-uvicorn-access-log"]
        home = {"HOME": str(self.folder), "VLLM_CACHE_ROOT": str(self.folder / "cache"), "PYTHONPATH": str(site_packages("vllm"))}
        command = [sys.executable, "-P", "-S", "-m", "vllm.entrypoints.openai.api_server", *map(str, words)]
        with (self.folder / "vllm.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env={**os.environ, **_SETTINGS, **home}, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, seconds: float = 550) -> None:
        """Until it is up. Raises AssertionError with its last lines."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and self.process is not None and self.process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{self.address}/health", timeout=5):
                return
            time.sleep(0.3)
        raise AssertionError((self.folder / "vllm.log").read_text(errors="replace")[-3000:])

    def kill(self) -> None:
        """All of its processes, at once."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def make_base(folder: Path, tokenizer: Path, *, hidden: int = 128, layers: int = 2) -> None:
    """A random Llama with the tiny example's tokenizer. The engine's CPU kernels have no heads as narrow as the example's own."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(hidden)
    config = LlamaConfig(
        vocab_size=327,
        hidden_size=hidden,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=MOST_TOKENS,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in tokenizer.iterdir():
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            shutil.copyfile(file, folder / file.name)


@contextlib.contextmanager
def running(command: list[Any], folder: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of a test, with its output in a file of its name."""
    with (folder / f"{Path(str(command[0])).name}.log").open("ab") as log:
        process = subprocess.Popen([str(word) for word in command], cwd=folder, env={**os.environ, **env}, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
