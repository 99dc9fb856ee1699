"""Attach adapters to a model in place, and detach them.

Whatever can be wrong is found before the model is touched. What was changed is noted in an ``Attachment`` on the model,
so that ``detach`` leaves the very modules, values and requires_grad flags that were there.
"""

from collections.abc import Iterable

from torch import nn

from ..nn.adapter import adapter_name
from ..nn.lora import LoraLinear
from ..nn.sharing import share_inputs, unshare_inputs
from ..nn.trained_copy import TrainedCopy
from .attachment import KEY, Attachment, attachment_of, holder_of, layers_of, original_names, refuse_merged
from .lora import Lora
from .switch import set_adapter
from .targets import Targets, resolve


def attach(model: nn.Module, config: Lora, name: str = "default") -> nn.Module:
    """Put LoRA around linear layers of ``model``, in place, and freeze the rest.

    Only exact ``nn.Linear`` and transformers' ``Conv1D`` are adapted: quantised and other subclasses are left alone by
    "all-linear" and refused when named. The first adapter is active; another name adds a second adapter, inactive until
    ``set_adapter``.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: naming what is wrong; nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach: model is {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(config, Lora):
        raise TypeError(f"attach: config is {type(config).__name__}, expected fastpeft.Lora")
    check_attachable("attach", model, config, name)
    apply(model, config, name, resolve("attach", model, config))
    return model


def check_attachable(op: str, model: nn.Module, config: Lora, name: str) -> None:
    """Whether another adapter can be added to the model as it is now."""
    adapter_name(op, name)
    state = attachment_of(model)
    known = tuple(f"{path}." for path in (*state.linears, *state.copies)) if state else ()
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear | TrainedCopy) and not f"{path}.".startswith(known):
            raise ValueError(f"{op}: {path} has adapters of its own, expected a model without")
    if state is None:
        return
    if name in state.configs:
        raise ValueError(f"{op}: adapter {name!r} is attached already")
    biased = [other for other, c in [*state.configs.items(), (name, config)] if c.bias != "none"]
    if biased:
        raise ValueError(
            f"{op}: adapter {biased[0]!r} trains the model's biases, expected bias='none' with two adapters"
        )
    refuse_merged(op, model, state)


def apply(model: nn.Module, config: Lora, name: str, targets: Targets) -> None:
    """Attach what has been resolved and checked."""
    state = attachment_of(model) or Attachment(flags={n: p.requires_grad for n, p in model.named_parameters()})
    modules = {path: model.get_submodule(path) for path in (*targets.linears, *targets.copies)}
    try:
        # Memory may run out up to here; only then is the model changed.
        built = {path: _adapted(modules[path], path, config, name) for path in targets.linears}
        built.update((path, _copied(modules[path], name)) for path in targets.copies)
    except BaseException:
        _take_back(model, state, modules.values(), name)
        raise
    for path, module in built.items():
        if module is not modules[path]:
            _replace(model, path, module)
            (state.linears if isinstance(module, LoraLinear) else state.copies).append(path)
            if isinstance(module, LoraLinear):
                module.set_adapter([])
    first = not state.configs
    state.configs[name] = config
    setattr(model, KEY, state)
    _freeze(model, state)
    _train_biases(model, state, config)
    _stop_bypasses(model, state)
    unshare_inputs(model)
    if all(c.share_inputs for c in state.configs.values()):
        share_inputs(model, lambda module: isinstance(module, LoraLinear))
    if first:
        set_adapter(model, name)


def detach(model: nn.Module, keep_merged: bool = False) -> nn.Module:
    """Take every adapter off again: the original modules, values and requires_grad flags, bit for bit.

    Args:
        keep_merged: leave the adapters' contribution in the weights of a merged model, and let the originals go.
    """
    holder, state = holder_of("detach", model)
    layers = layers_of(holder, state)
    merged = [layer for layer in layers if layer.merged]
    if keep_merged and not merged:
        raise ValueError("detach: keep_merged on a model that is not merged; merge it first")
    for layer in merged if not keep_merged else ():
        layer.unmerge()
    names = original_names(holder, state)
    for original, value in state.biases.items() if not keep_merged else ():
        names[original].data = value
    for path in state.linears:
        _replace(holder, path, holder.get_submodule(path).base_layer)
    for path in state.copies:
        wrapper = holder.get_submodule(path)
        _replace(
            holder, path, wrapper.copies[wrapper.active] if keep_merged and wrapper.active else wrapper.original_module
        )
    for path, attribute, value in state.attributes:
        setattr(holder.get_submodule(path), attribute, value)
    for name, parameter in holder.named_parameters():
        parameter.requires_grad_(state.flags.get(name, parameter.requires_grad))
    unshare_inputs(holder)
    delattr(holder, KEY)
    return model


def _adapted(module: nn.Module, path: str, config: Lora, name: str) -> LoraLinear:
    settings = {
        "r": config.rank_of(path),
        "alpha": config.alpha_of(path),
        "dropout": config.dropout,
        "rslora": config.rslora,
        "lora_bias": config.lora_bias,
        "init": config.init,
        "dtype": config.dtype,
    }
    if isinstance(module, LoraLinear):
        module.add_adapter(name, **settings)
        return module
    return LoraLinear(module, name, **settings)


def _copied(module: nn.Module, name: str) -> TrainedCopy:
    wrapper = module if isinstance(module, TrainedCopy) else TrainedCopy(module)
    wrapper.add_copy(name)
    return wrapper


def _take_back(model: nn.Module, state: Attachment, modules: Iterable[nn.Module], name: str) -> None:
    for module in modules:
        added = getattr(module, "adapters" if isinstance(module, LoraLinear) else "copies", None)
        if isinstance(module, LoraLinear | TrainedCopy) and name in added:
            del added[name]
    if not state.configs:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(state.flags[parameter_name])


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _freeze(model: nn.Module, state: Attachment) -> None:
    for name, parameter in original_names(model, state).items():
        if name in state.flags:
            parameter.requires_grad_(name in state.biases)


def _train_biases(model: nn.Module, state: Attachment, config: Lora) -> None:
    if config.bias == "none":
        return
    adapted = {f"{path}.bias" for path in state.linears}
    for name, parameter in original_names(model, state).items():
        if name not in state.flags or not (name == "bias" or name.endswith(".bias")):
            continue
        if any(name.startswith(f"{path}.") for path in state.copies):
            continue
        if config.bias == "all" or name in adapted:
            state.biases[name] = parameter.data.clone()
            parameter.requires_grad_(True)


def _stop_bypasses(model: nn.Module, state: Attachment) -> None:
    """PyTorch's fused inference of nn.TransformerEncoderLayer reads ``linear1.weight`` without calling the module."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(child, LoraLinear) for child in module.children()
        ):
            _set_attribute(state, path, module, "activation_relu_or_gelu", 0)
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, LoraLinear) for m in module.modules()):
            _set_attribute(state, path, module, "use_nested_tensor", False)


def _set_attribute(state: Attachment, path: str, module: nn.Module, name: str, value: object) -> None:
    if getattr(module, name, value) != value:
        state.attributes.append((path, name, getattr(module, name)))
        setattr(module, name, value)
