"""Which library's layers a model has, and whose integration serves them: PEFT's, or those of ``adapters``."""

from torch import nn

from ..methods.report import Report
from ..methods.report import report as report_layers

_ADAPTERHUB = "adapters.methods.modeling"


def accelerate(model: nn.Module, strict: bool = False, share_inputs: bool = True, fuse_mlp: bool = True) -> nn.Module:
    """Serve PEFT's LoRA layers, or the bottleneck adapters of ``adapters``, by fused ops, in place; calling it again
    does no harm. ``fastpeft.restore(model)`` undoes it, ``fastpeft.report(model)`` says what is fused.

    Args:
        model: a PeftModel, a model after ``adapters.init``, or any module with such layers inside.
        strict: raise if any of the layers would keep its library's own forward.
        share_inputs: let LoRA layers that receive the same tensor (q, k, v; gate, up) read it once; same result.
        fuse_mlp: compute a gated MLP (Llama's and its kin's) whose three projections have LoRA as one op, which keeps
            and needs less memory; the dropout masks are the same. ``report`` has a line for each.

    Returns:
        The same model: same parameters, names, state dict, saving.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no such layer, or with ``strict`` some are not fused, and why. Nothing has been changed then.
    """
    if _has_adapters(model):
        from . import adapters

        return adapters.accelerate(model, strict)
    from . import peft

    return peft.accelerate(model, strict, share_inputs, fuse_mlp)


def restore(model: nn.Module) -> nn.Module:
    """Undo ``accelerate`` and ``register``: every layer is its library's own again.

    Args:
        model: as ``accelerate`` was given.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no such layer, or a layer's class was wrapped after ``accelerate``, as by fully_shard.
            Nothing has been changed then.
    """
    if _has_adapters(model):
        from . import adapters

        return adapters.restore(model)
    from . import peft

    return peft.restore(model)


def report(model: nn.Module) -> Report:
    """Every adapted layer in ``model``: fused or not and why, by which backend, and who shares its input.

    These are the layers of ``attach`` and what it did elsewhere, and PEFT's LoRA layers and the adapter layers of the
    library ``adapters``, whether ``accelerate`` was called on them or they have no fused form (Embedding, quantised,
    AdapterFusion).

    >>> print(fastpeft.report(model))

    Args:
        model: Any module.

    Returns:
        One ``LayerReport`` for each layer, and how many parameters are trained. Printed, it has one line for layers
        that differ in their number alone; a notebook shows a table.

    Raises:
        TypeError: ``model`` is no module.
    """
    return report_layers(model, (describe,))


def describe(module: nn.Module) -> tuple[str, str] | None:
    """(kind, why it is not fused) of another library's layer as it is; None for any other module.

    Args:
        module: Any module.
    """
    homes = {kind.__module__.partition(".")[0] for kind in type(module).__mro__}
    if "peft" in homes:
        from . import peft

        return peft.describe(module)
    if "adapters" in homes:
        from . import adapters

        return adapters.describe(module)
    return None


def _has_adapters(model: nn.Module) -> bool:
    """By the names of classes, so that neither library is imported in vain."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(kind.__module__ == _ADAPTERHUB for module in modules for kind in type(module).__mro__)
