"""What became of every adapted layer of a model: fused or not, why, by which backend, who shares its input.

After a backward, and before the gradients are set to None, it says of a trained layer whether it got any.

A layer is known by what its class says (``nn.protocol.Reported``). Layers of other libraries say nothing: whoever knows
a library passes a describer for them, as ``integrations.models`` does for ``fastpeft.report``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape

from torch import nn

from .. import _host
from ..nn.protocol import Reported, is_added, reported
from ..nn.read_past import read_past
from .attachment import attachment_of, check_module
from .folding import folded
from .layer_report import BESIDE, LayerReport
from .registry import methods_of

# For a layer of another library as it is, (kind, why it is not fused); None for any other module.
Describer = Callable[[nn.Module], tuple[str, str] | None]


@dataclass(frozen=True)
class Report:
    """All adapted layers of a model. Printing it gives one line for those that differ in their number alone.

    Attributes:
        layers: One ``LayerReport`` for each layer, in the model's order.
        trained: How many numbers of the model's parameters are trained.
        total: How many numbers its parameters have.
        host: What makes calls that repeat cost the host more than they need to; None with the host extension.
    """

    layers: tuple[LayerReport, ...]
    trained: int = 0
    total: int = 0
    host: str | None = None

    @property
    def fused(self) -> int:
        """How many layers are fused."""
        return sum(layer.fused for layer in self.layers)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        rows = folded((layer.path, str(layer)) for layer in self.layers)
        width = max((len(path) for path, _ in rows), default=0)
        return "\n".join([*self._summary(), *(f"  {path:{width}}  {text}" for path, text in rows)])

    def _repr_html_(self) -> str:
        """A table, for notebooks."""
        layers = {(layer.path, str(layer)): layer.fused for layer in self.layers}
        fused = {text: flag for (_, text), flag in layers.items()}
        lines = []
        for path, text in folded(layers):
            mark = "&#10003;" if fused[text] else "&#10007;"
            cells = f"<code>{escape(path)}</code>", mark, escape(text)
            lines.append("<tr>" + "".join(f'<td style="text-align:left">{cell}</td>' for cell in cells) + "</tr>")
        table = f"<table><tbody>{''.join(lines)}</tbody></table>" if lines else ""
        return "".join(f"<div>{escape(line)}</div>" for line in self._summary()) + table

    def _summary(self) -> list[str]:
        counts: dict[str, list[bool]] = {}
        for layer in self.layers:
            counts.setdefault(layer.kind, []).append(layer.fused)
        lines = [f"{sum(fused)} of {len(fused)} {kind} fused" for kind, fused in counts.items()]
        share = f" ({self.trained / self.total:.2%})" if self.total else ""
        lines = [*(lines or ["no adapted layers"]), f"{self.trained:,} of {self.total:,} parameters trained{share}"]
        return lines if self.host is None else [*lines, f"calls that repeat: {self.host}"]


def report(model: nn.Module, describers: Sequence[Describer] = ()) -> Report:
    """Every adapted layer in ``model``, and what a method of ``attach`` did elsewhere.

    Args:
        model: Any module.
        describers: They are asked, in order, about every module that does not speak for itself.

    Raises:
        TypeError: ``model`` is no module.
    """
    check_module("report", model)
    paths = {module: path for path, module in model.named_modules()}
    passed = read_past(model)
    rows: list[LayerReport] = []
    inside: tuple[str, ...] = ()
    for module, path in paths.items():
        if inside and path.startswith(inside):
            continue
        layer = reported(module)
        if layer is not None:
            if is_added(module):
                inside = (f"{path}.",)  # it speaks for the modules inside
            rows.append(_row(module, layer, path, paths, passed))
        else:
            described = (describer(module) for describer in describers)
            found = next((description for description in described if description is not None), None)
            if found is not None:
                rows.append(LayerReport(path, found[1], None, (), found[0]))
    for module in paths:
        state = attachment_of(module)
        for method in methods_of(state) if state is not None else ():
            rows.extend(method.report(module))
    rows = _without_gradient(model, {path: module for module, path in paths.items()}, rows)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    host = _host.described() if _host.load() is None else None
    return Report(tuple(rows), sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes), host)


def _row(
    module: nn.Module, layer: Reported, path: str, paths: dict[nn.Module, str], passed: dict[str, str]
) -> LayerReport:
    status = f"its weight is {passed[path]}" if path in passed else layer.fastpeft_report()
    if status != "fused" and not status.startswith(BESIDE):
        return LayerReport(path, status, None, (), layer.fastpeft_kind)
    group = module.__dict__.get("fastpeft_shared")
    partners = () if group is None else group.partners(module)
    shares = tuple(paths.get(partner, "a layer elsewhere") for partner in partners)
    return LayerReport(path, status, layer.fastpeft_backend(), shares, layer.fastpeft_kind)


def _without_gradient(model: nn.Module, modules: dict[str, nn.Module], rows: list[LayerReport]) -> list[LayerReport]:
    """The rows, of which those that train but got no gradient say so, where other parameters have got theirs."""
    if all(parameter.grad is None for parameter in model.parameters() if parameter.requires_grad):
        return rows

    def missed(row: LayerReport) -> bool:
        trained = [p for p in modules[row.path].parameters() if p.requires_grad] if row.path in modules else []
        return row.fused and bool(trained) and all(parameter.grad is None for parameter in trained)

    text = "its adapter got no gradient in the last backward, so nothing was computed with it"
    return [replace(row, status=text, backend=None, shares_with=()) if missed(row) else row for row in rows]
