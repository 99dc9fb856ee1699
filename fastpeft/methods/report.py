"""What became of every adapted layer of a model: fused or not, why, by which backend, who shares its input."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .. import ops
from ..nn.bottleneck import BottleneckAdapter
from .attachment import attachment_of
from .bottleneck.holder import backend_of
from .layer_report import LayerReport
from .registry import methods_of

_SERVED = "peft.tuners.lora.layer.Linear"  # the one class that accelerate changes; by name, so PEFT need not be there
_ADAPTERHUB = ("adapters.methods.modeling", "adapters.methods.invertible")
_ADAPTERHUB_LAYERS = ("Adapter", "ParallelAdapter", "BertFusion", "NICECouplingBlock", "GLOWCouplingBlock")


@dataclass(frozen=True)
class Report:
    """All adapted layers of a model; printing it gives one line for each.

    Attributes:
        layers: in the model's order.
        trained, total: numbers of parameters that are trained, and of all.
    """

    layers: tuple[LayerReport, ...]
    trained: int = 0
    total: int = 0

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
        counts: dict[str, list[bool]] = {}
        for layer in self.layers:
            counts.setdefault(layer.kind, []).append(layer.fused)
        lines = [f"{sum(fused)} of {len(fused)} {kind} fused" for kind, fused in counts.items()]
        share = f" ({self.trained / self.total:.2%})" if self.total else ""
        lines = [*(lines or ["no adapted layers"]), f"{self.trained:,} of {self.total:,} parameters trained{share}"]
        for layer in self.layers:
            text = f"fused ({layer.backend})" if layer.fused else f"not fused: {layer.status}"
            if layer.shares_with:
                text += f", reads x with {', '.join(path.rpartition('.')[2] for path in layer.shares_with)}"
            lines.append(f"  {layer.path:{width}}  {text}")
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Every adapted layer in ``model``, ours or PEFT's: fused or not and why, which backend, who shares its input.

    A layer is any module with ``fastpeft_report()`` (which returns "fused" or the reason against it), or a LoRA layer
    of PEFT that ``fastpeft.accelerate`` has not been called on or has no fused form for (Embedding, quantised, ...);
    and what a method of ``attach`` did elsewhere.

    >>> print(fastpeft.report(model))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model is {type(model).__name__}, expected a torch.nn.Module")
    paths = {module: path for path, module in model.named_modules()}
    rows, reported = [], ()
    for module, path in paths.items():
        if reported and path.startswith(reported):
            continue
        if hasattr(type(module), "fastpeft_report") and getattr(type(module), "fastpeft_added", False):
            reported = (f"{path}.",)  # it speaks for the modules inside
        status = _status(module)
        if status is not None:
            backend = _backend(module) if status == "fused" else None
            group = module.__dict__.get("fastpeft_shared")
            partners = group.partners(module) if group is not None and status == "fused" else []
            partners = tuple(paths.get(partner, "a layer elsewhere") for partner in partners)
            bottleneck = isinstance(module, BottleneckAdapter) or type(module).__module__ in _ADAPTERHUB
            kind = "bottleneck adapters" if bottleneck else "LoRA layers"
            kind = getattr(type(module), "fastpeft_kind", kind)
            rows.append(LayerReport(path, status, backend, partners, kind))
    for module in paths:
        state = attachment_of(module)
        for method in methods_of(state) if state is not None else ():
            rows.extend(method.report(module))
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return Report(tuple(rows), sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes))


def _status(module: nn.Module) -> str | None:
    if hasattr(type(module), "fastpeft_report"):
        return module.fastpeft_report()
    if type(module).__module__ in _ADAPTERHUB and type(module).__name__ in _ADAPTERHUB_LAYERS:
        name = type(module).__name__
        if name.endswith("Adapter"):
            return f"{name} is the adapters library's own layer; fastpeft.accelerate has not been called on it"
        return f"{name} has no fused form"
    if "base_layer" not in module._modules or "lora_A" not in module._modules:
        return None
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name == _SERVED:
        return f"{type(module).__name__} is PEFT's own layer; fastpeft.accelerate has not been called on it"
    return f"{name} has no fused form"


def _backend(module: nn.Module) -> str:
    """The backend for the layer's own tensors and an x of one row."""
    if hasattr(type(module), "fastpeft_backend"):
        return module.fastpeft_backend()
    if isinstance(module, BottleneckAdapter):
        return backend_of(module)
    weight = module.base_layer.weight
    lora_a = next(p for name, p in module.named_parameters() if "lora_A" in name)
    x = weight.new_empty(1, lora_a.shape[1])
    try:
        return ops.explain("lora_linear", x, weight, lora_a).backend
    except ValueError as error:  # FASTPEFT_BACKEND asks for one that cannot serve
        return str(error)
