"""Real models of no values, on the device, and the ways of adapting them that bench_memory.py compares."""

import functools
import os
import tempfile
from dataclasses import dataclass, field
from types import ModuleType

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fastpeft

RANK = 16
WAYS = FROZEN, PEFT, OURS, UNSLOTH = "frozen", "PEFT", "ours", "Unsloth's functions"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True)
class Shape:
    """One published model: its class, its configuration where that differs from the class's, and what is adapted.

    ``length`` is that of a sequence where it does not grow with the tokens; ``heads`` says whether steps end in the
    model's loss.
    """

    model: type
    config: type
    values: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    targets: list[str] | str = "all-linear"
    parameters: list[str] | None = None
    tokens: tuple[int, ...] = (2048, 8192)
    heads: tuple[bool, ...] = (False,)
    length: int | None = None
    note: str | None = None

    @property
    def decodes(self) -> bool:
        return "CausalLM" in self.model.__name__

    def base(self, layers: int | None = None) -> nn.Module:
        """The model, its weights not initialised, or one of ``layers`` layers."""
        values = self.values if layers is None else {**self.values, "num_hidden_layers": layers}
        config = self.config(**values)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device("cuda"):
                return self.model(config).train()
        finally:
            torch.set_default_dtype(before)

    def inputs(self, tokens: int, head: bool) -> dict:
        """One batch: of one row where the model takes any length, else of as many as have the tokens."""
        length = self.length or tokens
        rows = tokens // length
        if self.config is transformers.ViTConfig:
            return {"pixel_values": torch.zeros(rows, 3, 224, 224, dtype=self.dtype, device="cuda")}
        ids = torch.zeros(rows, length, dtype=torch.long, device="cuda")
        return {"input_ids": ids, **({"labels": ids} if head else {})}


def _attention_without_sinks(module, query, key, value, mask, **others):
    """What a fused attention with gpt-oss's sinks keeps: one number a head of them is all it leaves out."""
    others.pop("s_aux", None)
    return sdpa_attention_forward(module, query, key, value, mask, **others)


transformers.AttentionInterface.register("without_sinks", _attention_without_sinks)

LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
QWEN = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "experts_implementation": "grouped_mm",
}
GPT_OSS = {
    "num_hidden_layers": 24,
    "num_local_experts": 32,
    "experts_implementation": "grouped_mm",
    "attn_implementation": "without_sinks",
}
ENCODER = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

MODELS = {
    "Llama-3.1-8B": Shape(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        LLAMA,
        tokens=(2048, 4096, 8192, 16384),
        heads=(False, True),
    ),
    "Qwen3-30B-A3B": Shape(
        transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig, QWEN, targets=ATTENTION, parameters=EXPERTS
    ),
    "gpt-oss-20b": Shape(
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig,
        GPT_OSS,
        targets=ATTENTION,
        parameters=EXPERTS,
        note="weights in bfloat16; attention without sinks",
    ),
    "BERT-large": Shape(transformers.BertModel, transformers.BertConfig, ENCODER, torch.float32, length=512),
    "ViT-L": Shape(transformers.ViTModel, transformers.ViTConfig, ENCODER, torch.float32, length=197),
}


def adapted(base: nn.Module, shape: Shape, way: str, dropout: float, adapters: torch.dtype, experts: bool) -> nn.Module:
    """``base`` adapted in place: LoRA of rank 16 on all its linears, or on attention and, if ``experts``, experts."""
    if way == FROZEN:
        return base.requires_grad_(False)
    config = peft.LoraConfig(
        r=RANK,
        lora_dropout=dropout,
        target_modules=shape.targets,
        target_parameters=shape.parameters if experts else None,
    )
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=adapters == torch.float32).train()
    if way == OURS:
        fastpeft.accelerate(model)
    elif way == UNSLOTH:
        _with_unsloth(base)
    return model


def _with_unsloth(base: nn.Module) -> None:
    """transformers' blocks with Unsloth's functions in the linears' places; norms and attention stay transformers'."""
    functions = unsloths_functions()
    for layer in base.get_decoder().layers:
        use_unsloths(functions, layer.self_attn, layer.mlp)


def unsloths_functions() -> ModuleType:
    """Its LoRA functions. Importing them changes transformers and PEFT: nothing but PEFT is measured beside them."""
    os.environ.setdefault("UNSLOTH_MOE_BACKEND", "native_torch")
    os.environ["UNSLOTH_COMPILE_LOCATION"] = tempfile.mkdtemp()  # it writes code where it is imported
    import unsloth  # noqa: F401
    from unsloth.kernels import fast_lora

    torch.cuda.memory._set_allocator_settings("expandable_segments:False")  # which it switches on
    return fast_lora


def use_unsloths(functions: ModuleType, attention: nn.Module, mlp: nn.Module) -> None:
    """Have the linear layers of a block, which are PEFT's, computed by Unsloth's functions."""
    mlp.forward, rest = functools.partial(functions.apply_lora_mlp_swiglu, mlp), {}

    def projected(name, x):  # the first that is called computes all three
        if not rest:
            rest.update(zip("qkv", functions.apply_lora_qkv(attention, x), strict=True))
        return rest.pop(name)

    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    forwards = (functools.partial(projected, name) for name in "qkv")
    wrapped = functools.partial(functions.apply_lora_o, _Projections(attention.o_proj))
    for linear, forward in zip((*linears, attention.o_proj), (*forwards, wrapped), strict=True):
        linear.forward = forward


@dataclass(frozen=True)
class _Projections:
    """What apply_lora_o asks of an attention, with the layer as it was before its forward was replaced."""

    o_proj: nn.Module
