"""The folder whose checkpoints a server offers. No name and no path from a client leads out of it."""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...methods.formats.files import read_safetensors_bytes
from ...methods.formats.peft_files import CONFIG, WEIGHTS
from ..bank.bank import AdapterBank
from ..errors import BankError, BankFull, UnknownAdapter
from .answers import ApiError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ALPHABET = "1 to 128 letters, digits, '.', '_' and '-', the first a letter or a digit"
_DEPTH = 8
_HUB = "models--"  # what the hub's cache calls ORG/NAME: models--ORG--NAME/snapshots/REVISION


class AdapterFolder:
    """Loads checkpoints under ``root`` into a bank, one at a time; called by any thread.

    A checkpoint's name is that of its sub-folder, or ORG/NAME one level deeper; the hub's cache is read as what it is
    a cache of.

    Args:
        bank: that offers them.
        root: the folder.
        base: the base model's name, which no adapter can have.
        links: further folders into which symbolic links may lead.

    Attributes:
        root: without symbolic links. errors: sub-folders that could not be loaded, and why.
        created: when each adapter was loaded, in seconds since 1970.

    Raises:
        NotADirectoryError: root, or one of links, is no folder.
    """

    def __init__(self, bank: AdapterBank, root: str | Path, base: str, links: Sequence[str | Path] = ()):
        for name, folder in (("root", root), *(("links", link) for link in links)):
            if not Path(folder).is_dir():
                raise NotADirectoryError(f"AdapterFolder: {name} {str(folder)!r} is no folder")
        self.bank, self.root, self.base = bank, Path(root).resolve(strict=True), base
        self._allowed = (self.root, *(Path(link).resolve(strict=True) for link in links))
        self.errors: dict[str, str] = {}
        self.created: dict[str, int] = {}
        self._failed: dict[str, float | None] = {}  # of those in errors, when their config was written
        self._unloaded: set[str] = set()
        self._lock = threading.Lock()

    def scan(self) -> None:
        """Load every sub-folder that has an adapter_config.json; a bad one goes to ``errors`` and stops no other."""
        for name, path in self._found():
            self._try(name, path)

    def discover(self, name: str) -> None:
        """Load what has come into the folder under this name since, if it has; a bad one goes to ``errors``.

        What was unloaded stays so until it is loaded by name.
        """
        path = self.path_of(name)
        if path is not None and name not in self.bank:
            self._try(name, path)

    def path_of(self, name: str) -> str | None:
        """Where in the folder a checkpoint of this name is that ``discover`` would try; reads nothing of it."""
        if name in self._unloaded or not _is_name(name):
            return None
        for path in (name, self._in_hub_cache(_HUB + name.replace("/", "--"))):
            written = None if path is None else _written(self.root / path / CONFIG)
            if written is not None:
                return None if self._failed.get(name) == written else path
        return None

    def load(self, name: str, path: str, replace: bool = False, pin: bool = False) -> None:
        """Read the checkpoint in ``path``, relative to root or absolute within it, and offer it as ``name``.

        Raises:
            ApiError: 400 for a name, a path or a checkpoint that is refused, 404 for a folder that is not there, 503
                for no slot to pin it in. The bank is then as it was.
        """
        self._offer(name, replace, lambda: self.bank.load(name, self.resolve(path), pin=pin))

    def load_bytes(self, name: str, weights: bytes, replace: bool = False, pin: bool = False) -> None:
        """Likewise from a safetensors file in memory, whose metadata holds adapter_config.json as "adapter_config"."""
        try:
            tensors, metadata = read_safetensors_bytes("load", weights)
            config = json.loads(metadata["adapter_config"])
        except (ValueError, KeyError, RecursionError) as error:
            expected = 'a safetensors file whose metadata has adapter_config.json as "adapter_config"'
            given = f"{type(error).__name__}: {error}"
            raise ApiError(400, f"body: {given}, expected {expected}", "body", "bad_checkpoint") from None
        self._offer(name, replace, lambda: self.bank.load(name, tensors, pin=pin, config=config))

    def _offer(self, name: str, replace: bool, load: Callable[[], None]) -> None:
        if not _is_name(name) or name == self.base:
            expected = f"NAME or ORG/NAME, each {_ALPHABET}, and not the base model's name"
            raise ApiError(400, f"lora_name: expected {expected}", "lora_name")
        with self._lock:
            if name in self.bank and not replace:
                raise ApiError(400, f"lora_name: {name!r} is loaded; load_inplace=true replaces it", "lora_name")
            try:
                load()
            except BankFull as error:
                raise ApiError(503, self._public(error), "pin", "bank_full", retry_after=1) from None
            except (BankError, OSError, ImportError, RuntimeError, TypeError, ValueError) as error:
                # RuntimeError: out of memory
                raise ApiError(400, self._public(error), "lora_path", "bad_checkpoint") from None
            self.created[name] = int(time.time())
            self._unloaded.discard(name)
            self._failed.pop(name, None)
            self.errors.pop(name, None)

    def _try(self, name: str, path: str) -> None:
        written = _written(self.root / path / CONFIG)
        try:
            self.load(name, path)
        except ApiError as error:
            if name not in self.bank:  # else another thread has found it first
                self.errors[name], self._failed[name] = error.message, written

    def _found(self) -> Iterator[tuple[str, str]]:
        """Names and paths of the sub-folders with a checkpoint."""
        for entry in sorted(self.root.iterdir()):
            cached = self._in_hub_cache(entry.name)
            if os.path.lexists(entry / CONFIG):
                yield entry.name, entry.name
            elif cached is not None and os.path.lexists(self.root / cached / CONFIG):
                yield entry.name.removeprefix(_HUB).replace("--", "/", 1), cached
            elif entry.is_dir() and cached is None and self._is_inside(entry):
                for inner in sorted(entry.iterdir()):
                    if os.path.lexists(inner / CONFIG):
                        yield f"{entry.name}/{inner.name}", f"{entry.name}/{inner.name}"

    def _in_hub_cache(self, entry: str) -> str | None:
        """The path of the revision that a folder of the hub's cache has as its main one."""
        try:
            revision = (self.root / entry / "refs" / "main").read_text().strip() if entry.startswith(_HUB) else ""
        except (OSError, ValueError):
            return None
        return f"{entry}/snapshots/{revision}" if _NAME.fullmatch(revision) else None

    def unload(self, name: str) -> None:
        """Offer it no more; requests that have begun end as they would. Raises ApiError 404."""
        with self._lock:
            try:
                self.bank.unload(name)
            except UnknownAdapter:
                raise ApiError(
                    404, f"lora_name: no adapter {name!r} is loaded", "lora_name", "model_not_found"
                ) from None
            self.created.pop(name, None)
            if self.path_of(name) is not None:
                self._unloaded.add(name)

    def resolve(self, path: str) -> Path:
        """The folder, without symbolic links, if it and the two files that are read are inside root, or inside links.

        Nothing is opened. Who can write to root while a checkpoint is read is trusted.
        """
        inside = f"{self.root}{os.sep}"
        parts = path.removeprefix(inside).split("/")
        if len(parts) > _DEPTH or any(_NAME.fullmatch(part) is None for part in parts):
            expected = f"a path relative to the served folder, each part {_ALPHABET}"
            raise ApiError(400, f"lora_path: expected {expected}", "lora_path")
        real = Path(os.path.realpath(self.root.joinpath(*parts)))
        for read in (real, *(real / file for file in (CONFIG, WEIGHTS))):
            if not self._is_inside(read):
                raise ApiError(400, f"lora_path: {path!r} leads out of the served folder", "lora_path")
        if not real.is_dir():
            raise ApiError(404, f"lora_path: there is no folder {path!r}", "lora_path")
        return real

    def _is_inside(self, path: Path) -> bool:
        real = Path(os.path.realpath(path))
        return any(real.is_relative_to(allowed) for allowed in self._allowed)

    def _public(self, error: Exception) -> str:
        return str(error).replace(f"{self.root}{os.sep}", "")


def _is_name(name: str) -> bool:
    """NAME or ORG/NAME."""
    parts = name.split("/")
    return len(parts) <= 2 and all(_NAME.fullmatch(part) for part in parts)


def _written(config: Path) -> float | None:
    """When a file was, or None if there is none."""
    try:
        return config.stat().st_mtime if config.is_file() else None
    except OSError:
        return None
