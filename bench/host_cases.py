"""What bench_host.py measures: one linear, a block of seven, a mixed batch, a decode step, a turn of the Batcher.

The steps of the other methods are in ``host_methods``.

Each case gives a step for each way of computing it, all on the device and all of one shape.
"""

import copy
import functools
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from torch import Tensor, nn

import fastpeft
from fastpeft import ops, serving

from . import host_gated, host_methods
from .host_methods import FROZEN, OURS, PEFT, Steps
from .llama_block import LINEARS

OWN = "ours, attached"
WIDE, ROWS, RANK = 4096, 2048, 16  # of the layers
SERVED = 8  # rows and layers of the model that decodes


@dataclass(frozen=True)
class Case:
    """One comparison; ``trains`` is forward and backward, else forward without gradients."""

    name: str
    trains: bool = False
    dropout: float = 0.0
    adapters: str = "bfloat16"
    autocast: bool = False

    def __str__(self) -> str:
        words = [self.name, "fwd+bwd" if self.trains else "no gradients", f"dropout {self.dropout}", self.adapters]
        return ", ".join(words + ["autocast"] * self.autocast)


def cases() -> Iterator[Case]:
    for name in ("linear", "block"):
        for dropout in (0.0, 0.1):
            for adapters, autocast in (("bfloat16", False), ("float32", False), ("float32", True)):
                yield Case(name, True, dropout, adapters, autocast)
            yield Case(name, False, dropout)
    for name in host_gated.NAMES[: 2 if importlib.util.find_spec("bitsandbytes") else 1]:
        yield from (Case(name, True, adapters=adapters) for adapters in ("bfloat16", "float32"))
    yield from map(Case, ("multi_lora", "decode step", "Batcher turn"))
    yield from (Case("experts", True, adapters=adapters) for adapters in ("bfloat16", "float32"))
    yield Case("bottleneck", True, adapters="float32")
    yield from (Case(name, True, adapters="float32") for name in ("prompt", "prefix"))


def steps(case: Case, unsloth: bool = False) -> Steps:
    """What is to be timed beside each other, of a gated block Unsloth's functions and PEFT's layers alone if asked."""
    builders = {"multi_lora": _mixed, "decode step": _decoding, "Batcher turn": _turning}
    builders["experts"] = functools.partial(host_methods.experts, case.adapters)
    builders["bottleneck"] = host_methods.bottleneck
    for kind in ("prompt", "prefix"):
        builders[kind] = lambda kind=kind: host_methods.virtual_tokens(kind, _model())
    return builders[case.name]() if case.name in builders else _layers(case, unsloth)


# ---- layers


class Attention(nn.Module):
    """The four projections as a block calls them, without what lies between: that is alike in all."""

    def __init__(self):
        super().__init__()
        for name in LINEARS[:4]:
            setattr(self, name, nn.Linear(WIDE, WIDE, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x) + self.k_proj(x) + self.v_proj(x))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        for name in LINEARS[4:]:
            setattr(self, name, nn.Linear(WIDE, WIDE, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.self_attn(x))


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(WIDE, WIDE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


def _layers(case: Case, unsloth: bool) -> Steps:
    gated, wide = case.name in host_gated.NAMES, case.adapters == "float32"
    with torch.device("cuda"):
        shape = (1, ROWS, WIDE) if gated else (ROWS, WIDE)  # Unsloth's functions take no other
        x = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=case.trains)
        gradient = torch.zeros_like(x)

    def timed(model: nn.Module) -> Callable[[], Tensor]:
        return functools.partial(_step, model, [*model.parameters()], x, gradient, case)

    targets = ["q_proj"] if case.name == "linear" else LINEARS
    config = peft.LoraConfig(r=RANK, lora_dropout=case.dropout, target_modules=targets)
    if gated:
        return host_gated.steps(case.name.endswith("NF4"), config, wide, timed, unsloth)
    with torch.device("cuda"):
        base = (Linear if case.name == "linear" else Block)().bfloat16().requires_grad_(False)
    theirs, ours = (
        peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=wide).train() for _ in range(2)
    )
    fastpeft.accelerate(ours)
    attached = copy.deepcopy(base).train()
    fastpeft.attach(
        attached, fastpeft.Lora(r=RANK, dropout=case.dropout, targets=targets, dtype=getattr(torch, case.adapters))
    )
    models = {FROZEN: base, PEFT: theirs.base_model.model, OURS: ours.base_model.model, OWN: attached}
    return {way: timed(model) for way, model in models.items()}


def _step(model: nn.Module, parameters: list[nn.Parameter], x: Tensor, gradient: Tensor, case: Case) -> Tensor:
    with torch.set_grad_enabled(case.trains), torch.autocast("cuda", torch.bfloat16, enabled=case.autocast):
        y = model(x)
    if case.trains:
        y.backward(gradient)
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
    return y


# ---- serving


def _mixed() -> Steps:
    """One layer of a decode step: 32 rows that name 4 adapters, onto the frozen layer's output."""
    rows, slots = 32, 4
    with torch.device("cuda"):
        base = nn.Linear(WIDE, WIDE, bias=False).bfloat16().requires_grad_(False)
        x = torch.zeros(rows, WIDE, dtype=torch.bfloat16)
        lora_a = torch.zeros(slots, RANK, WIDE, dtype=torch.bfloat16)
        lora_b = torch.zeros(slots, WIDE, RANK, dtype=torch.bfloat16)
        ranks, scales = torch.full((slots,), RANK, dtype=torch.int32), torch.ones(slots)
    routing = ops.route(torch.arange(rows, device="cuda") % slots, slots)

    def step() -> Tensor:
        with torch.no_grad():
            return ops.multi_lora_(base(x), x, lora_a, lora_b, routing, scales, ranks)

    def frozen() -> Tensor:
        with torch.no_grad():
            return base(x)

    return {FROZEN: frozen, OURS: step}


def _model() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=SERVED,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return transformers.LlamaForCausalLM(config).bfloat16().eval()


@functools.cache
def _checkpoints() -> list[str]:
    """Three adapters on disk, of ranks 8, 16 and 4."""
    folder = tempfile.mkdtemp()
    for rank in (8, 16, 4):
        config = peft.LoraConfig(r=rank, target_modules="all-linear")
        peft.get_peft_model(_model(), config).save_pretrained(f"{folder}/{rank}")
    return [f"{folder}/{rank}" for rank in (8, 16, 4)]


def _names() -> list[str]:
    return [f"adapter {row % 3}" for row in range(SERVED)]


def _bank() -> serving.AdapterBank:
    bank = serving.AdapterBank(_model().cuda(), slots=4, max_rank=RANK)
    for i, folder in enumerate(_checkpoints()):
        bank.load(f"adapter {i}", folder)
    return bank


def _decode(model: nn.Module, **arguments) -> Callable[[], object]:
    """One more token of each row, behind four that are in the cache."""
    ids, cache = torch.ones(SERVED, 1, dtype=torch.long, device="cuda"), transformers.DynamicCache()

    def step(ids: Tensor = ids) -> object:
        with torch.no_grad():
            return model(input_ids=ids, past_key_values=cache, use_cache=True, **arguments)

    step(ids.repeat(1, 4))
    return step


def _decoding() -> Steps:
    bank = _bank()
    with bank.use(_names()):
        inside = _decode(bank.model)

    def ours() -> object:
        with bank.use(_names()):
            return inside()

    theirs = peft.PeftModel.from_pretrained(_model(), _checkpoints()[0], adapter_name="adapter 0")
    for i in (1, 2):
        theirs.load_adapter(_checkpoints()[i], f"adapter {i}")
    theirs.cuda().eval()
    mixed = _decode(theirs, adapter_names=_names())
    return {FROZEN: _decode(_model().cuda()), PEFT: _decode(theirs), OURS: ours, "PEFT, mixed batch": mixed}


def _turning() -> Steps:
    """A whole turn of the Batcher: admission, the step, sampling, the requests' tokens."""
    batcher = serving.Batcher(_bank(), max_rows=SERVED)
    for name in _names():
        batcher.submit([1, 2, 3, 4], adapter=name, max_new_tokens=1000)
    batcher._turn()
    return {FROZEN: _decode(_model().cuda()), OURS: batcher._turn}
