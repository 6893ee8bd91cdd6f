"""The processes of a pod: which devices they find, and the command that starts them. Starts no torch itself: that would take seconds."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import time

from finetune_api.contract import Env
from finetune_api.status import Plan

from ..process.errors import InfrastructureError

log = logging.getLogger("finetune.train")
_ADDRESS_TIMEOUT = 300


def count_gpus() -> int:
    """GPUs of this pod by their device files; importing torch to ask would take seconds. The workers look again."""
    return len([entry for entry in os.listdir("/dev") if re.fullmatch(r"nvidia[0-9]+", entry)]) if os.path.isdir("/dev") else 0


def check_device_count(wanted: int, found: int) -> None:
    """Raise InfrastructureError when a pod does not see the GPUs that the job asked for."""
    if wanted == 0 or found == wanted:
        return
    if found == 0 and os.environ.get(Env.ALLOW_CPU) == "1":
        log.warning("no GPU is found, training on CPU: %s is set", Env.ALLOW_CPU)
        return
    raise InfrastructureError(
        "DeviceMismatch", f"the job asked for {wanted} GPU(s) per node, this pod sees {found}; check the driver and the image's CUDA"
    )


def wait_for_address(address: str) -> None:
    """Wait until rank 0's name has an address. Raises InfrastructureError when it gets none."""
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


def launch_command(plan: Plan, nodes: int, rank: int, address: str, port: str) -> tuple[list[str], dict[str, str]]:
    """The command that starts this pod's processes, and its environment.

    One process per pod needs no launcher: it is told its rank as torchrun would, and starts seconds sooner. Several are
    started by torch.distributed's launcher, through accelerate, for every strategy; TrainingArguments sets DeepSpeed and
    FSDP up. On CPU, `accelerate launch --cpu` would silently start a single process.
    """
    local = plan.world_size // nodes
    place = {"MASTER_ADDR": address, "MASTER_PORT": port}
    if local == 1:
        alone = plan.world_size == 1 and plan.strategy == "ddp"
        ranks = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(plan.world_size), "LOCAL_WORLD_SIZE": "1", **place}
        return [sys.executable], {} if alone else ranks
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--num_machines", str(nodes), "--machine_rank", str(rank), "--num_processes", str(plan.world_size)]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # both are TrainingArguments' business
    command += ["--multi_gpu", "--main_process_ip", address, "--main_process_port", port, "--rdzv_backend", "static"]
    return command, {}


def cpu_environment(strategy: str, local: int) -> dict[str, str]:
    """What `local` processes of a pod without GPUs are told."""
    threads = max(1, (os.cpu_count() or 1) // max(1, local))
    env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), "CUDA_VISIBLE_DEVICES": ""}
    # accelerate leaves DeepSpeed out in silence and runs DDP when it is told to use the CPU; without a GPU it does so anyway
    if strategy == "fsdp":
        return env
    return {**env, "DS_ACCELERATOR": "cpu"} if strategy.startswith("deepspeed") else {**env, "ACCELERATE_USE_CPU": "true"}
