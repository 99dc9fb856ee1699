"""Prefix tuning, as ``attach`` drives it: keys and values trained in front of every layer's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.base_layer import trained_dtype
from ...nn.prefix import PrefixAdapter, Prefixes, Sizes
from ...nn.prefix_function import attention_beside, eager
from ..embeddings import execution_device, token_table
from ..layer_report import LayerReport
from ..row_method import RowMethod
from .config import PrefixTuning
from .files import PrefixFiles
from .reasons import sizes_of, text_config

# Our attention functions' names in transformers, by those of the functions that they stand in for.
ATTENTION = {"sdpa": "fastpeft_prefix", "eager": "fastpeft_prefix_eager"}
Plan = tuple[PrefixTuning, Sizes]


class PrefixMethod(RowMethod):
    name, config, title, child = "prefix", PrefixTuning, "PrefixTuning", "fastpeft_prefix"
    unmergeable = "it is no term of a weight but keys and values"

    def __init__(self):
        self.files = PrefixFiles(self)

    def resolve(self, op: str, model: Any, config: PrefixTuning, name: str, strict: bool = True) -> Plan:
        sizes = sizes_of(op, model)
        self.refuse_own(op, model)
        implementation = text_config(model)._attn_implementation
        if implementation not in (*ATTENTION, *ATTENTION.values()):
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
        dtype = config.dtype or trained_dtype(token_table(model).dtype)
        device = execution_device(model.get_input_embeddings())
        adapter = PrefixAdapter(sizes, config.length, config.projection, dtype, device)
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
            text = text_config(model)
            self.record(model)["attention"] = text._attn_implementation
            text._attn_implementation = ATTENTION[text._attn_implementation]
        self.adapters(model).put(name, adapter)

    def _of_text(self, model: Any, text: Sequence[int]) -> Tensor:
        """The cache after the text, as ``PrefixAdapter.flat`` has it."""
        enable = self.disable(model) if self.present(model) else lambda: None
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            ids = torch.tensor([text], device=execution_device(model.get_input_embeddings()))
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
            text_config(model)._attn_implementation = record.pop("attention")

    def report(self, model: nn.Module) -> Sequence[LayerReport]:
        return [LayerReport(self.child, "fused", "torch", kind="prefixes")]


def register_attention() -> None:
    """Make our attention functions known to transformers, by names that only attached models use."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    for name, ours in ATTENTION.items():
        if ours not in ALL_ATTENTION_FUNCTIONS:
            original = eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
            AttentionInterface.register(ours, attention_beside(original))
            AttentionMaskInterface.register(ours, ALL_MASK_ATTENTION_FUNCTIONS[name])
