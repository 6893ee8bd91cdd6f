"""The order of the rows: one for a seed, whatever the world size, the per-device batch and where a run was resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


class GlobalBatchSampler(Sampler[int]):
    """Row numbers of one epoch, shuffled by seed and epoch, in whole global batches.

    The last batch is completed with the epoch's first rows; libraries complete it too, but to another size for every
    number of processes, so the same job would learn from other rows. The epoch follows from the steps done: accelerate's
    `set_epoch` does not reach a sampler behind the two wrappers of several processes and skipped batches, so a run that was
    resumed inside a later epoch would see the first epoch's order again.
    """

    def __init__(self, rows: int, global_batch: int, seed: int, steps_done: Callable[[], int]) -> None:
        self._rows, self._batch, self._seed, self._steps_done = rows, global_batch, seed, steps_done

    def __len__(self) -> int:
        return -(-self._rows // self._batch) * self._batch

    def __iter__(self) -> Iterator[int]:
        epoch = self._steps_done() // (len(self) // self._batch)
        generator = torch.Generator().manual_seed(self._seed + 1_000_003 * epoch)
        order = torch.randperm(self._rows, generator=generator).tolist()
        for place in range(len(self)):
            yield order[place % self._rows]


class GlobalBatchOrder:
    """Mixed into trainers: their rows come in this order."""

    args: Any
    state: Any
    train_dataset: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> GlobalBatchSampler:
        rows = len(train_dataset if train_dataset is not None else self.train_dataset)
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return GlobalBatchSampler(rows, batch, self.args.data_seed, lambda: int(self.state.global_step))
