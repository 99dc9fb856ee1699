"""Prefix tuning, as ``attach`` drives it: keys and values trained in front of every layer's."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.base_layer import trained_dtype
from ...nn.prefix import PrefixAdapter, Prefixes, Sizes, attention_beside
from ..embeddings import token_table
from ..layer_report import LayerReport
from ..row_method import RowMethod
from .config import PrefixTuning
from .files import PrefixFiles

ATTENTION = "fastpeft_prefix"  # our attention function's name in transformers
Plan = tuple[PrefixTuning, Sizes]


class PrefixMethod(RowMethod):
    name, config, title, child = "prefix", PrefixTuning, "PrefixTuning", "fastpeft_prefix"
    unmergeable = "it is no term of a weight but keys and values"

    def __init__(self):
        self.files = PrefixFiles(self)

    def resolve(self, op: str, model: Any, config: PrefixTuning, name: str, strict: bool = True) -> Plan:
        sizes = sizes_of(op, model)
        self.refuse_own(op, model)
        implementation = model.config._attn_implementation
        if implementation not in ("sdpa", "eager", ATTENTION):
            raise ValueError(
                f"{op}: the model's attention is {implementation!r}, expected 'sdpa' or 'eager': "
                'model.set_attn_implementation("sdpa")'
            )
        if config.text is not None and not getattr(model, "can_generate", bool)():
            raise ValueError(f"{op}: init='text' on {type(model).__name__}, expected a model that generates")
        vocabulary = len(token_table(model))
        if config.text is not None and not all(0 <= token < vocabulary for token in config.text):
            raise ValueError(f"{op}: text holds a token outside of the vocabulary of {vocabulary}")
        return config, sizes

    def apply(self, model: Any, plan: Plan, name: str) -> None:
        config, sizes = plan
        weight = token_table(model)
        dtype = config.dtype or trained_dtype(weight.dtype)
        adapter = PrefixAdapter(sizes, config.length, config.projection, dtype, weight.device)
        with torch.no_grad():
            if config.init == "zero":
                last = [adapter.embedding] if adapter.transform is None else adapter.transform[2].parameters()
                for parameter in last:
                    parameter.zero_()
            if config.text is not None:
                adapter.embedding.copy_(self._of_text(model, config.text))
        adapter.requires_grad_(False).train(model.training)
        if not self.present(model):
            register_attention()
            self.put_up(model, Prefixes(model))
            self.record(model)["attention"] = model.config._attn_implementation
            model.config._attn_implementation = ATTENTION
        self.adapters(model).put(name, adapter)

    def _of_text(self, model: nn.Module, text: Sequence[int]) -> Tensor:
        """The cache after the text, as ``PrefixAdapter.flat`` has it."""
        enable = self.disable(model) if self.present(model) else lambda: None
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            ids = torch.tensor([text], device=token_table(model).device)
            cache = model(input_ids=ids, use_cache=True).past_key_values
        finally:
            for module in training:
                module.training = True
            enable()
        pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        return torch.stack(pairs).permute(3, 0, 1, 2, 4).reshape(len(text), -1)

    def remove(self, model: Any, keep_merged: bool = False) -> None:
        super().remove(model, keep_merged)
        record = self.record(model)
        if "attention" in record:
            model.config._attn_implementation = record.pop("attention")

    def report(self, model: nn.Module) -> Sequence[LayerReport]:
        return [LayerReport(self.child, "fused", "torch", kind="prefixes")]


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
