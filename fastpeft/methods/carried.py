"""Values of the model's own embedding and head that a checkpoint carries (a resized vocabulary): put in and taken out.

PEFT writes them into the model for good. Here they belong to the adapter that brought them: they are in the model while
it is active, and the model's own are there again when another one acts, in ``disable_adapter`` and after ``detach``.
A value that the model has already is carried by nobody. Nothing of this trains.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..nn.protocol import original_child
from .attachment import Attachment, attachment_of, original_names
from .embeddings import input_embeddings, output_embeddings
from .formats.peft_files import PREFIX
from .targets import walk

# Where PEFT's layers keep the module that they stand for, in names of parameters.
_INSIDE = (".token_adapter.base_layer.", ".base_layer.", ".original_module.")


def take_carried(
    op: str, model: nn.Module, directory: Path, tensors: dict[str, Tensor], shapes: Mapping[str, tuple] | None
) -> dict[str, Tensor]:
    """Take what is a value of the model's embedding or head out of ``tensors``; by name of the parameter.

    Args:
        op: The function to name in errors.
        model: The model, which is read.
        directory: What the error names.
        tensors: A method's, by the keys that it reads; changed.
        shapes: Those that the adapter itself has, or None where only a key that says so is not the adapter's.

    Raises:
        ValueError: The model has another number of tokens.
    """
    ends, names = _ends(model), _names(model)
    found = {}
    for key in list(tensors):
        plain = plain_key(key)
        path, _, kind = plain.rpartition(".")
        parameter = getattr(ends.get(path), kind, None) if kind in ("weight", "bias") else None
        if (shapes is not None and key in shapes) or (shapes is None and plain == key) or parameter is None:
            continue
        value = tensors.pop(key)
        if value.shape != parameter.shape:
            raise ValueError(f"{op}: {directory} has {key} {list(value.shape)}, {resize(parameter, value.shape[0])}")
        found[names[id(parameter)]] = value
    return found


def resize(parameter: Tensor, count: int) -> str:
    """What to do about an embedding of another number of tokens."""
    return (
        f"the model has {list(parameter.shape)}: call model.resize_token_embeddings({count}) "
        "before attaching or loading, as was done before the checkpoint was written"
    )


def plain_key(key: str) -> str:
    """The name that a parameter of the model has where PEFT wrote it from within one of its layers."""
    for inside in _INSIDE:
        if inside in key:
            return key.replace(inside, ".")
    return key


def vocabulary_of(model: nn.Module, key: str) -> Tensor | None:
    """The weight of the embedding or head whose module the key of a tensor lies in, or None."""
    module = next((m for path, m in _ends(model).items() if key.startswith(f"{path}.")), None)
    return None if module is None else getattr(module, "weight", None)


def carry(model: nn.Module, state: Attachment, name: str, values: Mapping[str, Tensor]) -> None:
    """Have the adapter bring these values, in place of those that it brought."""
    put_carried(model, state, [other for other in state.active if other != name])
    parameters = original_names(model, state)
    own = {key: parameters[key].data for key in values}
    values = {key: value.to(own[key].device, own[key].dtype) for key, value in values.items()}
    brought = {key: value for key, value in values.items() if not torch.equal(value, own[key])}
    state.carried.pop(name, None)
    if brought:
        state.carried[name] = brought
    put_carried(model, state, state.active)


def carried_keys(model: nn.Module, state: Attachment, name: str) -> dict[str, Tensor]:
    """What the adapter brought, by the keys that PEFT gives it beside the adapter's own tensors."""
    parts = {type(part).__name__ for part in state.parts(name)}
    adapted = {p for p, m in model.named_modules() if name in getattr(m, "adapters", ()) and original_child(m)}
    found = {}
    for key, value in state.carried.get(name, {}).items():
        path, _, kind = key.rpartition(".")
        if "Lora" not in parts and parts & {"PromptTuning", "PrefixTuning"}:
            found[f"base_model.{key}"] = value
        else:
            found[f"{PREFIX}{path}.base_layer.{kind}" if path in adapted else PREFIX + key] = value
    return found


def put_carried(model: nn.Module, state: Attachment, names: Sequence[str]) -> None:
    """Have in the model what these adapters brought, and its own values elsewhere."""
    wanted: dict[str, Tensor] = {}
    for name in names:
        wanted = {**state.carried.get(name, {}), **wanted}
    if not wanted and not state.replaced:
        return
    parameters = original_names(model, state)
    for key in list(state.replaced):
        parameters[key].data = state.replaced.pop(key)
    for key, value in wanted.items():
        state.replaced[key] = parameters[key].data
        parameters[key].data = value


def lift_carried(model: nn.Module, state: Attachment) -> Callable[[], None]:
    """Have the model's own values in it; returns what puts back what was there."""
    if not state.replaced:
        return lambda: None
    put_carried(model, state, ())
    return lambda: put_carried(model, state, state.active)


def _ends(model: nn.Module) -> dict[str, nn.Module]:
    """Path and original module of the input embedding and the head."""
    wanted = [_innermost(m) for m in (input_embeddings(model), output_embeddings(model)) if m is not None]
    return {p: _innermost(m) for p, m in walk(model) if any(_innermost(m) is end for end in wanted)}


def _names(model: nn.Module) -> dict[int, str]:
    state = attachment_of(model)
    found = dict(model.named_parameters()) if state is None else original_names(model, state)
    return {id(parameter): name for name, parameter in found.items()}


def _innermost(module: nn.Module) -> nn.Module:
    while (child := original_child(module)) is not None:
        module = getattr(module, child)
    return module
