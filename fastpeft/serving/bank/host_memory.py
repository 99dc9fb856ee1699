"""What adapters take of the host's memory: those from folders can let their tensors go, and are read again."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import BadCheckpoint
from .adapter import Adapter, Source


def read_lasting(name: str, source: Source, read: Callable[[], Adapter]) -> Adapter:
    """An adapter that reads its tensors again if it must, where they come from a folder whose files stay as they are.

    Args:
        name: of the adapter.
        source: that it is read from.
        read: reads it.

    Returns:
        The adapter, whose ``reread`` raises BadCheckpoint for files that have changed since, or what ``read`` raises.
    """
    before = _stamp(source)
    adapter = read()
    if before is None:
        return adapter

    def again() -> Mapping[Any, Any]:
        tensors = read().tensors
        if _stamp(source) != before or tensors is None:
            raise BadCheckpoint(f"use: the files of {name!r} have changed since it was loaded, expected another load")
        return tensors

    adapter.reread = again
    return adapter


def trim(adapters: Iterable[Adapter], most: int | None) -> None:
    """Let tensors go, of the least recently used adapters first, until those that are left take ``most`` bytes.

    Args:
        adapters: all that are known.
        most: bytes, or None for no bound.
    """
    if most is None:
        return
    held = [adapter for adapter in adapters if adapter.tensors is not None]
    total = sum(adapter.bytes for adapter in held)
    # One that is in a slot needs its tensors again only once it has been evicted.
    for adapter in sorted(held, key=lambda a: (a.slot is None, a.used)):
        if total > most and adapter.reread is not None:
            adapter.tensors = None
            total -= adapter.bytes


def _stamp(source: Source) -> list[tuple[str, int, int]] | None:
    """What tells whether a folder's files have changed, or None where there is no folder."""
    if not isinstance(source, str | os.PathLike) or not os.path.isdir(source):
        return None
    paths = [path for path in sorted(Path(source).iterdir()) if path.suffix in (".json", ".safetensors")]
    return [(path.name, (stat := path.stat()).st_mtime_ns, stat.st_size) for path in paths]
