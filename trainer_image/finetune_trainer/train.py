"""train: launch the worker processes of this pod with `accelerate launch`, and turn their end into an exit code.

This process starts no torch: it looks at the pod's devices, waits for rank 0's address, and watches the launcher.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from finetune_api.contract import Env, ExitCode, StageResult
from finetune_api.status import Plan

from .context import Context
from .errors import BY_CODE, InfrastructureError, StageError, Stopped

log = logging.getLogger("finetune.train")
ERROR_FILE = "FINETUNE_ERROR_FILE"
RESULT_FILE = "FINETUNE_RESULT_FILE"
_ADDRESS_TIMEOUT = 300


def train(context: Context) -> StageResult:
    """Run the stage on this pod. Raises the StageError that its processes ended with."""
    plan = _plan(context)
    spec = context.spec.distribution
    rank = int(os.environ.get(Env.RANK, "0"))
    local = plan.world_size // spec.nodes
    cuda = _cuda_devices()
    _check_devices(spec.gpus_per_node, cuda)
    address, port = os.environ.get(Env.MAIN_ADDRESS, "127.0.0.1"), os.environ.get(Env.MAIN_PORT, "29500")
    if rank != 0:
        _wait_for_address(address)
    with tempfile.TemporaryDirectory() as scratch:
        error, result = Path(scratch, "error.json"), Path(scratch, "result.json")
        env = {
            **os.environ,
            ERROR_FILE: str(error),
            RESULT_FILE: str(result),
            Env.PLAN: json.dumps(plan.to_wire()),
            **({} if cuda and spec.gpus_per_node else _cpu_environment(plan.strategy, local)),
        }
        command = [*_launcher(plan, spec.nodes, rank, address, port), "-m", "finetune_trainer.worker"]
        command += ["--job", os.environ["FINETUNE_JOB_FILE"], "--workspace", context.workspace]
        log.info("rank %d of %d nodes: %d process(es), %s, %s", rank, spec.nodes, local, plan.strategy, "GPU" if cuda else "CPU")
        code = _run(command, env)
        if error.exists():
            raise _error(json.loads(error.read_text()))
        if code != 0:
            raise InfrastructureError(
                "ProcessDied", f"a training process ended without a word (launcher exit {code}); it was probably killed"
            )
        if result.exists():
            return StageResult.model_validate(json.loads(result.read_text()))
    return StageResult(reason="Trained", message=f"node {rank} is done")


def _plan(context: Context) -> Plan:
    given = os.environ.get(Env.PLAN)
    return Plan.model_validate(json.loads(given) if given else context.read_json(context.layout.plan))


def _cuda_devices() -> int:
    """GPUs of this pod; asked in a process of its own, which keeps CUDA out of this one."""
    script = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    lines = done.stdout.split()
    return int(lines[-1]) if done.returncode == 0 and lines and lines[-1].isdigit() else 0


def _check_devices(wanted: int, found: int) -> None:
    if wanted == 0 or found == wanted:
        return
    if found == 0 and os.environ.get(Env.ALLOW_CPU) == "1":
        log.warning("no GPU is found, training on CPU: %s is set", Env.ALLOW_CPU)
        return
    raise InfrastructureError(
        "DeviceMismatch", f"the job asked for {wanted} GPU(s) per node, this pod sees {found}; check the driver and the image's CUDA"
    )


def _cpu_environment(strategy: str, local: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // max(1, local))
    env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), "CUDA_VISIBLE_DEVICES": ""}
    # accelerate leaves DeepSpeed out in silence and runs DDP when it is told to use the CPU; without a GPU it does so anyway
    return {**env, "DS_ACCELERATOR": "cpu"} if strategy.startswith("deepspeed") else {**env, "ACCELERATE_USE_CPU": "true"}


def _launcher(plan: Plan, nodes: int, rank: int, address: str, port: str) -> list[str]:
    """The command that starts this pod's processes.

    More than one process: torch.distributed's launcher, through accelerate, for every strategy; TrainingArguments
    sets DeepSpeed and FSDP up. On CPU, `accelerate launch --cpu` would silently start a single process.
    """
    if plan.world_size == 1 and plan.strategy.startswith("deepspeed"):  # accelerate refuses a group of one
        return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_addr", address, "--master_port", port]
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--num_machines", str(nodes), "--machine_rank", str(rank), "--num_processes", str(plan.world_size)]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # both are TrainingArguments' business
    if plan.world_size > 1:
        command += ["--multi_gpu", "--main_process_ip", address, "--main_process_port", port, "--rdzv_backend", "static"]
    return command


def _wait_for_address(address: str) -> None:
    deadline = time.monotonic() + _ADDRESS_TIMEOUT
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    "MainNotFound", f"rank 0 ({address}) has no address after {_ADDRESS_TIMEOUT} s; does the cluster's DNS answer?"
                ) from None
            time.sleep(0.5)


def _run(command: list[str], env: dict[str, str]) -> int:
    """Run the launcher; a stop of this process stops it too."""
    process = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        return process.wait()
    except Stopped:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise


def _error(document: dict[str, Any]) -> StageError:
    kind = BY_CODE.get(ExitCode(document["code"]), InfrastructureError)
    return kind(document["reason"], document["message"])
