"""What bench_host.py measures beside LoRA on linear layers: LoRA on experts, bottlenecks, prompts and prefixes.

Each function gives the training step of each way of computing it, all on the device and of one shape.
"""

import copy
from collections.abc import Callable

import peft
import torch
import transformers
from torch import Tensor, nn

import fastpeft

FROZEN, PEFT, OURS, EAGER = "frozen", "PEFT", "ours", "PyTorch's modules"
RANK, ROWS, LENGTH = 16, 4, 128

Steps = dict[str, Callable[[], object]]


def _training(model: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], object]:
    parameters = [*model.parameters()]

    def step() -> Tensor:
        y = forward()
        y.backward(torch.zeros_like(y))
        for parameter in parameters:
            parameter.grad = None
        return y

    return step


class _Mixture(nn.Module):
    """The experts of a layer of Qwen3-30B-A3B, as transformers' grouped_mm computes them."""

    def __init__(self):
        super().__init__()
        config = transformers.Qwen3MoeConfig(
            hidden_size=2048,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            experts_implementation="grouped_mm",
        )
        self.experts = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts(config)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def experts(adapters: str) -> Steps:
    """A layer of experts, adapted in both of its weights: PEFT's ParamWrapper, and the same accelerated."""
    rows, wide = 2048, adapters == "float32"
    with torch.device("cuda"):
        base = _Mixture().bfloat16().requires_grad_(False)
        x = torch.zeros(rows, 2048, dtype=torch.bfloat16, requires_grad=True)
        index = torch.arange(rows * 8).view(rows, 8) % 128
        weights = torch.zeros(rows, 8, dtype=torch.bfloat16)
    config = peft.LoraConfig(r=RANK, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    theirs, ours = (
        peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=wide).train() for _ in range(2)
    )
    fastpeft.accelerate(ours)
    found = {FROZEN: base, PEFT: theirs.base_model.model, OURS: ours.base_model.model}
    return {way: _training(model, lambda model=model: model(x, index, weights)) for way, model in found.items()}


class _Bottleneck(nn.Module):
    """As a person would write it."""

    def __init__(self, wide: int, narrow: int):
        super().__init__()
        self.down, self.up = nn.Linear(wide, narrow), nn.Linear(narrow, wide)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(torch.relu(self.down(x)))


def bottleneck() -> Steps:
    """Two layers of a BERT with an adapter behind each feed-forward layer, in float32."""
    config = transformers.BertConfig(num_hidden_layers=2)
    base = transformers.BertModel(config, add_pooling_layer=False).cuda().requires_grad_(False).eval()
    ids = torch.ones(ROWS, LENGTH, dtype=torch.long, device="cuda")
    base.get_input_embeddings().register_forward_hook(lambda module, inputs, y: y.requires_grad_())
    eager, ours = copy.deepcopy(base), copy.deepcopy(base)
    for layer in eager.encoder.layer:
        layer.output.dense.adapter = _Bottleneck(768, 48).cuda()
        layer.output.dense.register_forward_hook(lambda module, inputs, y: module.adapter(y))
    fastpeft.attach(ours, fastpeft.Bottleneck(reduction_factor=16))
    found = {FROZEN: base, EAGER: eager, OURS: ours}
    return {
        way: _training(model, lambda model=model: model(input_ids=ids).last_hidden_state)
        for way, model in found.items()
    }


def virtual_tokens(kind: str, model: nn.Module) -> Steps:
    """A decoder behind a prompt or a prefix of 16 tokens, by PEFT's config in PEFT and in ``attach``."""
    made = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    config = made(task_type="CAUSAL_LM", num_virtual_tokens=16)
    model = model.cuda().requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, y: y.requires_grad_())
    theirs, ours = peft.get_peft_model(copy.deepcopy(model), config), copy.deepcopy(model)
    fastpeft.attach(ours, config)
    ids = torch.ones(ROWS, LENGTH, dtype=torch.long, device="cuda")
    found = {FROZEN: model, PEFT: theirs, OURS: ours}
    return {way: _training(model, lambda model=model: model(input_ids=ids).logits) for way, model in found.items()}
