"""The order of the rows: one for a seed, whatever the world size, the per-device batch and where a run was resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

_BATCHES_SORTED = 50
"""Global batches whose rows are sorted among themselves: more would leave less to chance."""


class GlobalBatchSampler(Sampler[int]):
    """Row numbers of one epoch, shuffled by seed and epoch, in whole global batches.

    The last batch is completed with the epoch's first rows; libraries complete it too, but to another size for every
    number of processes, so the same job would learn from other rows. The epoch follows from the steps done: accelerate's
    `set_epoch` does not reach a sampler behind the two wrappers of several processes and skipped batches, so a run that was
    resumed inside a later epoch would see the first epoch's order again.
    """

    def __init__(
        self, rows: int, global_batch: int, seed: int, steps_done: Callable[[], int], lengths: Sequence[int] | None = None
    ) -> None:
        self._rows, self._batch, self._seed, self._steps_done, self._lengths = rows, global_batch, seed, steps_done, lengths

    def __len__(self) -> int:
        return -(-self._rows // self._batch) * self._batch

    def __iter__(self) -> Iterator[int]:
        epoch = self._steps_done() // (len(self) // self._batch)
        generator = torch.Generator().manual_seed(self._seed + 1_000_003 * epoch)
        order = torch.randperm(self._rows, generator=generator).tolist()
        whole = [order[place % self._rows] for place in range(len(self))]
        yield from whole if self._lengths is None else self._by_length(whole, self._lengths, generator)

    def _by_length(self, order: list[int], lengths: Sequence[int], generator: torch.Generator) -> Iterator[int]:
        """Rows of like length in one global batch, as transformers' group_by_length does; the longest batch first: it shows what fits."""
        window = self._batch * _BATCHES_SORTED
        batches: list[list[int]] = []
        for start in range(0, len(order), window):
            part = sorted(order[start : start + window], key=lambda row: -lengths[row])
            batches += [part[i : i + self._batch] for i in range(0, len(part), self._batch)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        longest = max(shuffled, key=lambda batch: lengths[batches[batch][0]])
        for batch in [longest, *(b for b in shuffled if b != longest)]:
            yield from batches[batch]


class GlobalBatchOrder:
    """Mixed into trainers: their rows come in this order."""

    args: Any
    state: Any
    train_dataset: Any
    sorts_by_length = False
    """Whether rows of like length share a batch: less padding where rows are not packed."""

    def _get_train_sampler(self, train_dataset: Any = None) -> GlobalBatchSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        lengths = [len(ids) for ids in dataset["input_ids"]] if self.sorts_by_length else None
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return GlobalBatchSampler(len(dataset), batch, self.args.data_seed, lambda: int(self.state.global_step), lengths)
