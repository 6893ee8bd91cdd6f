"""Files that others read while they are written: the old or the new one, never half of it. And lists of their digests."""

from __future__ import annotations

from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write aside, then rename."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def parse_digests(text: str) -> dict[str, str]:
    """What `sha256sum` writes, as file name -> SHA-256 in hexadecimal digits."""
    return {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
