"""A bank of LoRA adapters around one model: each row of a batch uses its own.

    bank = AdapterBank(model, slots=8, max_rank=64)
    bank.load("alice", "adapters/alice")
    bank.generate(input_ids, adapters=["alice", None], max_new_tokens=32)

Any number of adapters is known, in host memory; those that a batch needs are brought into slots on the device, where
the least recently used make room. A batch holds a lease on its adapters, so no load or eviction changes what it sees.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ... import _check
from ..errors import BankError, BankFull, UnknownAdapter
from .adapter import Adapter, read_adapter
from .batch import Batch, Running
from .lease import Lease
from .sites import find_sites, refuse_adapted
from .slots import Slots


class AdapterBank:
    """Attaches itself to ``model`` in place; ``close()`` restores the model. All methods may be called by any thread.

    Args:
        model: with its layers on one device. Parameters, names and state dict stay as they are.
        slots: adapters on the device at once, and so the most that one batch can use.
        max_rank: the largest rank that is served.
        dtype: of the slots; None is each layer's own.
        targets: the layers that adapters may touch, as in ``fastpeft.Lora``: a pattern or a list of names or their
            ends; "all-linear" stands for every linear layer, embedding and head. Memory, ``slots * max_rank * (K + N)``
            numbers a layer, is taken when the first adapter that touches the layer is loaded.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int = 8,
        max_rank: int = 64,
        dtype: torch.dtype | None = None,
        targets: object = "all-linear",
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"AdapterBank: model is {type(model).__name__}, expected a torch.nn.Module")
        _check.positive("AdapterBank", "slots", slots)
        _check.positive("AdapterBank", "max_rank", max_rank)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"AdapterBank: dtype is {dtype!r}, expected a floating-point torch.dtype or None")
        refuse_adapted("AdapterBank", model)
        self.model, self.max_rank = model, max_rank
        self._sites = find_sites("AdapterBank", model, targets, dtype)
        self.device = self._sites[0].device
        self._slots = Slots(slots, self._sites, max_rank)
        self._lock = threading.RLock()
        self._known: dict[str, Adapter] = {}
        self._running = Running()
        self._closed = False
        for site in self._sites:
            site.attach(self._running)

    @property
    def slots(self) -> int:
        return len(self._slots.held)

    def load(self, name: str, source: object, pin: bool = False, config: object = None) -> None:
        """Make an adapter known, under a new name or in place of the adapter of that name.

        What replaces an adapter keeps its pin; batches and leases that hold the old one keep it to their end. If a slot
        is free the adapter is copied there at once.

        Args:
            source: the folder of a PEFT checkpoint (safetensors), or its state dict with ``config``, a dict or
                ``peft.LoraConfig``. Served are LoRA and rsLoRA of any rank up to ``max_rank`` with patterns, on linear
                layers, embeddings and the head; bias="none".
            pin: keep it in a slot.

        Raises:
            BadCheckpoint: why it is not served. FileNotFoundError. BankFull: no slot to pin it in. The bank is then as
            it was.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"load: name is {name!r}, expected a string that is not empty")
        adapter = read_adapter("load", name, source, config, self.model, self._sites, self.max_rank)
        with self._lock:
            self._open("load")
            old = self._known.get(name)
            pin = pin or (old is not None and old.pinned)
            made = self._slots.make_tables(adapter)
            if old is not None and old.slot is not None and not old.leases:
                self._slots.vacate(old)  # nobody holds it, so there is a slot for the new one
            try:
                if pin or None in self._slots.held:
                    self._slots.bring("load", [adapter])
            except BankFull:
                self._slots.drop_tables(made)
                raise
            adapter.pinned = pin
            self._known[name] = adapter
            if old is not None:
                self._retire(old)

    def unload(self, name: str) -> None:
        """Forget an adapter; batches and leases that hold it keep it to their end. Raises UnknownAdapter."""
        with self._lock:
            adapter = self._find("unload", name)
            del self._known[name]
            self._retire(adapter)

    def pin(self, name: str) -> None:
        """Bring an adapter into a slot and keep it there. Raises UnknownAdapter, BankFull."""
        with self._lock:
            adapter = self._find("pin", name)
            self._slots.bring("pin", [adapter])
            adapter.pinned = True

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again. Raises UnknownAdapter."""
        with self._lock:
            self._find("unpin", name).pinned = False

    def names(self) -> list[str]:
        """All adapters that are known, in the order in which they were loaded."""
        with self._lock:
            return list(self._known)

    def resident(self) -> list[str]:
        """The known adapters that are in slots, least recently used first."""
        with self._lock:
            return [a.name for a in sorted(self._known.values(), key=lambda a: a.used) if a.slot is not None]

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._known

    def lease(self, name: str) -> Lease:
        """Hold an adapter as it is now, in a slot, for as long as a request lasts; ``use`` takes the lease as a name.

        Raises:
            UnknownAdapter, BankFull.
        """
        return Lease(self, self._acquire("lease", [name])[0])

    @contextlib.contextmanager
    def use(
        self,
        adapters: Sequence["str | Lease | None"],
        lengths: Sequence[int] | None = None,
        picked: Sequence[int] | None = None,
    ) -> Iterator["AdapterBank"]:
        """Inside, forwards of the model in this thread use one adapter for each row of the batch; no gradients.

        Args:
            adapters: a name, a lease or None (the bare model) for each row. A batch whose first dimension is a multiple
                of the rows repeats each row in place, as beams do; any other is an error.
            lengths: None, or the number of tokens of each row in tensors that hold the rows one after the other.
            picked: with lengths, the places of those tokens that alone reach the head (``logits_to_keep``).

        Raises:
            UnknownAdapter, BankFull: before anything runs. On CUDA, forwards run on the stream current on entry.
        """
        adapters = _rows("use", adapters, lengths)
        held = self._acquire("use", [a for a in adapters if a is not None])
        try:
            slots = iter([adapter.slot for adapter in held])
            batch = None
            if held:
                rows = [-1 if a is None else next(slots) for a in adapters]
                with torch.inference_mode(False):
                    batch = Batch(rows, lengths, picked, self.slots, self.device)
                for adapter in {id(a): a for a in held}.values():
                    self._slots.copies.wait(adapter.ready)
            outer, self._running.batch = self._running.batch, batch
            try:
                with torch.no_grad():
                    yield self
            finally:
                self._running.batch = outer
                self._slots.copies.read({adapter.slot for adapter in held})
        finally:
            self._release(held)

    def generate(
        self, input_ids: Tensor | None = None, *, adapters: Sequence["str | Lease | None"], **generate_kwargs
    ) -> object:
        """``model.generate`` with one adapter, or None, for each row of ``input_ids [B, L]``."""
        inputs = next(
            (t for t in (input_ids, *map(generate_kwargs.get, ("inputs", "inputs_embeds"))) if t is not None), None
        )
        rows = len(_rows("generate", adapters, None))
        if inputs is None or len(inputs) != rows:
            given = "missing" if inputs is None else f"of {len(inputs)} rows"
            raise ValueError(f"generate: input_ids is {given}, but adapters has {rows}")
        with self.use(adapters):
            if input_ids is None:
                return self.model.generate(**generate_kwargs)
            return self.model.generate(input_ids, **generate_kwargs)

    def close(self) -> None:
        """Take the bank off the model, which is then as it was, bit for bit. A second call does nothing.

        Raises:
            BankError: a batch or a lease still holds an adapter.
        """
        with self._lock:
            if self._closed:
                return
            held = [a.name for a in self._slots.held if a is not None and a.leases]
            if held:
                raise BankError(f"close: adapters are in use: {', '.join(held)}")
            self._slots.copies.synchronize()
            for site in self._sites:
                site.detach()
            self._closed = True
            self._known.clear()
            self._slots = None

    def __enter__(self) -> "AdapterBank":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _open(self, op: str) -> None:
        if self._closed:
            raise BankError(f"{op}: the bank is closed")

    def _find(self, op: str, name: object) -> Adapter:
        self._open(op)
        if not isinstance(name, str) or name not in self._known:
            known = ", ".join(list(self._known)[:8]) or "none"
            raise UnknownAdapter(f"{op}: no adapter {name!r}, expected one of those loaded: {known}")
        return self._known[name]

    def _acquire(self, op: str, wanted: Sequence["str | Lease"]) -> list[Adapter]:
        """Adapters in slots, each with one lease more for each time that it is named; all or none."""
        with self._lock:
            self._open(op)
            adapters = [a.held(op, self) if isinstance(a, Lease) else self._find(op, a) for a in wanted]
            self._slots.bring(op, list({id(a): a for a in adapters}.values()))
            for adapter in adapters:
                adapter.leases += 1
            return adapters

    def _release(self, adapters: Sequence[Adapter]) -> None:
        with self._lock:
            for adapter in adapters:
                adapter.leases -= 1
                if adapter.retired:
                    self._retire(adapter)

    def _retire(self, adapter: Adapter) -> None:
        adapter.retired, adapter.pinned = True, False
        if not adapter.leases and adapter.slot is not None:
            self._slots.vacate(adapter)


def _rows(op: str, adapters: object, lengths: object) -> list:
    if isinstance(adapters, str) or not isinstance(adapters, Sequence) or not adapters:
        raise TypeError(f"{op}: adapters is {adapters!r}, expected a list with a name or None for each row")
    if lengths is not None and (len(lengths) != len(adapters) or any(n < 0 for n in lengths)):
        raise ValueError(f"{op}: lengths is {list(lengths)}, expected a length for each of {len(adapters)} rows")
    return list(adapters)
