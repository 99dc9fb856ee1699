"""What became of every LoRA layer of a model: fused or not, why, by which backend, who shares its input."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .. import ops

_SERVED = "peft.tuners.lora.layer.Linear"  # the one class that accelerate changes; by name, so PEFT need not be there


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        path: in the model.
        status: "fused", or why it is not.
        backend: that would serve the layer on its weight's device; None where it is not fused.
        shares_with: paths of the layers that are computed in the same call when they get the same tensor.
    """

    path: str
    status: str
    backend: str | None
    shares_with: tuple[str, ...]

    @property
    def fused(self) -> bool:
        return self.status == "fused"


@dataclass(frozen=True)
class Report:
    """All LoRA layers of a model; printing it gives one line for each."""

    layers: tuple[LayerReport, ...]

    @property
    def fused(self) -> int:
        """How many layers are fused."""
        return sum(layer.fused for layer in self.layers)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        width = max((len(layer.path) for layer in self.layers), default=0)
        lines = [f"{self.fused} of {len(self.layers)} LoRA layers fused"]
        for layer in self.layers:
            text = f"fused ({layer.backend})" if layer.fused else f"not fused: {layer.status}"
            if layer.shares_with:
                text += f", reads x with {', '.join(path.rpartition('.')[2] for path in layer.shares_with)}"
            lines.append(f"  {layer.path:{width}}  {text}")
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Every LoRA layer in ``model``, ours or PEFT's: fused or not and why, which backend, who shares its input.

    A layer is any module with ``fastpeft_report()`` (which returns "fused" or the reason against it), or a LoRA layer
    of PEFT that ``fastpeft.accelerate`` has not been called on or has no fused form for (Embedding, quantised, ...).

    >>> print(fastpeft.report(model))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model is {type(model).__name__}, expected a torch.nn.Module")
    paths = {module: path for path, module in model.named_modules()}
    rows = []
    for module, path in paths.items():
        status = _status(module)
        if status is not None:
            backend = _backend(module) if status == "fused" else None
            group = module.__dict__.get("fastpeft_shared")
            partners = group.partners(module) if group is not None and status == "fused" else []
            rows.append(LayerReport(path, status, backend, tuple(paths.get(m, "a layer elsewhere") for m in partners)))
    return Report(tuple(rows))


def _status(module: nn.Module) -> str | None:
    if hasattr(type(module), "fastpeft_report"):
        return module.fastpeft_report()
    if "base_layer" not in module._modules or "lora_A" not in module._modules:
        return None
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name == _SERVED:
        return f"{type(module).__name__} is PEFT's own layer; fastpeft.accelerate has not been called on it"
    return f"{name} has no fused form"


def _backend(module: nn.Module) -> str:
    """The backend for the layer's own tensors and an x of one row."""
    weight = module.base_layer.weight
    lora_a = next(p for name, p in module.named_parameters() if "lora_A" in name)
    x = weight.new_empty(1, lora_a.shape[1])
    try:
        text = ops.explain("lora_linear", x, weight, lora_a)
    except ValueError as error:  # FASTPEFT_BACKEND asks for one that cannot serve
        return str(error)
    return text.splitlines()[0].rpartition(" ")[2]
