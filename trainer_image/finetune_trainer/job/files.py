"""Files that others read while they are written: the old or the new one, never half of it. And lists of their digests."""

from __future__ import annotations

import hashlib
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write aside, then rename."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, body: bytes) -> None:
    """Write aside, then rename."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(body)
    partial.replace(path)


def parse_digests(text: str) -> dict[str, str]:
    """What `sha256sum` writes, as file name -> SHA-256 in hexadecimal digits."""
    return {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}


def damaged_file(folder: Path, sums: str) -> str | None:
    """The first file of a list of digests that is there and is not what the list says."""
    for name, digest in parse_digests(sums).items():
        if (folder / name).is_file():
            with (folder / name).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                    return name
    return None
