"""Which prompts a model learned from, and which of other rows are among them: by digest, whatever format the rows have."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from .scan import first_prompt
from .shape import Shape

_BYTES = 8


def prompt_key(shape: Shape) -> bytes:
    """The first bytes of the SHA-256 of what stands before a row's first answer; of a plain text, of all of it."""
    first = first_prompt(shape)
    asked = next((first[key] for key in ("messages", "prompt", "text") if key in first), None)
    text = json.dumps([asked, first.get("tools")], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:_BYTES]


def prompt_keys(path: str) -> bytes:
    """Of all rows of a prepared file: sorted, each once, one after the other."""
    found: set[bytes] = set()
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024, columns=["row"]):
            found.update(prompt_key(json.loads(row)) for row in batch.column(0).to_pylist())
    return b"".join(sorted(found))


def unseen(shapes: list[Shape], learned: np.ndarray[Any, Any]) -> list[int]:
    """Places of the rows whose prompt is not among those learned from (digests as uint64)."""
    own = np.frombuffer(b"".join(map(prompt_key, shapes)), ">u8").astype(np.uint64)
    return [int(place) for place in np.flatnonzero(~np.isin(own, learned))]
