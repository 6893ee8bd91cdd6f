"""A trainer that only takes time: what the operator and the scheduler do is measured, not torch. Standard library alone."""

import json
import os
import signal
import sys
import time
import types

DATA = {
    "dataset": {"train": 90, "eval": 0, "tokens": 1000, "format": "messages", "digest": "sha256:00"},
    "plan": {"worldSize": 1, "perDeviceBatchSize": 1, "gradientAccumulation": 64, "strategy": "ddp", "totalSteps": 10, "reason": ""},
}


def end(code: int, reason: str, result: dict[str, object]) -> None:
    """Last words, as the trainer says them."""
    with open("/dev/termination-log", "w") as log:
        json.dump({"reason": reason, "message": reason, "result": result}, log)
    os._exit(code)


def stop(_number: int, _frame: types.FrameType | None) -> None:
    """Save and go."""
    end(13, "Stopped", {"checkpointStep": 5})


def main() -> None:
    """prepare, or train for a few seconds."""
    with open("/etc/finetune/job/job.json") as file:
        spec = json.load(file)["spec"]
    distribution = spec["distribution"]
    if sys.argv[1] == "prepare":
        world = distribution["nodes"] * max(1, distribution["gpusPerNode"])
        DATA["plan"].update(worldSize=world, gradientAccumulation=64 // world)
        end(0, "DataReady", dict(DATA))
    signal.signal(signal.SIGTERM, stop)
    time.sleep(spec["tuning"]["hyperparameters"]["maxSteps"])
    end(0, "Trained", {"steps": 10, "loss": 0.5, "checkpointStep": 10})


if __name__ == "__main__":
    main()
