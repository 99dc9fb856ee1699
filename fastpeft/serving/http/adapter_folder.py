"""The folder whose checkpoints a server offers. No name and no path from a client leads out of it."""

import os
import re
import threading
import time
from pathlib import Path

from ...methods.formats.peft_files import CONFIG, WEIGHTS
from ..bank.bank import AdapterBank
from ..errors import BankError, BankFull, UnknownAdapter
from .answers import ApiError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ALPHABET = "1 to 128 letters, digits, '.', '_' and '-', the first a letter or a digit"
_DEPTH = 8


class AdapterFolder:
    """Loads checkpoints under ``root`` into a bank, one at a time; called by any thread.

    Attributes:
        root: without symbolic links. errors: sub-folders that ``scan`` could not load, and why.
        created: when each adapter was loaded, in seconds since 1970.

    Raises:
        NotADirectoryError: root is no folder.
    """

    def __init__(self, bank: AdapterBank, root: str | Path, base: str):
        if not Path(root).is_dir():
            raise NotADirectoryError(f"AdapterFolder: root {str(root)!r} is no folder")
        self.bank, self.root, self.base = bank, Path(root).resolve(strict=True), base
        self.errors: dict[str, str] = {}
        self.created: dict[str, int] = {}
        self._lock = threading.Lock()

    def scan(self) -> None:
        """Load every sub-folder that has an adapter_config.json; a bad one goes to ``errors`` and stops no other."""
        for entry in sorted(self.root.iterdir()):
            if os.path.lexists(entry / CONFIG):
                try:
                    self.load(entry.name, entry.name)
                except ApiError as error:
                    self.errors[entry.name] = error.message

    def load(self, name: str, path: str, replace: bool = False, pin: bool = False) -> None:
        """Read the checkpoint in ``path``, relative to root or absolute within it, and offer it as ``name``.

        Raises:
            ApiError: 400 for a name, a path or a checkpoint that is refused, 404 for a folder that is not there, 503
                for no slot to pin it in. The bank is then as it was.
        """
        if _NAME.fullmatch(name) is None or name == self.base:
            raise ApiError(400, f"lora_name: expected {_ALPHABET}, and not the base model's name", "lora_name")
        with self._lock:
            if name in self.bank and not replace:
                raise ApiError(400, f"lora_name: {name!r} is loaded; load_inplace=true replaces it", "lora_name")
            folder = self.resolve(path)
            try:
                self.bank.load(name, folder, pin=pin)
            except BankFull as error:
                raise ApiError(503, self._public(error), "pin", "bank_full", retry_after=1) from None
            except (BankError, OSError, ImportError, RuntimeError) as error:  # RuntimeError: out of memory
                raise ApiError(400, self._public(error), "lora_path", "bad_checkpoint") from None
            self.created[name] = int(time.time())
            self.errors.pop(name, None)

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

    def resolve(self, path: str) -> Path:
        """The folder, without symbolic links, if it and the two files that are read are inside root.

        Nothing is opened. Who can write to root while a checkpoint is read is trusted.
        """
        inside = f"{self.root}{os.sep}"
        parts = path.removeprefix(inside).split("/")
        if len(parts) > _DEPTH or any(_NAME.fullmatch(part) is None for part in parts):
            expected = f"a path relative to the served folder, each part {_ALPHABET}"
            raise ApiError(400, f"lora_path: expected {expected}", "lora_path")
        real = Path(os.path.realpath(self.root.joinpath(*parts)))
        for read in (real, *(Path(os.path.realpath(real / file)) for file in (CONFIG, WEIGHTS))):
            if not read.is_relative_to(self.root):
                raise ApiError(400, f"lora_path: {path!r} leads out of the served folder", "lora_path")
        if not real.is_dir():
            raise ApiError(404, f"lora_path: there is no folder {path!r}", "lora_path")
        return real

    def _public(self, error: Exception) -> str:
        return str(error).replace(f"{self.root}{os.sep}", "")
