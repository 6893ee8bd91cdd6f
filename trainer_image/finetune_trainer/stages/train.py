"""train: start the training processes of this pod, watch over them, and turn their end into an exit code.

    python -m finetune_trainer train --job job.json --workspace DIR

Needs what prepare wrote. This process starts no torch and knows nothing of models: what each of the processes does is in
worker.py, beside this file.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile

from finetune_api.contract import Env, StageResult
from finetune_api.scalars import seconds
from finetune_api.status import Plan

from ..checkpointing.checkpoints import latest_step
from ..job.context import Context
from ..job.unused import LEFT_OUT, unused_packages
from ..process.errors import InfrastructureError, StageError
from ..process.ipc import Channel
from ..process.supervise import Supervisor
from ..training.launch import check_device_count, count_gpus, cpu_environment, launch_command, wait_for_address

log = logging.getLogger("finetune.train")


def train(context: Context) -> StageResult:
    """Run the stage on this pod. Raises the StageError that its processes ended with."""
    # 1. Who we are: this pod's place in the gang, and what it has
    plan, spec = _plan(context), context.spec.distribution
    rank, nodes = int(os.environ.get(Env.RANK, "0")), plan.nodes(spec.gpus_per_node)
    gpus, processes = count_gpus(), plan.world_size // nodes
    check_device_count(spec.gpus_per_node, gpus)

    # 2. Where rank 0 is
    address, port = os.environ.get(Env.MAIN_ADDRESS, "127.0.0.1"), os.environ.get(Env.MAIN_PORT, "29500")
    if rank != 0:
        wait_for_address(address)

    # 3. One process per GPU, or several where there is none, and what they are told
    launcher, rank_env = launch_command(plan, nodes, rank, address, port)
    command = [*launcher, "-m", "finetune_trainer", "worker"]
    command += ["--job", os.environ["FINETUNE_JOB_FILE"], "--workspace", context.workspace]
    env = {**os.environ, Env.PLAN: json.dumps(plan.to_wire()), LEFT_OUT: " ".join(unused_packages(context))}
    if not (gpus and spec.gpus_per_node):
        env |= cpu_environment(plan.strategy, processes)
    log.info("rank %d of %d nodes: %d process(es), %s, %s", rank, nodes, processes, plan.strategy, "GPU" if gpus else "CPU")

    # 4. Until they end, are stopped, or hang
    try:
        result = _supervise(context, command, {**env, **rank_env})
    except StageError as failure:
        if (step := latest_step(context.layout.checkpoints)) is not None:
            failure.details.setdefault("checkpointStep", step)
        raise
    return result or StageResult(reason="Trained", message=f"node {rank} is done")


def _plan(context: Context) -> Plan:
    """The plan of this attempt, which the operator may have changed (a smaller batch after running out of memory), or prepare's."""
    given = os.environ.get(Env.PLAN)
    return Plan.model_validate(json.loads(given) if given else context.read_json(context.layout.plan))


def _supervise(context: Context, command: list[str], env: dict[str, str]) -> StageResult | None:
    """Rank 0's result, None on other pods. Raises the StageError that the processes ended with."""
    timeout = context.spec.run_policy.hang_timeout
    with tempfile.TemporaryDirectory() as folder:
        channel = Channel(folder)
        code = Supervisor(channel, seconds(timeout) if timeout else None).run(command, env)
        if (error := channel.error()) is not None:
            raise error
        if code != 0:
            message = f"a training process ended without a word (launcher exit {code}); it was probably killed"
            raise InfrastructureError("ProcessDied", message)
        return channel.result()
