"""Which parameters of experts a LoRA config means, what PEFT calls them, and which experts stay frozen."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ...nn.experts_call import layout_of
from ...nn.experts_weights import unadaptable_reason
from ...nn.lora_experts import LoraExperts
from ..layer_report import LayerReport
from ..placement import put_beside
from ..targets import ends_with, excluded, names, walk
from .config import ALL_LINEAR, Lora

Adapted = Mapping[str, tuple[str, ...]]  # paths of modules, and which of their parameters are adapted

# The linear layers of an expert that became one parameter when experts were stacked.
_BEFORE = {"gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "down_proj": ("w2",)}


def adapted_experts(op: str, model: nn.Module, config: Lora, strict: bool = True) -> dict[str, tuple[str, ...]]:
    """The modules with parameters that the config's ``experts`` mean, and the names of these.

    Raises:
        ValueError: a name matches no parameter, or the adapter drops what cannot be dropped, or has biases.
        TypeError: a parameter that was named cannot be adapted.
    """
    if config.experts is False:
        return {}
    named = config.experts is not True
    found: dict[str, tuple[str, ...]] = {}
    for path, module in walk(model):
        base, wanted = base_of(module), []
        if path and not isinstance(base, nn.Linear | nn.Embedding) and (named or is_experts(base)):
            wanted = [
                p for p in _parameters(base) if (_named if named else _meant)(f"{path}.{p}", path, p, base, config)
            ]
        reasons = {parameter: _reason(base, parameter, config) for parameter in wanted}
        for parameter, reason in reasons.items():
            if reason is not None and named:
                raise TypeError(f"{op}: experts names {path}.{parameter}, which is {reason}")
        wanted = [parameter for parameter, reason in reasons.items() if reason is None]
        if wanted:
            found[path] = tuple(wanted)
    if named and strict:
        _check_found(op, found, config)
    if found and config.lora_bias:
        raise ValueError(
            f"{op}: lora_bias is True, expected False beside experts ({next(iter(found))}), or experts=False"
        )
    if found and config.dora:
        raise ValueError(f"{op}: dora is True, expected False beside experts ({next(iter(found))}), or experts=False")
    return found


def _parameters(base: Any) -> list[str]:
    return [name for name, parameter in base._parameters.items() if parameter is not None]


def _named(whole: str, path: str, parameter: str, base: Any, config: Lora) -> bool:
    return ends_with(whole, config.experts if isinstance(config.experts, tuple) else ())


def _meant(whole: str, path: str, parameter: str, base: Any, config: Lora) -> bool:
    """Whether targets mean a weight of experts: by its name, its module's, or those of the layers it once was."""
    if base._parameters[parameter].dim() != 3 or excluded(path, config) or excluded(whole, config):
        return False
    before = [f"{path}.{end}" for name in _BEFORE.get(parameter, ()) for end in (name, f"0.{name}")]
    return config.targets == ALL_LINEAR or any(names(name, config) for name in (whole, path, *before))


def _reason(base: Any, parameter: str, config: Lora) -> str | None:
    reason, layout = unadaptable_reason(base, parameter), layout_of(base)
    if reason is None and config.dropout and isinstance(layout, str):
        return f"adapted without dropout alone, since {layout}"
    return reason


def _check_found(op: str, found: Adapted, config: Lora) -> None:
    wholes = list(parameter_paths(found))
    for name in config.experts if isinstance(config.experts, tuple) else ():
        if not any(ends_with(whole, (name,)) for whole in wholes):
            raise ValueError(f"{op}: experts names {name!r}, which no parameter of the model ends with")


def parameter_paths(adapted: Adapted) -> Iterator[str]:
    """The paths of the parameters."""
    return (f"{path}.{parameter}" for path, parameters in adapted.items() for parameter in parameters)


def adapt(module: Any, path: str, parameters: Sequence[str], config: Lora, name: str) -> LoraExperts:
    """The layer that stands for the module, or stood for it already, with a new adapter."""
    settings: dict[str, Any] = {
        "parameters": parameters,
        "r": {parameter: config.rank_of(f"{path}.{parameter}") for parameter in parameters},
        "alpha": {parameter: config.alpha_of(f"{path}.{parameter}") for parameter in parameters},
        "dropout": config.dropout,
        "rslora": config.rslora,
        "init": config.init,
        "dtype": config.dtype,
    }
    if isinstance(module, LoraExperts):
        module.add_adapter(name, **settings)
        layer = module
    else:
        layer = LoraExperts(module, name, **settings)
    put_beside(layer.adapters[name], layer.base_layer)
    return layer


def keys_of(path: str, parameters: Sequence[str]) -> dict[str, str]:
    """Where PEFT keeps A and B of each parameter: it wraps the module once for each, the last one outermost."""
    depth = len(parameters) - 1
    return {parameter: path + ".base_layer" * (depth - i) for i, parameter in enumerate(parameters)}


def target_parameters(model: nn.Module, adapted: Adapted) -> list[str]:
    """PEFT's names for these parameters: short ones where they mean no other, else their paths."""
    wholes = set(parameter_paths(adapted))
    ends = {".".join(whole.split(".")[-2:]) for whole in wholes}
    every = (f"{path}.{parameter}" for path, module in walk(model) for parameter in _parameters(base_of(module)))
    return sorted(ends if all(whole in wholes for whole in every if ends_with(whole, ends)) else wholes)


def expert_parameters(model: nn.Module) -> list[str]:
    """The weights of a model's experts as ``peft.LoraConfig(target_parameters=...)`` names them.

    Args:
        model: Any module; experts of transformers are found by what they are, whichever model they are of.

    Returns:
        Such as ``["experts.down_proj", "experts.gate_up_proj"]``; empty for a model without experts.
    """
    return target_parameters(model, adapted_experts("expert_parameters", model, Lora()))


def frozen_experts(model: nn.Module, configs: Iterable[Lora]) -> list[LayerReport]:
    """A row for each experts module of the model that no adapter is on, with the reason."""
    configs = list(configs)
    rows = []
    for path, module in walk(model):
        if is_experts(module):
            reasons = (_reason(module, p, c) for c in configs for p in _parameters(module) if c.experts)
            reason = next(filter(None, reasons), None)
            why = "no adapter's targets or experts name them" if any(c.experts for c in configs) else "experts is False"
            text = f"its weights are left frozen: {why if reason is None else f'they are {reason}'}"
            rows.append(LayerReport(path, text, None, kind="experts"))
    return rows


def is_experts(module: Any) -> bool:
    """Whether a module has weights ``[experts, ..., ...]``."""
    if not isinstance(layout_of(module), str):
        return True
    shapes = [parameter.shape for parameter in module._parameters.values() if parameter is not None]
    stacks = [shape for shape in shapes if len(shape) == 3]
    return len(stacks) > 1 and all(shape[0] == stacks[0][0] == getattr(module, "num_experts", None) for shape in stacks)


def base_of(module: Any) -> Any:
    """The experts module that this one stands for, or itself.

    Args:
        module: Any.
    """
    return module.base_layer if isinstance(module, LoraExperts) else module
