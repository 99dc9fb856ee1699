"""Where PyTorch computes past a module: its fused inference of nn.TransformerEncoder reads weights and calls nobody."""

from collections.abc import Callable

from torch import nn

Attributes = list[tuple[str, str, object]]


def stop_bypasses(model: nn.Module, attributes: Attributes, concerned: Callable[[nn.Module], bool]) -> None:
    """Have encoders with such a module inside call it; notes (path, attribute, what it was)."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.TransformerEncoderLayer) and any(concerned(m) for m in module.modules()):
            _set(attributes, path, module, "activation_relu_or_gelu", 0)
        if isinstance(module, nn.TransformerEncoder) and any(concerned(m) for m in module.modules()):
            _set(attributes, path, module, "use_nested_tensor", False)


def restore_bypasses(model: nn.Module, attributes: Attributes) -> None:
    """Set the attributes to what they were."""
    for path, attribute, value in attributes:
        setattr(model.get_submodule(path), attribute, value)
    attributes.clear()


def _set(attributes: Attributes, path: str, module: nn.Module, name: str, value: object) -> None:
    if getattr(module, name, value) != value:
        attributes.append((path, name, getattr(module, name)))
        setattr(module, name, value)
