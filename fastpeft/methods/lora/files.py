"""LoRA adapters on disk: PEFT's own files, and the keys of the tensors in them."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...nn.base_layer import features, is_conv1d
from ...nn.experts_weights import sizes
from ...nn.lora import LoraLinear
from ...nn.lora_embedding import LoraEmbedding
from ...nn.lora_experts import LoraExperts
from ...nn.trained_copy import TrainedCopy
from ..embeddings import tied_to_embeddings
from ..formats.files import write_json, write_tensors
from ..formats.peft_files import CONFIG, PREFIX, WEIGHTS, read_tensors
from ..formats.peft_format import from_peft, to_peft
from ..method import Files
from ..own import own_parameters
from ..targets import Targets, walk
from .config import Lora
from .experts import keys_of, target_parameters
from .experts_apart import stacked
from .record import bias_key, trained_biases


class LoraFiles(Files):
    """PEFT's LORA."""

    def recognises(self, fields: Mapping) -> bool:
        return fields.get("peft_type") == "LORA"

    def read(self, op: str, model: nn.Module, directory: Path, fields: Mapping) -> tuple[Lora, dict[str, Tensor]]:
        config, tensors = stacked(op, model, from_peft(op, fields), read_tensors(op, directory))
        return (_with_tied(model, config, tensors) if fields.get("ensure_weight_tying") else config), tensors

    def write(self, op: str, model: nn.Module, name: str, tensors: dict[str, Tensor], directory: Path) -> None:
        layers = self.method.record(model).layers(model)
        layers = {path: layer for path, layer in layers.items() if name in layer.adapters}
        conv1d = any(is_conv1d(layer.base_layer) for layer in layers.values())
        paths = [path for path, _ in walk(model)]
        base = getattr(model, "name_or_path", None) or None
        experts = {p: tuple(layer.adapted([name])) for p, layer in layers.items() if isinstance(layer, LoraExperts)}
        linears, config = [path for path in layers if path not in experts], self.method.configs(model)[name]
        named = config.experts if isinstance(config.experts, tuple) else target_parameters(model, experts)
        fields = to_peft(config, linears, paths, conv1d, base, named if experts else ())
        write_tensors(op, directory / WEIGHTS, {self.key(key): value for key, value in tensors.items()})
        write_json(directory / CONFIG, fields)

    def parameters(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        record = self.method.record(model)
        tensors: dict[str, Tensor] = {}
        for path, layer in record.layers(model).items():
            if isinstance(layer, LoraExperts):
                for parameter, key in keys_of(path, layer.adapted([name])).items():
                    pair = layer.adapters[name][parameter]  # type: ignore[index]
                    tensors |= {f"{key}.lora_A.weight": pair.lora_A, f"{key}.lora_B.weight": pair.lora_B}
            elif name in layer.adapters:
                adapter = layer.adapters[name]
                for key, tensor in zip(_keys(path, layer), (adapter.lora_A, adapter.lora_B), strict=True):
                    tensors[key] = tensor
                if adapter.lora_bias is not None:
                    tensors[f"{path}.lora_B.bias"] = adapter.lora_bias
                if adapter.lora_magnitude is not None:
                    tensors[f"{path}.lora_magnitude_vector"] = adapter.lora_magnitude
        for path, wrapper in record.wrappers(model).items():
            if name in wrapper.copies:
                state = wrapper.copies[name].state_dict(keep_vars=True)
                tensors.update((f"{path}.{key}", value) for key, value in state.items())
        if name in record.biases.of:
            biases = record.biases.of[name].parameters(model)
            tensors.update((bias_key(original, record.linears), bias) for original, bias in biases.items())
        return tensors

    def expected(self, model: nn.Module, config: Lora, plan: tuple[Lora, Targets]) -> dict[str, tuple[int, ...]]:
        targets = plan[1]
        shapes: dict[str, tuple[int, ...]] = {}
        for path in targets.linears:
            module = model.get_submodule(path)
            base: Any = module.base_layer if isinstance(module, LoraLinear) else module
            n, k = features(base)
            r = config.rank_of(path)
            shapes.update(zip(_keys(path, module), ((r, k), (n, r)), strict=True))
            if config.lora_bias:
                shapes[f"{path}.lora_B.bias"] = (n,)
            if config.dora:
                shapes[f"{path}.lora_magnitude_vector"] = (n,)
        for path, parameters in targets.experts.items():
            module = model.get_submodule(path)
            base = module.base_layer if isinstance(module, LoraExperts) else module
            for parameter, key in keys_of(path, parameters).items():
                (e, k, n), r = sizes(base, parameter), config.rank_of(f"{path}.{parameter}")
                shapes |= {f"{key}.lora_A.weight": (e * r, k), f"{key}.lora_B.weight": (n, r * e)}
        for path in targets.copies:
            module = model.get_submodule(path)
            original = module.original_module if isinstance(module, TrainedCopy) else module
            own = {key: value for key, value in original.state_dict().items() if not key.startswith("fastpeft_")}
            shapes.update((f"{path}.{key}", tuple(value.shape)) for key, value in own.items())
        own = own_parameters(model)
        for bias in trained_biases(model, config, targets):
            shapes[bias_key(bias, targets.linears)] = tuple(own[bias].shape)
        return shapes

    def key(self, key: str) -> str:
        return PREFIX + key

    def ignores(self, key: str) -> bool:
        # PEFT saves biases of a copied module three times when it trains all; the copy's own are the ones it reads.
        # Token rows beside LoRA are read by the method that trains them.
        return bool({"original_module", "modules_to_save", "token_adapter"} & {*key.split(".")})

    def must_be_float(self, key: str) -> bool:
        return ".lora_" in key


def _with_tied(model: nn.Module, config: Lora, tensors: Mapping[str, Tensor]) -> Lora:
    """The config with the modules that PEFT's ensure_weight_tying adapts or copies beside the embedding."""
    tied = tied_to_embeddings(model)
    adapted = [
        path for path in tied if any(f"{path}.{half}" in tensors for half in ("lora_A.weight", "lora_embedding_A"))
    ]
    copied = [path for path in tied if path not in adapted and f"{path}.weight" in tensors and config.modules_to_save]
    targets = config.targets
    if isinstance(targets, str) and adapted:
        targets = f"(?:{targets})|{'|'.join(map(re.escape, adapted))}"
    elif not isinstance(targets, str):
        targets = [*targets, *adapted]
    return dataclasses.replace(config, targets=targets, modules_to_save=[*config.modules_to_save, *copied])


def _keys(path: str, module: nn.Module) -> tuple[str, str]:
    """PEFT's keys of A and B of a layer, or of one that is to be adapted."""
    if isinstance(module, nn.Embedding | LoraEmbedding):
        return f"{path}.lora_embedding_A", f"{path}.lora_embedding_B"
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"
