"""LoRA, as ``attach`` drives it: LoraLinear around linear layers, copies of whole modules, the model's own biases."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ...nn import quantised
from ...nn.base_layer import not_adaptable_reason
from ...nn.live_slice import LiveSlice
from ...nn.lora import LoraLinear
from ...nn.lora_embedding import LoraEmbedding
from ...nn.lora_experts import LoraExperts
from ...nn.lora_mlp import fuse_mlps, unfuse_mlps
from ...nn.protocol import is_added
from ...nn.sharing import share_inputs, unshare_inputs
from ...nn.trained_copy import TrainedCopy
from ..attachment import owners, replace_module
from ..bypasses import restore_bypasses, stop_bypasses
from ..claims import Claims
from ..layer_report import LayerReport
from ..method import Mergeable
from ..own import own_modules
from ..placement import check_values, put_beside
from ..selective.change import Change
from ..selective.plan import Plan
from ..targets import Targets, resolve
from ..targets import names as named
from .config import ALL_LINEAR, Lora
from .experts import adapt, adapted_experts, frozen_experts
from .files import LoraFiles
from .record import LoraRecord, trained_biases


class LoraMethod(Mergeable):
    name, config, title, record_type = "lora", Lora, "LoRA", LoraRecord

    def __init__(self):
        self.files = LoraFiles(self)

    def resolve(self, op: str, model: nn.Module, config: Lora, name: str, strict: bool = True) -> tuple[Lora, Targets]:
        record = self.record(model)
        known = tuple(f"{path}." for path in (*record.linears, *record.copies)) if record else ()
        for path, module in model.named_modules():
            if isinstance(module, LoraLinear | TrainedCopy) and not f"{path}.".startswith(known):
                raise ValueError(f"{op}: {path} has adapters of its own, expected a model without")
        if record is not None:
            both = [*self.configs(model).items(), (name, config)]
            biased = [other for other, c in both if c.bias != "none"]
            if biased and len(both) > 1:
                raise ValueError(
                    f"{op}: adapter {biased[0]!r} trains the model's biases, expected bias='none' with two adapters"
                )
        targets = resolve(op, model, config, strict, adapted_experts(op, model, config, strict))
        embedding = next((path for path in targets.linears if is_embedding(model.get_submodule(path))), None)
        if config.dora and embedding is not None:
            raise ValueError(f"{op}: dora is True, expected False beside the embedding {embedding}")
        for path in targets.copies:
            for inner, module in model.get_submodule(path).named_modules():
                if is_added(module) and not inner.startswith("fastpeft_"):
                    raise ValueError(f"{op}: modules_to_save names {path}, but an adapter was added to a module inside")
                if isinstance(module, LiveSlice):
                    raise ValueError(f"{op}: modules_to_save names {path}, but select trains rows of a layer inside")
        _refuse_copied(op, model, config, targets, record.copies if record else ())
        check_values(op, model, (*targets.linears, *targets.experts))
        check_values(op, model, (*targets.copies, *trained_biases(model, config, targets)), added=False)
        return config, targets

    def claims(self, model: nn.Module, plan: tuple[Lora, Targets]) -> Claims:
        return frozenset({*trained_biases(model, *plan), *(f"{path}." for path in plan[1].copies)})

    def report(self, model: nn.Module) -> Sequence[LayerReport]:
        return frozen_experts(model, self.configs(model).values())

    def apply(self, model: nn.Module, plan: tuple[Lora, Targets], name: str) -> None:
        (config, targets), record = plan, self.record(model)
        modules = {path: model.get_submodule(path) for path in (*targets.linears, *targets.experts, *targets.copies)}
        try:
            # Memory may run out up to here; only then is the model changed.
            biases = Change(model, Plan(whole=dict.fromkeys(trained_biases(model, config, targets), "bias")))
            layers = {path: _adapted(modules[path], path, config, name) for path in targets.linears}
            experts = targets.experts.items()
            layers |= {path: adapt(modules[path], path, parameters, config, name) for path, parameters in experts}
            wrappers = {path: _copied(modules[path], name) for path in targets.copies}
        except BaseException:
            _take_back(modules.values(), name)
            raise
        for path, layer in layers.items():
            if layer is not modules[path]:
                replace_module(model, path, layer)
                record.linears.append(path)
                layer.set_adapter([])
        for path, wrapper in wrappers.items():
            if wrapper is not modules[path]:
                replace_module(model, path, wrapper)
                record.copies.append(path)
        if biases.plan.whole:
            record.biases.of[name] = biases
        stop_bypasses(model, record.attributes, lambda module: isinstance(module, LoraLinear))
        _fuse(model, self.configs(model))

    def lift(self, model: nn.Module) -> None:
        if not self.merged(model):  # merged biases are not where they were
            self.record(model).biases.lift(model)

    def settle(self, model: nn.Module) -> None:
        self.record(model).biases.settle(model)

    def discard(self, model: nn.Module, name: str) -> None:
        record = self.record(model)
        record.biases.drop(model, name)
        layers, wrappers = record.layers(model), record.wrappers(model)
        _take_back([*layers.values(), *wrappers.values()], name)
        for path, layer in layers.items():
            if not len(layer.adapters):
                replace_module(model, path, layer.base_layer)
                record.linears.remove(path)
        for path, wrapper in wrappers.items():
            if not len(wrapper.copies):
                replace_module(model, path, wrapper.original_module)
                record.copies.remove(path)
        if not record.linears and not record.copies:
            self.remove(model)
        else:
            _fuse(model, {other: c for other, c in self.configs(model).items() if other != name})

    def remove(self, model: nn.Module, keep_merged: bool = False) -> None:
        record = self.record(model)
        if not keep_merged:
            self.unmerge(model)
            record.biases.set_active(model, [])
        for path, layer in record.layers(model).items():
            replace_module(model, path, layer.base_layer)
        for path, wrapper in record.wrappers(model).items():
            kept = wrapper.copies[wrapper.active] if keep_merged and wrapper.active else wrapper.original_module
            replace_module(model, path, kept)
        restore_bypasses(model, record.attributes)
        unshare_inputs(model)
        unfuse_mlps(model)

    def check_active(self, op: str, model: nn.Module, names: Sequence[str]) -> None:
        for path, layer in self.record(model).layers(model).items():
            acting = {
                name: getattr(layer.adapters[name], "lora_magnitude", None) for name in names if name in layer.adapters
            }
            if len(acting) > 1 and any(magnitude is not None for magnitude in acting.values()):
                raise ValueError(f"{op}: {list(acting)} all adapt {path} and one is DoRA, expected that alone")
        for path, wrapper in self.record(model).wrappers(model).items():
            if len([name for name in names if name in wrapper.copies]) > 1:
                raise ValueError(f"{op}: {list(names)} all have a copy of {path}, expected one active copy")

    def set_active(self, model: nn.Module, names: Sequence[str], trainable: bool = True) -> None:
        record = self.record(model)
        for layer in record.layers(model).values():
            layer.set_adapter([name for name in names if name in layer.adapters], trainable)
        for wrapper in record.wrappers(model).values():
            wrapper.set_active(next((name for name in names if name in wrapper.copies), None), trainable)
        record.biases.set_active(model, names, trainable)

    def disable(self, model: nn.Module) -> Callable[[], None]:
        record = self.record(model)
        layers = record.layers(model).values()
        modules: list[Any] = [m for m in (*layers, *record.wrappers(model).values()) if not m.disabled]
        merged = [(layer, layer.merged_dtype()) for layer in layers if layer.merged]
        for layer, _ in merged:
            layer.unmerge()
        enable_biases = record.biases.disable(model)
        for module in modules:
            module.disabled = True

        def enable() -> None:
            for module in modules:
                module.disabled = False
            enable_biases()
            for layer, dtype in merged:
                layer.merge(layer.merged_tensors(dtype))

        return enable

    def merged(self, model: nn.Module) -> bool:
        return any(layer.merged for layer in self.record(model).layers(model).values())

    def prepare_merge(self, model: nn.Module, dequantise: bool = False) -> Callable[[], None] | None:
        names, ready = owners(model), []
        for path, layer in self.record(model).layers(model).items():
            if not layer.active:
                continue
            for weight in layer.adapted(layer.active) if isinstance(layer, LoraExperts) else ("weight",):
                _check_mergeable(path, layer.base_layer, weight, names)
            try:
                dtype = quantised.computed_in(layer.base_layer, model) if dequantise else None
                ready.append((layer, layer.merged_tensors(dtype)))
            except ValueError as error:
                raise ValueError(f"merge: {path}: {error}") from None

        def run() -> None:
            for layer, tensors in ready:
                layer.merge(tensors)

        return run if ready else None

    def unmerge(self, model: nn.Module) -> None:
        for layer in self.record(model).layers(model).values():
            if layer.merged:
                layer.unmerge()


def _check_mergeable(path: str, base: nn.Module, name: str, names: Mapping[int, list[str]]) -> None:
    """Raise if a layer's parameter cannot be merged into."""
    weight = base._parameters.get(name)
    if weight is None:
        raise ValueError(
            f"merge: the {name} of {path} is computed anew for each call (weight_norm, spectral_norm, "
            "parametrize), expected a parameter: remove that first"
        )
    if weight.is_meta:
        raise ValueError(f"merge: the {name} of {path} is offloaded or on the meta device, expected values")
    tied = names[id(weight)]
    if len(tied) > 1:
        raise ValueError(f"merge: the {name} of {path} is also {next(n for n in tied if not n.startswith(path))}")


def is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | LoraEmbedding)


def _refuse_copied(op: str, model: nn.Module, config: Lora, targets: Targets, copies: Iterable[str]) -> None:
    """Raise if the config names a layer that another adapter has a copy of: it would be left out without a word."""
    others, own = tuple(f"{path}." for path in copies), tuple(f"{path}." for path in targets.copies)
    if config.targets == ALL_LINEAR or not others:
        return
    for path, module in own_modules(model).items():
        inside = f"{path}."
        if inside.startswith(others) and not (own and inside.startswith(own)) and named(path, config):
            if not_adaptable_reason(module) is None:
                raise ValueError(f"{op}: targets names {path}, but another adapter has a copy of it (modules_to_save)")


def _adapted(module: nn.Module, path: str, config: Lora, name: str) -> LoraLinear:
    settings: dict[str, Any] = {
        "r": config.rank_of(path),
        "alpha": config.alpha_of(path),
        "dropout": config.dropout,
        "rslora": config.rslora,
        "lora_bias": config.lora_bias,
        "init": config.init,
        "dtype": config.dtype,
        "dora": config.dora,
    }
    if isinstance(module, LoraLinear):
        module.add_adapter(name, **settings)
        layer = module
    else:
        layer = (LoraEmbedding if isinstance(module, nn.Embedding) else LoraLinear)(module, name, **settings)
    put_beside(layer.adapters[name], layer.base_layer)
    return layer


def _copied(module: nn.Module, name: str) -> TrainedCopy:
    wrapper = module if isinstance(module, TrainedCopy) else TrainedCopy(module)
    wrapper.add_copy(name)
    return wrapper


def _take_back(modules: Iterable[nn.Module], name: str) -> None:
    for module in modules:
        added: Any = getattr(module, "adapters" if isinstance(module, LoraLinear) else "copies", None)
        if isinstance(module, LoraLinear | TrainedCopy) and name in added:
            del added[name]


def _fuse(model: nn.Module, configs: Mapping[str, Lora]) -> None:
    """Group the layers that are computed together, as all adapters' configs have it."""
    unshare_inputs(model)
    unfuse_mlps(model)
    if all(config.share_inputs for config in configs.values()):
        share_inputs(model, lambda module: isinstance(module, LoraLinear))
    if all(config.fuse_mlp for config in configs.values()):
        fuse_mlps(model, lambda module: isinstance(module, LoraLinear))
