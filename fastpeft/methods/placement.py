"""Which module adapters are attached to, inside which wrapper, and on which device they are made.

Accelerate's hooks (``cpu_offload``, ``dispatch_model``) keep a layer's weights on the meta device, without values,
until it is called, and bring them to where it computes. They are known by what they look like, so that Accelerate need
not be there.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .attachment import check_module
from .embeddings import execution_device

# Wrappers that call the model inside as it is, by the attribute that holds it.
_AROUND = {"OptimizedModule": "_orig_mod", "DataParallel": "module"}
# Those that took note of the parameters when they were made, and what to do instead.
_CLOSED = {
    "DistributedDataParallel": "attach first, then wrap it",
    "FullyShardedDataParallel": "attach first, then wrap it",
    "FSDPModule": "attach first, then call fully_shard",
    "DeepSpeedEngine": "attach first, then call deepspeed.initialize",
    "ScriptModule": "attach first, then trace or script it",
}


def model_inside(op: str, model: nn.Module) -> nn.Module:
    """The module to attach to: ``model``, or the one inside ``torch.compile``'s wrapper or DataParallel.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: It is, or contains, a wrapper that knows the parameters of the time when it was made alone.
    """
    check_module(op, model)
    for path, module in model.named_modules():
        kind = next((name for name in _kinds(module) if name in _CLOSED), None)
        if kind is not None and (kind != "ScriptModule" or module is model):
            raise ValueError(
                f"{op}: {path or 'model'} is a {kind}, which takes no more parameters, expected the model without it: "
                f"{_CLOSED[kind]}"
            )
    while (name := next((_AROUND[kind] for kind in _kinds(model) if kind in _AROUND), None)) is not None:
        model = cast(nn.Module, getattr(model, name))
    return model


def check_values(op: str, model: nn.Module, paths: Iterable[str], added: bool = True) -> None:
    """Raise where what is trained at a path would be without values.

    A model that is on the meta device as a whole is made before it is filled, and its adapters with it.

    Args:
        paths: Of modules, or names of parameters.
        added: Whether adapters are added beside the weights; else these are trained themselves, or copied.

    Raises:
        ValueError: A weight has no values now, and no hook of its own module's brings them when it is called; or it is
            trained itself.
    """
    metas = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}
    if not metas:
        return
    unfilled = all(parameter.is_meta for parameter in model.parameters())
    for path in paths:
        for name in metas:
            if name == path or name.startswith(f"{path}."):
                _check_one(op, model, name, added, unfilled)


def _check_one(op: str, model: nn.Module, name: str, added: bool, unfilled: bool) -> None:
    parts = name.split(".")
    around = (".".join(parts[:count]) for count in range(len(parts) - 1))
    whole = next((path for path in around if _brings_all_inside(model.get_submodule(path))), None)
    owner = model.get_submodule(name.rpartition(".")[0])
    offloaded = execution_device(owner).type != "meta" or whole is not None
    if offloaded and not added:
        raise ValueError(
            f"{op}: {name} is offloaded: it has values only while its layer computes, expected them in memory where a "
            "weight is itself trained or copied"
        )
    if whole is not None:
        raise ValueError(
            f"{op}: {name} is brought by a hook of {whole or 'the model'}, which knows the weights of the time when it "
            "was made alone, expected hooks on the layers: offload without preload_module_classes"
        )
    if not offloaded and not unfilled:
        raise ValueError(
            f"{op}: {name} is on the meta device, without values, and others are not, expected a model that is filled, "
            "or on the meta device as a whole"
        )


def device_beside(*modules: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the first floating-point weight in these modules is while its module computes, and its dtype."""
    for outer in modules:
        for module in outer.modules():
            weight = next((p for p in module._parameters.values() if p is not None and p.is_floating_point()), None)
            if weight is not None:
                return execution_device(module), weight.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def put_beside(adapter: nn.Module, module: nn.Module) -> None:
    """Have a new adapter, made where the module's weight is now, where the module computes."""
    device = execution_device(module)
    if device.type != "meta" and any(parameter.is_meta for parameter in adapter.parameters()):
        adapter.to_empty(device=device)
        cast(Any, adapter).reset_parameters()


def in_memory(tensor: Tensor) -> Tensor:
    """The same tensor object, with memory if it was on the meta device: a checkpoint's values are about to fill it."""
    if tensor.is_meta:
        empty = torch.empty_like(tensor, device="cpu")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, tensor.requires_grad)
        torch.utils.swap_tensors(tensor, empty)
    return tensor


def _brings_all_inside(module: nn.Module) -> bool:
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return any(getattr(one, "offload", False) and getattr(one, "place_submodules", False) for one in hooks)


def _kinds(module: nn.Module) -> list[str]:
    """Names of the classes of PyTorch's and DeepSpeed's that it is of."""
    return [k.__name__ for k in type(module).__mro__ if k.__module__.partition(".")[0] in ("torch", "deepspeed")]
