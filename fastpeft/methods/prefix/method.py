"""Prefix tuning, as ``attach`` drives it: keys and values trained in front of every layer's."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import _check
from ...nn.prefix import PrefixAdapter, Prefixes, Sizes, attention_beside
from ..formats.files import write_json, write_tensors
from ..formats.peft_files import CONFIG, WEIGHTS
from ..formats.peft_prompts import EMBEDDINGS, check_fields, fields_of, load_tensors, read_embeddings
from ..layer_report import LayerReport
from ..method import Method
from ..prompt.method import disable

CHILD = "fastpeft_prefix"  # the module that is added to the model
ATTENTION = "fastpeft_prefix"  # our attention function's name in transformers
RAW = "fastpeft_reparameterization.safetensors"  # what PEFT does not keep of a projection
INITS = ("random", "zero", "text")


@dataclass(frozen=True, kw_only=True)
class PrefixTuning:
    """Prefix tuning for ``fastpeft.attach`` (Li & Liang, 2021). Names in [brackets] are PEFT's.

    Args:
        length: tokens of the prefix [num_virtual_tokens].
        projection: hidden units of an MLP that makes the keys and values; None: they are trained themselves
            [prefix_projection, encoder_hidden_size].
        init: "random", normal with standard deviation 1; "zero" keys and values, which still take their share of the
            attention [init_weights]; "text", what the model's cache holds after ``text``, so that it starts as if the
            text stood in front of the input.
        text: ``length`` token ids, of a model that generates, without projection.
        dtype: of the parameters; None: float32 where the model is 16 bits wide, else the model's.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.
    """

    length: int = 20
    projection: int | None = None
    init: str = "random"
    text: Sequence[int] | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self):
        _check.positive("PrefixTuning", "length", self.length)
        if self.projection is not None:
            _check.positive("PrefixTuning", "projection", self.projection)
        if self.init not in INITS:
            raise ValueError(f"PrefixTuning: init is {self.init!r}, expected one of {', '.join(INITS)}")
        if (self.init == "text") != (self.text is not None):
            expected = "token ids with init='text'" if self.init == "text" else "None without init='text'"
            raise ValueError(f"PrefixTuning: text is {self.text!r}, expected {expected}")
        if self.text is not None:
            if isinstance(self.text, str) or not all(type(token) is int for token in self.text):
                raise TypeError(f"PrefixTuning: text is {self.text!r}, expected token ids")
            if len(self.text) != self.length:
                raise ValueError(f"PrefixTuning: text has {len(self.text)} tokens, expected length={self.length}")
            if self.projection is not None:
                raise ValueError("PrefixTuning: init='text' with a projection, expected projection=None")
            object.__setattr__(self, "text", tuple(self.text))
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise ValueError(f"PrefixTuning: dtype is {self.dtype}, expected a floating-point dtype")


class PrefixMethod(Method):
    name, config, title = "prefix", PrefixTuning, "PrefixTuning"
    unmergeable = "it is no term of a weight but keys and values"

    def new_record(self) -> dict:
        return {}

    def resolve(self, op: str, model: nn.Module, config: PrefixTuning, name: str, strict: bool = True) -> Any:
        sizes = sizes_of(op, model)
        if getattr(model, CHILD, None) is not None and self.record(model) is None:
            raise ValueError(f"{op}: the model has a {CHILD} of its own, expected a model without")
        implementation = model.config._attn_implementation
        if implementation not in ("sdpa", "eager", ATTENTION):
            raise ValueError(
                f"{op}: the model's attention is {implementation!r}, expected 'sdpa' or 'eager': "
                'model.set_attn_implementation("sdpa")'
            )
        if config.text is not None and not getattr(model, "can_generate", bool)():
            raise ValueError(f"{op}: init='text' on {type(model).__name__}, expected a model that generates")
        vocabulary = model.get_input_embeddings().weight.shape[0]
        if config.text is not None and not all(0 <= token < vocabulary for token in config.text):
            raise ValueError(f"{op}: text holds a token outside of the vocabulary of {vocabulary}")
        return config, sizes

    def apply(self, model: nn.Module, plan: tuple[PrefixTuning, Sizes], name: str) -> None:
        config, sizes = plan
        weight = model.get_input_embeddings().weight
        dtype = config.dtype or (torch.float32 if weight.dtype.itemsize <= 2 else weight.dtype)
        adapter = PrefixAdapter(sizes, config.length, config.projection, dtype, weight.device)
        with torch.no_grad():
            if config.init == "zero":
                for parameter in (
                    [adapter.embedding] if config.projection is None else adapter.transform[2].parameters()
                ):
                    parameter.zero_()
            if config.init == "text":
                adapter.embedding.copy_(self._of_text(model, config.text, sizes))
        adapter.requires_grad_(False).train(model.training)
        if getattr(model, CHILD, None) is None:
            register_attention()
            prefixes = Prefixes(model)
            prefixes.train(model.training)
            prefixes.attach(model)
            model.add_module(CHILD, prefixes)
            self.record(model)["attention"] = model.config._attn_implementation
            model.config._attn_implementation = ATTENTION
        getattr(model, CHILD).adapters[name] = adapter

    def _of_text(self, model: nn.Module, text: Sequence[int], sizes: Sizes) -> Tensor:
        """The cache after the text, as ``PrefixAdapter.flat`` has it."""
        others = getattr(model, CHILD, None)
        enable = disable(others) if others is not None else lambda: None
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            ids = torch.tensor([text], device=model.get_input_embeddings().weight.device)
            cache = model(input_ids=ids, use_cache=True).past_key_values
        finally:
            for module in training:
                module.training = True
            enable()
        pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        return torch.stack(pairs).permute(3, 0, 1, 2, 4).reshape(len(text), -1)

    def discard(self, model: nn.Module, name: str) -> None:
        prefixes = getattr(model, CHILD, None)
        if prefixes is not None:
            if name in prefixes.adapters:
                del prefixes.adapters[name]
            prefixes.active = tuple(other for other in prefixes.active if other != name)
            if not prefixes.names:
                self.remove(model)

    def remove(self, model: nn.Module, keep_merged: bool = False) -> None:
        prefixes = getattr(model, CHILD, None)
        if prefixes is not None:
            prefixes.detach()
            delattr(model, CHILD)
        record = self.record(model)
        if "attention" in record:
            model.config._attn_implementation = record.pop("attention")

    def set_active(self, model: nn.Module, names: Sequence[str], trainable: bool = True) -> None:
        prefixes = getattr(model, CHILD)
        prefixes.active = tuple(name for name in names if name in prefixes.adapters)
        for name, adapter in prefixes.adapters.items():
            adapter.requires_grad_(trainable and name in prefixes.active)

    def disable(self, model: nn.Module) -> Callable[[], None]:
        return disable(getattr(model, CHILD))

    def parameters(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        adapter = getattr(model, CHILD).adapters[name]
        if adapter.transform is None:
            return {EMBEDDINGS: adapter.embedding}
        return dict(adapter.state_dict(keep_vars=True))

    def expected(self, model: nn.Module, config: PrefixTuning, plan: Any) -> dict[str, tuple[int, ...]]:
        sizes = plan[1]
        narrow, wide = sizes.heads * sizes.width, 2 * sizes.layers * sizes.heads * sizes.width
        if config.projection is None:
            return {EMBEDDINGS: (config.length, wide)}
        hidden = config.projection
        linears = {"0.weight": (hidden, narrow), "0.bias": (hidden,), "2.weight": (wide, hidden), "2.bias": (wide,)}
        return {"embedding": (config.length, narrow), **{f"transform.{key}": s for key, s in linears.items()}}

    def recognises(self, fields: Mapping) -> bool:
        return fields.get("peft_type") == "PREFIX_TUNING"

    def read(self, op: str, model: nn.Module, directory: Path, fields: Mapping) -> tuple[Any, dict[str, Tensor]]:
        """With the projection where we wrote it beside; PEFT keeps its result alone, which is trained directly then."""
        length, tensors = check_fields(op, fields), read_embeddings(op, directory)
        if not (directory / RAW).is_file():
            return PrefixTuning(length=length), tensors
        raw = load_tensors(op, directory / RAW)
        hidden = raw.get("transform.0.bias")
        if hidden is None:
            raise ValueError(f"{op}: {directory / RAW} has no transform.0.bias, expected a projection's weights")
        return PrefixTuning(length=length, projection=len(hidden)), raw

    def write(self, op: str, model: nn.Module, name: str, tensors: dict[str, Tensor], directory: Path) -> None:
        adapter = getattr(model, CHILD).adapters[name]
        layers, heads, width = adapter.sizes
        (directory / RAW).unlink(missing_ok=True)  # of another adapter, written here before
        if adapter.transform is not None:
            write_tensors(op, directory / RAW, tensors)
            with torch.no_grad():
                tensors = {EMBEDDINGS: torch.func.functional_call(_Flat(adapter), _inside(tensors), ()).contiguous()}
        fields = fields_of(
            model,
            "PREFIX_TUNING",
            adapter.length,
            token_dim=heads * width,
            num_layers=layers,
            num_attention_heads=heads,
            encoder_hidden_size=None if adapter.transform is None else adapter.transform[0].out_features,
            prefix_projection=adapter.transform is not None,
        )
        write_tensors(op, directory / WEIGHTS, tensors)
        write_json(directory / CONFIG, fields)

    def report(self, model: nn.Module) -> Sequence[LayerReport]:
        return [LayerReport(CHILD, "fused", "torch", kind="prefixes")]


class _Flat(nn.Module):
    """A prefix whose forward is ``flat``."""

    def __init__(self, adapter: PrefixAdapter):
        super().__init__()
        self.adapter = adapter

    def forward(self) -> Tensor:
        return self.adapter.flat()


def _inside(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"adapter.{key}": value for key, value in tensors.items()}


def sizes_of(op: str, model: nn.Module) -> Sizes:
    """Layers and heads of a transformers model.

    Raises:
        TypeError: not a model that prefixes can be given to.
    """
    config = getattr(model, "config", None)
    parameters = inspect.signature(model.forward).parameters.values() if isinstance(model, nn.Module) else ()
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if config is None or not hasattr(config, "_attn_implementation") or not hands_on:
        raise TypeError(
            f"{op}: expected for PrefixTuning a transformers model with attention functions, not {type(model).__name__}"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"{op}: {type(model).__name__} is an encoder-decoder, expected for PrefixTuning one stack of layers"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Sizes(text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or heads, width)


def register_attention() -> None:
    """Make our attention function known to transformers, by a name that only attached models use."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if ATTENTION not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(ATTENTION, attention_beside(ALL_ATTENTION_FUNCTIONS["sdpa"]))
        AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
