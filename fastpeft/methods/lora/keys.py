"""The keys of a LoRA adapter's tensors in PEFT's checkpoints, without their prefix."""

from torch import Tensor, nn

from ...nn.base_layer import is_conv1d
from ...nn.lora import LoraLinear
from ...nn.trained_copy import TrainedCopy
from ..attachment import attachment_of, original_names
from ..targets import Targets
from .config import Lora
from .record import LoraRecord, bias_key, is_bias


def parameters(model: nn.Module, record: LoraRecord, config: Lora, name: str) -> dict[str, Tensor]:
    """The adapter's tensors, by their keys without PEFT's prefix."""
    tensors = {}
    for path in record.linears:
        layer = model.get_submodule(path)
        if name in layer.adapters:
            adapter = layer.adapters[name]
            tensors[f"{path}.lora_A.weight"] = adapter.lora_A
            tensors[f"{path}.lora_B.weight"] = adapter.lora_B
            if adapter.lora_bias is not None:
                tensors[f"{path}.lora_B.bias"] = adapter.lora_bias
    for path in record.copies:
        copies = model.get_submodule(path).copies
        if name in copies:
            state = copies[name].state_dict(keep_vars=True)
            tensors.update((f"{path}.{key}", value) for key, value in state.items())
    if config.bias != "none":
        names = original_names(model, attachment_of(model))
        tensors.update((bias_key(original, record.linears), names[original]) for original in record.biases)
    return tensors


def expected(model: nn.Module, config: Lora, targets: Targets) -> dict[str, tuple[int, ...]]:
    """Keys and shapes that the adapter would have once it is attached."""
    shapes = {}
    for path in targets.linears:
        module = model.get_submodule(path)
        base = module.base_layer if isinstance(module, LoraLinear) else module
        n, k = base.weight.T.shape if is_conv1d(base) else base.weight.shape
        r = config.rank_of(path)
        shapes[f"{path}.lora_A.weight"], shapes[f"{path}.lora_B.weight"] = (r, k), (n, r)
        if config.lora_bias:
            shapes[f"{path}.lora_B.bias"] = (n,)
        if config.bias == "lora_only" and base.bias is not None:
            shapes[f"{path}.base_layer.bias"] = (n,)
    for path in targets.copies:
        module = model.get_submodule(path)
        module = module.original_module if isinstance(module, TrainedCopy) else module
        own = {key: value for key, value in module.state_dict().items() if not key.startswith("fastpeft_")}
        shapes.update((f"{path}.{key}", tuple(value.shape)) for key, value in own.items())
    if config.bias == "all":
        state = attachment_of(model)
        names = dict(model.named_parameters()) if state is None else original_names(model, state)
        for original, parameter in names.items():
            if state is not None and original not in state.flags:
                continue  # of another adapter
            if is_bias(original) and not original.startswith(tuple(f"{path}." for path in targets.copies)):
                shapes[bias_key(original, targets.linears)] = tuple(parameter.shape)
    return shapes
