"""Where tokens come into a transformers model: the forwards at which prompts and prefixes enter.

A caller need not call the model: fused losses call its backbone and its head, ``generate`` the encoder of an
encoder-decoder, others ``forward`` by name. So there is an ``Entry`` in place of the forward of the model and of every
module on the way to its token embedding that can be called with tokens. The outermost that a call goes through does the
work; those inside it see that it is done. In a model that numbers positions by the tokens themselves above its text
backbone (Qwen2-VL and its kin), the backbone's entry does it, once the positions are known.
"""

import inspect
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .rows import RowAdapters, check_rows

ROWS = "adapter_names"  # of a call: the adapter of each row
Rows = tuple[str | None, ...] | None


class Gate:
    """Whether a call is inside an entry already, and the rows that it named there; each thread has its own call.

    Args:
        inner: whether the innermost entry does the work.
    """

    def __init__(self, inner: bool):
        self.inner = inner
        self.threads: dict[int, list[Rows]] = {}
        self.compiled: list[list[Rows]] = []  # the one thread that traces

    @property
    def call(self) -> list[Rows] | None:
        """``[rows]`` of the call that is inside, or None."""
        if torch.compiler.is_compiling():
            return self.compiled[0] if self.compiled else None
        return self.threads.get(threading.get_ident())

    def enter(self, rows: Rows) -> None:
        if torch.compiler.is_compiling():
            self.compiled.append([rows])
        else:
            self.threads[threading.get_ident()] = [rows]

    def leave(self) -> None:
        if torch.compiler.is_compiling():
            self.compiled.clear()
        else:
            del self.threads[threading.get_ident()]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "threads": {}, "compiled": []}


class Entry:
    """A module's forward, with prompts and prefixes in it.

    Args:
        holder: the model, whose children of ``RowAdapters`` act.
        module: whose forward it is.
        gate: of all entries of the model.
        innermost: whether no other entry is below.
    """

    __name__ = "forward"

    def __init__(self, holder: nn.Module, module: nn.Module, gate: Gate, innermost: bool):
        self.holder, self.module, self.gate, self.innermost = holder, module, gate, innermost
        self.before = module.__dict__.get("forward")  # another library's, of the instance
        self.arguments = tuple(arguments_of(module))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]  # the forward's
        return type(self.module).forward.__doc__

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that was here."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.module:  # bound to the module again, as accelerate does it
            args = args[1:]
        parts = parts_of(self.holder)
        outermost = self.gate.call is None
        works = self.innermost if self.gate.inner else outermost
        if not parts or not (works or outermost):
            return self.original(*args, **kwargs)
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        if outermost:
            self.gate.enter(_named(parts, given))
        try:
            return self._worked(parts, given) if works else self._announced(parts, given)
        finally:
            if outermost:
                self.gate.leave()

    def _worked(self, parts: list[RowAdapters], given: dict) -> Any:
        rows = self.gate.call[0]  # type: ignore[index]  # there is a call
        for part in parts:
            given = part.before(self, given, rows)
        output = self.original(**given)
        for part in parts:
            part.after(self, given, output)
        return output

    def _announced(self, parts: list[RowAdapters], given: dict) -> Any:
        rows = self.gate.call[0]  # type: ignore[index]
        for part in parts:
            given = part.announce(given, rows)
        return self.original(**given)


def arguments_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Of the forward of a module's class; what stands in its place may hide them."""
    return inspect.signature(type(module).forward.__get__(module)).parameters


def parts_of(model: nn.Module) -> list[RowAdapters]:
    """Prompts, then prefixes: what is put in front of the tokens has positions of its own."""
    parts = [module for module in model.children() if isinstance(module, RowAdapters)]
    return sorted(parts, key=lambda part: part.order)


def _named(parts: list[RowAdapters], given: dict) -> Rows:
    """Out of a call's arguments the adapters that it names for its rows."""
    rows = given.pop(ROWS, None)
    return None if rows is None else check_rows(parts[0].op, rows, {name: 0 for part in parts for name in part.names})


def entered(model: Any) -> dict[str, nn.Module]:
    """The modules that are called with tokens, by their paths, from the model to the innermost."""
    embedding, inner = model.get_input_embeddings(), None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inner = model.get_encoder()
    paths = {id(module): path for path, module in model.named_modules()}
    path = paths.get(id(embedding if inner is None else inner), "")
    steps = path.split(".") if path else []
    steps = steps if inner is not None else steps[:-1]
    found = {"": model}
    for i in range(len(steps)):
        name = ".".join(steps[: i + 1])
        module = model.get_submodule(name)
        if _takes_tokens(module):
            found[name] = module
    return found


def _takes_tokens(module: nn.Module) -> bool:
    if type(module).forward is nn.Module.forward:  # a list
        return False
    arguments = arguments_of(module)
    states = ("attention_mask", "past_key_values", "cache_params", "use_cache")
    return "inputs_embeds" in arguments and any(name in arguments for name in states)


def numbers_by_tokens(model: nn.Module) -> bool:
    """Whether positions come from the tokens themselves, above the module that embeds them."""
    return any(hasattr(type(module), "get_rope_index") for module in model.modules())


def open_entries(model: nn.Module) -> None:
    """Put entries in place, if there are none."""
    if isinstance(model.__dict__.get("forward"), Entry):
        return
    modules, gate = list(entered(model).values()), Gate(numbers_by_tokens(model))
    for module in modules:
        module.forward = Entry(model, module, gate, innermost=module is modules[-1])


def close_entries(model: nn.Module) -> None:
    """Put back the forwards that were there. An entry that another library has wrapped since stays and does nothing."""
    for module in model.modules():
        entry = module.__dict__.get("forward")
        if isinstance(entry, Entry) and entry.holder is model:
            if entry.before is None:
                del module.__dict__["forward"]
            else:
                module.forward = entry.before
