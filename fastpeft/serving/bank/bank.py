"""A bank of LoRA adapters around one model: each row of a batch uses its own.

    bank = AdapterBank(model, slots=8, max_rank=64)
    bank.load("alice", "adapters/alice")
    bank.generate(input_ids, adapter_names=["alice", None], max_new_tokens=32)

Any number of adapters is known, in host memory; those that a batch needs are brought into slots on the device, where
the least recently used make room. A batch holds a lease on its adapters, so no load or eviction changes what it sees.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import _check
from .adapter import read_adapter
from .batch import Batch, Running
from .experts import attach_experts, expert_sites
from .host_memory import read_lasting
from .known import Known
from .lease import Lease, checked_rows
from .sites import find_sites, refuse_adapted
from .slots import Slots


class AdapterBank:
    """Attaches itself to ``model`` in place; ``close()`` restores the model. All methods may be called by any thread.

    Args:
        model: any module, its layers on one device. Parameters, names and state dict stay as they are.
        slots: how many adapters are on the device at once, and so the most that one batch can use.
        max_rank: the largest rank that is served.
        dtype: of the slots; None is each layer's own.
        targets: the layers that adapters may touch, as in ``fastpeft.Lora``: a pattern or a list of names or their
            ends; "all-linear" stands for every linear layer, embedding, head and weight of experts. Memory, ``slots *
            max_rank * (K + N)`` numbers a layer, so many for each expert, is taken when the first adapter that touches
            the layer is loaded.

        host_bytes: what the adapters' tensors may take of the host's memory; those that came from folders are let go,
            the least recently used first, and read again when a batch needs them. None is no bound.

    Attributes:
        model: as given.
        max_rank: as given.
        device: of the model's layers.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: ``slots`` or ``max_rank`` is below 1, no layer matches ``targets``, the layers are on several
            devices, or the model has adapters or a bank already.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int = 8,
        max_rank: int = 64,
        dtype: torch.dtype | None = None,
        targets: str | Sequence[str] = "all-linear",
        host_bytes: int | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"AdapterBank: model is {_check.shown(model)}, expected a torch.nn.Module")
        _check.positive("AdapterBank", "slots", slots)
        _check.positive("AdapterBank", "max_rank", max_rank)
        if host_bytes is not None:
            _check.positive("AdapterBank", "host_bytes", host_bytes)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(
                f"AdapterBank: dtype is {_check.shown(dtype)}, expected a floating-point torch.dtype or None"
            )
        refuse_adapted("AdapterBank", model)
        self.model, self.max_rank = model, max_rank
        experts = expert_sites("AdapterBank", model, targets, dtype)
        self._sites = find_sites("AdapterBank", model, targets, dtype, experts)
        self.device = self._sites[0].device
        self._slots = Slots(slots, self._sites, max_rank)
        self._known = Known(self._slots, host_bytes)
        self._running = Running()
        for site in self._sites:
            site.attach(self._running)
        self._experts = attach_experts(experts, self._running)

    @property
    def slots(self) -> int:
        """How many adapters are on the device at once."""
        return len(self._slots.held)

    def load(
        self,
        name: str,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        pin: bool = False,
        config: object = None,
    ) -> None:
        """Make an adapter known, under a new name or in place of the adapter of that name.

        What replaces an adapter keeps its pin; batches and leases that hold the old one keep it to their end. If a slot
        is free the adapter is copied there at once.

        Args:
            name: what batches call it by.
            source: the folder of a PEFT checkpoint (safetensors), or its state dict. Served are LoRA and rsLoRA of any
                rank up to ``max_rank`` with patterns, on linear layers, embeddings, the head and weights of experts,
                with bias="none", and DoRA on linear layers.
            pin: keep it in a slot.
            config: beside a state dict, the fields of adapter_config.json as a dict, or ``peft.LoraConfig``; with a
                folder None, or what is to stand for its adapter_config.json.

        Raises:
            BadCheckpoint: it is not served, and why. The bank is as it was, as after every error here.
            BankFull: there is no slot to pin it in.
            FileNotFoundError: a file of the checkpoint, or the folder, is missing.
            TypeError: ``source`` or ``config`` is of another kind.
            ValueError: ``name`` is empty or no string.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"load: name is {_check.shown(name)}, expected a string that is not empty")
        of = config, self.model, self._sites, self.max_rank
        adapter = read_lasting(name, source, lambda: read_adapter("load", name, source, *of))
        self._known.add("load", adapter, pin)

    def unload(self, name: str) -> None:
        """Forget an adapter; batches and leases that hold it keep it to their end.

        Args:
            name: as it was loaded.

        Raises:
            UnknownAdapter: no adapter has that name.
        """
        self._known.remove("unload", name)

    def pin(self, name: str) -> None:
        """Bring an adapter into a slot and keep it there until ``unpin`` or ``unload``.

        Args:
            name: as it was loaded.

        Raises:
            UnknownAdapter: no adapter has that name.
            BankFull: every slot is pinned or in use.
        """
        self._known.pin("pin", name)

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again.

        Args:
            name: as it was loaded.

        Raises:
            UnknownAdapter: no adapter has that name.
        """
        self._known.unpin("unpin", name)

    def names(self) -> list[str]:
        """All adapters that are known, in the order in which they were loaded."""
        return self._known.names()

    def resident(self) -> list[str]:
        """The known adapters that are in slots, least recently used first."""
        return self._known.resident()

    def version(self, name: str) -> int:
        """Which of all loads gave the adapter that this name stands for now: what replaces it has a larger number.

        Args:
            name: as it was loaded.

        Raises:
            UnknownAdapter: no adapter has that name.
        """
        return self._known.version("version", name)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def lease(self, name: str) -> Lease:
        """Hold an adapter as it is now, in a slot, for as long as a request lasts; ``use`` takes the lease as a name.

        Args:
            name: as it was loaded.

        Raises:
            UnknownAdapter: no adapter has that name.
            BankFull: every slot is pinned or in use.
        """
        return self._lease("lease", name)

    def _lease(self, op: str, name: str) -> Lease:
        """``lease``, whose errors name what the user called."""
        (adapter,) = self._known.acquire(op, [name], self)
        return Lease(adapter, self, lambda held: self._known.release([held]))

    def use(
        self,
        adapter_names: Sequence[str | Lease | None],
        lengths: Sequence[int] | None = None,
        picked: Sequence[int] | None = None,
    ) -> contextlib.AbstractContextManager["AdapterBank"]:
        """Inside the ``with``, forwards of the model in this thread use one adapter for each row; no gradients.

        Args:
            adapter_names: for each row of the batch a name, a lease, or None for the bare model. A batch whose first
                dimension is a multiple of the rows repeats each row in place, as beams do; any other is an error.
            lengths: None, or the number of tokens of each row in tensors that hold the rows one after the other.
            picked: with ``lengths``, the places of those tokens that alone reach the head (``logits_to_keep``).

        Returns:
            A context manager, which gives the bank. On CUDA, forwards run on the stream that is current on entry.

        Raises:
            UnknownAdapter: on entry, before anything runs: no adapter has that name.
            BankFull: likewise, more adapters are needed than slots can be freed for.
            TypeError: ``adapter_names`` is no list of names, leases and None.
            ValueError: ``lengths`` does not fit, or a lease was released or is another bank's.
        """
        return self._use("use", checked_rows("use", adapter_names, lengths), lengths, picked)

    @contextlib.contextmanager
    def _use(
        self,
        op: str,
        rows: Sequence[str | Lease | None],
        lengths: Sequence[int] | None = None,
        picked: Sequence[int] | None = None,
    ) -> Iterator["AdapterBank"]:
        held = self._known.acquire(op, [row for row in rows if row is not None], self)
        try:
            slots = iter([adapter.in_slot() for adapter in held])
            batch = None
            if held:
                by_row = [-1 if row is None else next(slots) for row in rows]
                with torch.inference_mode(False):
                    batch = Batch(op, by_row, lengths, picked, self.slots, self.device)
                for adapter in {id(a): a for a in held}.values():
                    self._slots.copies.wait(adapter.ready)
            outer, self._running.batch = self._running.batch, batch
            try:
                with torch.no_grad():
                    yield self
            finally:
                self._running.batch = outer
                self._slots.copies.read({adapter.in_slot() for adapter in held})
        finally:
            self._known.release(held)

    def generate(
        self, input_ids: Tensor | None = None, *, adapter_names: Sequence[str | Lease | None], **generate_kwargs: Any
    ) -> Any:
        """``model.generate`` with one adapter, or None for the bare model, for each row.

        Args:
            input_ids: ``[B, L]``; or None, with ``inputs`` or ``inputs_embeds`` among the other arguments.
            adapter_names: for each of the B rows a name, a lease or None.
            generate_kwargs: for the model's ``generate``.

        Returns:
            What the model's ``generate`` returns.

        Raises:
            UnknownAdapter: before anything runs: no adapter has that name.
            BankFull: likewise, more adapters are needed than slots can be freed for.
            TypeError: ``adapter_names`` is no list of names, leases and None.
            ValueError: there is no input, or it has another number of rows.
        """
        rows = checked_rows("generate", adapter_names)
        given = (input_ids, *map(generate_kwargs.get, ("inputs", "inputs_embeds")))
        inputs = next((tensor for tensor in given if tensor is not None), None)
        if inputs is None or len(inputs) != len(rows):
            found = "missing" if inputs is None else f"of {len(inputs)} rows"
            raise ValueError(f"generate: input_ids is {found}, but adapter_names has {len(rows)}")
        with self._use("generate", rows):
            model: Any = self.model
            return model.generate(*(() if input_ids is None else (input_ids,)), **generate_kwargs)

    def close(self) -> None:
        """Take the bank off the model, which is then as it was, bit for bit. A second call does nothing.

        Raises:
            BankError: a batch or a lease still holds an adapter.
        """
        if self._known.close("close"):
            for site in self._sites:
                site.detach()
            for forward in self._experts:
                forward.detach()

    def __enter__(self) -> "AdapterBank":
        return self

    def __exit__(self, *_) -> None:
        self.close()
