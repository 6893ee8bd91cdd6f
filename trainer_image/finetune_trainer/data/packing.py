"""How many sequences rows are packed into, from their lengths alone."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from itertools import islice

BATCH = 1000
"""Rows that are packed among themselves: the batch of `datasets.map`, which TRL's packing goes through."""


def packed_sequences(lengths: Iterable[int], size: int) -> int:
    """Sequences of `size` tokens that TRL packs rows of these lengths into: best fit, longest first, batch by batch."""
    iterator, count = iter(lengths), 0
    while batch := list(islice(iterator, BATCH)):
        room: list[int] = []  # left in each sequence, ascending
        for length in sorted((min(length, size) for length in batch), reverse=True):
            place = bisect_left(room, length)
            if place == len(room):
                count += 1
                left = size - length
            else:
                left = room.pop(place) - length
            if left:
                insort(room, left)
    return count
