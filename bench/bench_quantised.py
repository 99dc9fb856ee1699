"""LoRA around an NF4 layer: the frozen layer, PEFT's, PEFT's under torch.compile, ours; time, kept and peak bytes.

    python -m bench.bench_quantised --device cpu --out rows.jsonl [--quick] [--shape 1024x1024] [--rows 512]

A gated MLP in NF4 is in bench_mlp.py. Both need bitsandbytes. Weights are drawn, quantised and written
out, so that every variant's truth is the same.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from fastpeft.integrations.peft import accelerate
from fastpeft.nn.quantised import base_of
from fastpeft.ops import dequantise
from fastpeft.reference import inverse_keep

from . import command, harness, machine, peers
from .harness import FROZEN, PEER, Call
from .lora import SCALE, Arguments, Problem, Provider

SHAPES = {"cpu": ("1024x1024",), "cuda": ("4096x4096", "4096x14336")}


@dataclass(frozen=True)
class Quantised(Problem):
    """As ``Problem``; the weight is read in 4 bits."""

    @property
    def op(self) -> str:
        return "lora_linear_nf4"


def layer_of(weight: Tensor) -> nn.Module:
    """bitsandbytes' layer with this weight, in blocks of 64."""
    import bitsandbytes

    n, k = weight.shape
    layer = bitsandbytes.nn.Linear4bit(
        k, n, False, weight.dtype, compress_statistics=False, quant_type="nf4", device=weight.device
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.cpu(), requires_grad=False, compress_statistics=False, quant_type="nf4", module=layer
    )
    return layer.to(weight.device)


def nf4_of_zeros(n: int, k: int, device: str) -> nn.Module:
    """bitsandbytes' layer of this size as it is once quantised, with nested scales: nothing is computed for it."""
    import bitsandbytes as bnb

    def zeros(*size, dtype=torch.float32):
        return torch.zeros(size, dtype=dtype, device=device)

    blocks, state = n * k // 64, bnb.functional.QuantState
    outer = state(absmax=zeros(-(-blocks // 256)), blocksize=256, code=zeros(256), dtype=torch.float32)
    settings = {"blocksize": 64, "quant_type": "nf4", "dtype": torch.bfloat16, "offset": zeros(), "state2": outer}
    absmax = zeros(blocks, dtype=torch.uint8)
    inner = state(absmax=absmax, shape=torch.Size((n, k)), code=zeros(16), **settings)
    layer = bnb.nn.Linear4bit(k, n, False, torch.bfloat16, quant_type="nf4", device="meta")
    codes, given = zeros(n * k // 2, 1, dtype=torch.uint8), {"requires_grad": False, "bnb_quantized": True}
    layer.weight = bnb.nn.Params4bit(codes, quant_state=inner, module=layer, **given)
    layer.quant_state = inner
    return layer


def snapped(arguments: Arguments) -> Arguments:
    """With weights that are in 4 bits what they are in 16: quantised again they give the same codes."""
    return replace(arguments, weights=[dequantise(base_of(layer_of(w)), w.dtype) for w in arguments.weights])


class _Model(nn.ModuleDict):
    is_loaded_in_4bit = True


class _Layers:
    """Calls layers with one x; ``codes`` are their frozen tensors, which are no activations."""

    def __init__(self, layers: list, frozen: list):
        self.layers, self.codes = layers, [part for layer in frozen for part in base_of(layer)[:6]]

    def __call__(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


class _Provider(Provider):
    def bind(self, problem: Problem, arguments: Arguments) -> Call:
        call = super().bind(problem, arguments)
        return replace(call, parameters=[*call.parameters, *call.forward.func.codes])


def _frozen(problem, weights):
    layers = [layer_of(weight) for weight in weights]
    return _Layers(layers, layers)


def _adapted(problem, weights, lora_as, lora_bs, change=lambda layer: layer):
    frozen = [layer_of(weight) for weight in weights]
    return _Layers([change(layer) for layer in adapted(frozen, lora_as, lora_bs, problem.dropout)], frozen)


def adapted(frozen: list[nn.Module], lora_as, lora_bs, dropout: float = 0.0) -> list[nn.Module]:
    """PEFT's layers around these, with A and B as they are given."""
    import peft

    layers = []
    for base, a, b in zip(frozen, lora_as, lora_bs, strict=True):
        rank = a.shape[0]
        config = peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, lora_dropout=dropout, target_modules=["proj"])
        layer = peft.inject_adapter_in_model(config, _Model({"proj": base}))["proj"]
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
        layers.append(layer.train())
    return layers


def case(problem: Quantised, compile_peft: bool) -> harness.Case:
    """The problem as the harness takes it."""
    draw = cache(lambda seed: snapped(Arguments.draw(problem, seed)))
    listed = [
        _Provider(FROZEN, _frozen, None),
        _Provider(PEER, _adapted, torch.float32),
        _Provider("ours", partial(_adapted, change=accelerate), torch.float32, own=True, inverse_keep=inverse_keep),
    ]
    if compile_peft:
        listed.append(_Provider("PEFT, torch.compile", partial(_adapted, change=peers.compiled()), torch.float32))
    k, (n,) = problem.sizes
    bytes_of_a_set = problem.dtype.itemsize * problem.rows * (k + n) + k * n // 2
    sets = machine.argument_sets(problem.device, bytes_of_a_set)
    return harness.Case.of(problem, [provider.variant(problem, draw) for provider in listed], sets)


def cases(options: argparse.Namespace) -> list[Callable[[], harness.Case]]:
    shapes = options.shape or SHAPES[options.device.type]
    rows = options.rows or (8192 if options.device.type == "cuda" else 512)
    listed = [Quantised(shape, rows, torch.bfloat16, 16, p, options.device) for shape in shapes for p in (0.0, 0.05)]
    return [
        lambda p=p: case(p, command.compiles(options, False)).only(options.variant)
        for p in listed[: 1 if options.quick else None]
    ]


def main(argv: list[str] | None = None) -> int:
    parser = command.parser("bench_quantised", __doc__, quick="the first case")
    parser.add_argument("--shape", action="append", help="KxN; may be repeated")
    parser.add_argument("--rows", type=int, help="rows of x")
    command.add_compile(parser, "PEFT")
    return command.main(parser, cases, argv)


if __name__ == "__main__":
    sys.exit(main())
