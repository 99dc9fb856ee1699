"""LoRA adapters on disk: PEFT's own files, and the keys of the tensors in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...nn.base_layer import is_conv1d
from ...nn.lora import LoraLinear
from ...nn.trained_copy import TrainedCopy
from ..attachment import attachment_of, original_names, state_of
from ..formats.files import write_json, write_tensors
from ..formats.peft_files import CONFIG, PREFIX, WEIGHTS, read_tensors
from ..formats.peft_format import from_peft, to_peft
from ..method import Files
from ..targets import Targets, walk
from .config import Lora
from .record import bias_key, is_bias


class LoraFiles(Files):
    """PEFT's LORA."""

    def recognises(self, fields: Mapping) -> bool:
        return fields.get("peft_type") == "LORA"

    def read(self, op: str, model: nn.Module, directory: Path, fields: Mapping) -> tuple[Lora, dict[str, Tensor]]:
        return from_peft(op, fields), read_tensors(op, directory)

    def write(self, op: str, model: nn.Module, name: str, tensors: dict[str, Tensor], directory: Path) -> None:
        layers = self.method.record(model).layers(model)
        layers = {path: layer for path, layer in layers.items() if name in layer.adapters}
        conv1d = any(is_conv1d(layer.base_layer) for layer in layers.values())
        paths = [path for path, _ in walk(model)]
        base = getattr(model, "name_or_path", None) or None
        fields = to_peft(self.method.configs(model)[name], list(layers), paths, conv1d, base)
        write_tensors(op, directory / WEIGHTS, {self.key(key): value for key, value in tensors.items()})
        write_json(directory / CONFIG, fields)

    def parameters(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        record, config = self.method.record(model), self.method.configs(model)[name]
        tensors: dict[str, Tensor] = {}
        for path, layer in record.layers(model).items():
            if name in layer.adapters:
                adapter = layer.adapters[name]
                tensors[f"{path}.lora_A.weight"] = adapter.lora_A
                tensors[f"{path}.lora_B.weight"] = adapter.lora_B
                if adapter.lora_bias is not None:
                    tensors[f"{path}.lora_B.bias"] = adapter.lora_bias
        for path, wrapper in record.wrappers(model).items():
            if name in wrapper.copies:
                state = wrapper.copies[name].state_dict(keep_vars=True)
                tensors.update((f"{path}.{key}", value) for key, value in state.items())
        if config.bias != "none":
            names = original_names(model, state_of(model))
            tensors.update((bias_key(original, record.linears), names[original]) for original in record.biases)
        return tensors

    def expected(self, model: nn.Module, config: Lora, plan: tuple[Lora, Targets]) -> dict[str, tuple[int, ...]]:
        targets = plan[1]
        shapes: dict[str, tuple[int, ...]] = {}
        for path in targets.linears:
            module = model.get_submodule(path)
            base: Any = module.base_layer if isinstance(module, LoraLinear) else module
            n, k = base.weight.T.shape if is_conv1d(base) else base.weight.shape
            r = config.rank_of(path)
            shapes[f"{path}.lora_A.weight"], shapes[f"{path}.lora_B.weight"] = (r, k), (n, r)
            if config.lora_bias:
                shapes[f"{path}.lora_B.bias"] = (n,)
            if config.bias == "lora_only" and base.bias is not None:
                shapes[f"{path}.base_layer.bias"] = (n,)
        for path in targets.copies:
            module = model.get_submodule(path)
            original = module.original_module if isinstance(module, TrainedCopy) else module
            own = {key: value for key, value in original.state_dict().items() if not key.startswith("fastpeft_")}
            shapes.update((f"{path}.{key}", tuple(value.shape)) for key, value in own.items())
        if config.bias == "all":
            state = attachment_of(model)
            names = dict(model.named_parameters()) if state is None else original_names(model, state)
            copied = tuple(f"{path}." for path in targets.copies)
            for bias, parameter in names.items():
                if state is not None and bias not in state.flags:
                    continue  # of another adapter
                if is_bias(bias) and not bias.startswith(copied):
                    shapes[bias_key(bias, targets.linears)] = tuple(parameter.shape)
        return shapes

    def key(self, key: str) -> str:
        return PREFIX + key

    def ignores(self, key: str) -> bool:
        # PEFT saves biases of a copied module three times when it trains all; the copy's own are the ones it reads.
        # Token rows beside LoRA are read by the method that trains them.
        return bool({"original_module", "modules_to_save", "token_adapter"} & {*key.split(".")})

    def must_be_float(self, key: str) -> bool:
        return ".lora_" in key
