"""``save_pretrained`` of a model of transformers that is attached to, and reading what it wrote into such a model.

The folder is the base model's: its own names, its own values, so ``from_pretrained`` gives the base. Beside them, under
``fastpeft.<adapter>.<method>.<key>``, are the adapters, which ``from_pretrained`` leaves out and ``load_state_dict`` of
the attached model reads: that is how Trainer resumes and loads its best model. Merged adapters are in the weights that
are written, since that is what merging is for.
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..nn.protocol import is_added, original_child
from ..nn.quantised import kind_of
from ..nn.trained_copy import TrainedCopy
from .attachment import Attachment, attachment_of, original_name, state_of
from .formats.files import whole
from .registry import mergeable_of, method_of
from .switch import disable_adapter

ATTRIBUTE = "save_pretrained"
_MARK = "fastpeft."
_THEIRS = "fastpeft_original"  # on a quantizer's class: what it was


class SavePretrained:
    """Stands for ``save_pretrained`` of a module while adapters are attached to it, or to a module around it."""

    def __init__(self, module: nn.Module, holder: nn.Module):
        self.module, self.holder = module, holder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own method does, with the base model's state dict.

        Args:
            args: As for the module's own.
            kwargs: The same.
        """
        own: Any = type(self.module).save_pretrained  # type: ignore[attr-defined]
        call = inspect.signature(own).bind(self.module, *args, **kwargs)
        given = call.arguments.get("state_dict")
        state = state_of(self.holder)
        if any(method.merged(self.holder) for method in mergeable_of(state)):
            call.arguments["state_dict"] = _base_state(
                self.module, self.module.state_dict() if given is None else given
            )
            with _unmarked(self.module):
                return own(*call.args, **call.kwargs)
        warnings.warn(
            "save_pretrained: the weights are the base model's, which from_pretrained reads; the adapters beside them "
            "are for load_state_dict of the attached model (Trainer's resumption). Write adapters with fastpeft.save",
            stacklevel=2,
        )
        adapters = dict(_adapters(self.module, self.holder, state, given))
        with disable_adapter(self.holder):
            live = self.module.state_dict()
            if given is not None:  # gathered; but of what is trained in place it has the trained values
                trained = {id(t) for _, _, _, t in _parts(self.holder, state)}
                in_place = {name for name, p in self.module.named_parameters() if id(p) in trained}
                live = {name: live[name] if name in in_place else value for name, value in given.items()}
            call.arguments["state_dict"] = {**_base_state(self.module, live), **adapters}
            return own(*call.args, **call.kwargs)


@contextmanager
def _unmarked(model: nn.Module) -> Iterator[None]:
    """Inside the block a transformers model whose layers were written out is none in 4 or 8 bits, if all were."""
    marks: list[tuple[dict, str, Any]] = []
    if _written_out(model):
        left = next((path for path, module in model.named_modules() if kind_of(module)), None)
        if left is not None:
            raise ValueError(f"save_pretrained: {left} is quantised, expected to be written out as other layers are")
        for owner, name in ((vars(model), "hf_quantizer"), (vars(model.config), "quantization_config")):
            marks.append((owner, name, owner.pop(name)))
    try:
        yield
    finally:
        for owner, name, value in marks:
            owner[name] = value


def forget_quantisation(holder: nn.Module) -> None:
    """Transformers' models whose layers are all written out, for good, are no longer models in 4 or 8 bits."""
    for model in holder.modules():
        if _written_out(model) and not any(map(kind_of, model.modules())):
            cast(Any, model).hf_quantizer.remove_quantization_config(model)


def _written_out(model: nn.Module) -> bool:
    quantizer = vars(model).get("hf_quantizer")
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    return method == "bitsandbytes" and any(getattr(m, "merged_dtype", bool)() for m in model.modules())


@functools.cache
def _trained(kind: type) -> type:
    """A transformers quantizer that says that its model is trained, as Trainer asks where it sees no PEFT."""
    return type(kind.__name__, (kind,), {"is_qat_trainable": True, _THEIRS: kind, "__module__": __name__})


def put_up(holder: nn.Module) -> None:
    """Have the modules that can save themselves do so as above; ``take_down`` undoes it."""
    for module in holder.modules():
        if callable(getattr(type(module), ATTRIBUTE, None)) and not is_added(module):
            module.__dict__[ATTRIBUTE] = SavePretrained(module, holder)
        quantizer: Any = vars(module).get("hf_quantizer")
        if getattr(quantizer, "is_trainable", False) and not hasattr(quantizer, _THEIRS):
            kind: Any = type(quantizer)
            quantizer.__class__ = _trained(kind)
    holder.register_load_state_dict_pre_hook(_before_loading)
    holder.register_load_state_dict_post_hook(_after_loading)
    holder.register_state_dict_post_hook(_refuse_outside)


def take_down(holder: nn.Module) -> None:
    """Give every module its own ``save_pretrained`` back."""
    for module in holder.modules():
        if isinstance(module.__dict__.get(ATTRIBUTE), SavePretrained):
            del module.__dict__[ATTRIBUTE]
        quantizer: Any = vars(module).get("hf_quantizer")
        if hasattr(quantizer, _THEIRS):
            quantizer.__class__ = getattr(quantizer, _THEIRS)
    ours = (_before_loading, _after_loading, _refuse_outside)
    for hooks in (holder._load_state_dict_pre_hooks, holder._load_state_dict_post_hooks, holder._state_dict_hooks):
        for number, hook in list(cast(Any, hooks).items()):
            if getattr(hook, "hook", hook) in ours:
                del cast(Any, hooks)[number]


def _base_state(module: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a state dict is the original model's, by the names it had there; of a merged copy, the copy."""
    kept: dict[str, str] = {}
    for path, inner in module.named_modules():
        child = original_child(inner)
        if isinstance(inner, TrainedCopy) and inner.active is not None and not inner.disabled:
            child = f"copies.{inner.active}"
        if child is not None:
            kept[path] = child
    added = tuple(f"{path}." for path, inner in module.named_modules() if is_added(inner))
    inwards = sorted(kept, key=len, reverse=True)
    found = {}
    for key, value in state_dict.items():
        name: str | None = None if key.startswith(added) else key
        for path in inwards:
            if name is not None and name.startswith(f"{path}."):
                inside = f"{path}.{kept[path]}."
                name = f"{path}.{name.removeprefix(inside)}" if name.startswith(inside) else None
        if name is not None:
            found[name] = value
    return found


def _parts(holder: nn.Module, state: Attachment) -> Iterator[tuple[str, str, str, Tensor]]:
    """(adapter, method, key, tensor) of everything that any adapter trains."""
    for name in state.configs:
        for config in state.parts(name):
            method = method_of(ATTRIBUTE, config)
            for key, tensor in method.files.parameters(holder, name).items():
                yield name, method.name, key, tensor


def _adapters(
    module: nn.Module, holder: nn.Module, state: Attachment, given: dict[str, Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    if module is not holder:
        return  # whose load_state_dict would not know them
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for name, method, key, tensor in _parts(holder, state):
        gathered = None if given is None else given.get(names.get(id(tensor), ""))
        yield f"{_MARK}{name}.{method}.{key}", whole(tensor) if gathered is None else gathered.clone()


def _before_loading(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Take the adapters out of a state dict of the base model's names, and give these the names they now have."""
    state = attachment_of(module)
    if state is None:
        return
    state.arriving = {
        k.removeprefix(prefix): state_dict.pop(k) for k in list(state_dict) if k.startswith(prefix + _MARK)
    }
    wrappers = {path: child for path, inner in module.named_modules() if (child := original_child(inner)) is not None}
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, _ in tensors if wrappers else ():
        plain = original_name(name, wrappers)
        if plain != name and prefix + name not in state_dict and prefix + plain in state_dict:
            state_dict[prefix + name] = state_dict.pop(prefix + plain)


@torch.no_grad()
def _after_loading(module: nn.Module, incompatible: Any) -> None:
    """Give the adapters their values."""
    state = attachment_of(module)
    if state is None or not state.arriving:
        return
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for name, method, key, tensor in _parts(module, state):
        value = state.arriving.pop(f"{_MARK}{name}.{method}.{key}", None)
        if value is not None:
            tensor.copy_(value)
            end = names.get(id(tensor), key)
            incompatible.missing_keys[:] = [
                k for k in incompatible.missing_keys if k != end and not k.endswith(f".{end}")
            ]
    incompatible.unexpected_keys.extend(state.arriving)
    state.arriving = {}


def _refuse_outside(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, _: Any) -> None:
    """A model around the one that was attached to would write names that ``from_pretrained`` does not know."""
    frame = sys._getframe(1) if prefix and attachment_of(module) is not None else None
    while frame is not None:
        if frame.f_code.co_name == ATTRIBUTE:
            raise ValueError(
                f"save_pretrained: adapters are attached to {prefix.rstrip('.')}, a part of the model, whose weights "
                "would be written under other names: write the adapters with fastpeft.save, or detach them first"
            )
        frame = frame.f_back
