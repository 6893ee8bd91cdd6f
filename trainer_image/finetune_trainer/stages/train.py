"""train: launch the worker processes of this pod, and turn their end into an exit code.

This process starts no torch: it looks at the pod's devices, waits for rank 0's address, and watches over the launcher (supervise).
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import tempfile
import time
from typing import Any

from finetune_api.contract import Env, ExitCode, StageResult
from finetune_api.scalars import seconds
from finetune_api.status import Plan

from ..checkpointing.checkpoints import newest_step
from ..job.context import Context
from ..process.errors import BY_CODE, InfrastructureError, StageError
from ..process.ipc import Scratch
from ..process.supervise import Supervisor

log = logging.getLogger("finetune.train")
_ADDRESS_TIMEOUT = 300


def train(context: Context) -> StageResult:
    """Run the stage on this pod. Raises the StageError that its processes ended with."""
    plan = _plan(context)
    spec = context.spec.distribution
    rank = int(os.environ.get(Env.RANK, "0"))
    nodes = plan.nodes(spec.gpus_per_node)
    local = plan.world_size // nodes
    cuda = _gpus()
    check_devices(spec.gpus_per_node, cuda)
    address, port = os.environ.get(Env.MAIN_ADDRESS, "127.0.0.1"), os.environ.get(Env.MAIN_PORT, "29500")
    if rank != 0:
        _wait_for_address(address)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Scratch(folder)
        env = {
            **os.environ,
            Env.PLAN: json.dumps(plan.to_wire()),
            **({} if cuda and spec.gpus_per_node else _cpu_environment(plan.strategy, local)),
        }
        launcher, ranks = _launcher(plan, nodes, rank, address, port)
        command = [*launcher, "-m", "finetune_trainer.stages.worker"]
        command += ["--job", os.environ["FINETUNE_JOB_FILE"], "--workspace", context.workspace]
        log.info("rank %d of %d nodes: %d process(es), %s, %s", rank, nodes, local, plan.strategy, "GPU" if cuda else "CPU")
        try:
            found = _supervised(context, scratch, command, {**env, **ranks})
        except StageError as failure:
            if (step := newest_step(context.layout.checkpoints)) is not None:
                failure.found.setdefault("checkpointStep", step)
            raise
    return found or StageResult(reason="Trained", message=f"node {rank} is done")


def _supervised(context: Context, scratch: Scratch, command: list[str], env: dict[str, str]) -> StageResult | None:
    """Rank 0's result, None on other pods. Raises the StageError that the processes ended with."""
    timeout = context.spec.run_policy.hang_timeout
    code = Supervisor(scratch, seconds(timeout) if timeout else None).run(command, env)
    if scratch.error.exists():
        raise _error(json.loads(scratch.error.read_text()))
    if code != 0:
        raise InfrastructureError("ProcessDied", f"a training process ended without a word (launcher exit {code}); it was probably killed")
    return StageResult.model_validate(json.loads(scratch.result.read_text())) if scratch.result.exists() else None


def _plan(context: Context) -> Plan:
    given = os.environ.get(Env.PLAN)
    return Plan.model_validate(json.loads(given) if given else context.read_json(context.layout.plan))


def _gpus() -> int:
    """GPUs of this pod by their device files; importing torch to ask would take seconds. The workers look again."""
    return len([entry for entry in os.listdir("/dev") if re.fullmatch(r"nvidia[0-9]+", entry)]) if os.path.isdir("/dev") else 0


def check_devices(wanted: int, found: int) -> None:
    """Raise InfrastructureError when a pod does not see the GPUs that the job asked for."""
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
    if strategy == "fsdp":
        return env
    return {**env, "DS_ACCELERATOR": "cpu"} if strategy.startswith("deepspeed") else {**env, "ACCELERATE_USE_CPU": "true"}


def _launcher(plan: Plan, nodes: int, rank: int, address: str, port: str) -> tuple[list[str], dict[str, str]]:
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


def _error(document: dict[str, Any]) -> StageError:
    kind = BY_CODE.get(ExitCode(document["code"]), InfrastructureError)
    return kind(document["reason"], document["message"], document.get("result"))
