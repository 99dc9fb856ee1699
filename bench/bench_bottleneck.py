"""bottleneck beside eager PyTorch, torch.compile and the layer of AdapterHub's library `adapters`.

    python -m bench.bench_bottleneck --device cpu --out rows.jsonl [--quick] [--form plain] [--gate-only]

One sequential adapter, its residual its input, a sixteenth as wide as the model. Forms: "plain" (relu), "norm" (a
LayerNorm in front, gelu) and "dropout" (relu, dropout 0.1). Backward is to x and to every parameter. `adapters` pins an
older transformers, so its layer takes part where it can be imported; eager is the same operations in the same order.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.ops import bottleneck
from fastpeft.testing import eager_bottleneck

from . import command, harness, machine, peers
from .clock import SEED
from .harness import FORWARD, Call, Variant
from .report import ADAPTERHUB, EAGER

FORMS = {"plain": ("relu", False, 0.0), "norm": ("gelu", True, 0.0), "dropout": ("relu", False, 0.1)}
CPU, GPU = ((384, 512), (384, 2048), (768, 512)), ((4096, 8192), (4096, 512), (768, 8192))  # features, rows


@dataclass(frozen=True)
class Problem:
    """One form of the adapter on ``rows`` rows of ``features``; ``hidden`` is the bottleneck's width."""

    features: int
    rows: int
    form: str
    dtype: torch.dtype
    device: torch.device

    @property
    def hidden(self) -> int:
        return max(1, self.features // 16)

    @property
    def settings(self) -> tuple[str, bool, float]:
        """Activation, whether there is a norm, dropout."""
        return FORMS[self.form]

    @property
    def fields(self) -> dict:
        settings = {"rank": self.hidden, "dropout": self.settings[2], "adapters": self.form}
        return harness.columns("bottleneck", str(self.features), self.rows, self.dtype, **settings)

    def traffic(self, which: str) -> tuple[int, int]:
        """The least (bytes, operations): x and y; backward x, dy and dx as well; weights, then their gradients."""
        m, k, h = self.rows, self.features, self.hidden
        passes = 1 if which == FORWARD else 2
        activations = 2 * m * k if which == FORWARD else 5 * m * k
        return self.dtype.itemsize * (activations + passes * 2 * k * h), (4 if which == FORWARD else 14) * m * k * h


@dataclass(frozen=True)
class Arguments:
    """Operands of one call: x, then the parameters in the order of ``NAMES``; the incoming gradient."""

    NAMES = ("down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias")
    inputs: tuple[Tensor, ...]
    grad: Tensor

    @staticmethod
    def draw(problem: Problem, index: int) -> "Arguments":
        generator, k, h = torch.Generator().manual_seed(SEED + index), problem.features, problem.hidden

        def new(*size, spread=1.0, around=0.0):
            values = torch.randn(size, generator=generator) * spread + around
            return values.to(problem.device, problem.dtype)

        inputs = [new(problem.rows, k), new(h, k, spread=k**-0.5), new(h), new(k, h, spread=h**-0.5), new(k)]
        inputs += [new(k, spread=0.5, around=1.0), new(k)] if problem.settings[1] else []
        return Arguments(tuple(t.requires_grad_() for t in inputs), new(problem.rows, k))

    def named(self) -> dict[str, Tensor]:
        return dict(zip(self.NAMES, self.inputs[1:], strict=False))

    def to(self, dtype: torch.dtype) -> "Arguments":
        return Arguments(tuple(t.detach().to(dtype).requires_grad_() for t in self.inputs), self.grad.to(dtype))


def ours(problem: Problem, a: Arguments, backend: str | None = None) -> Tensor:
    x, activation, dropout = a.inputs[0], problem.settings[0], problem.settings[2]
    seed = SEED if dropout else None
    return bottleneck(x, residual=x, activation=activation, dropout=dropout, seed=seed, backend=backend, **a.named())


def defined(problem: Problem, a: Arguments) -> Tensor:
    """What ours means, in plain PyTorch with our mask."""
    x, activation, dropout = a.inputs[0], problem.settings[0], problem.settings[2]
    return eager_bottleneck(x, residual=x, activation=activation, dropout=dropout, seed=SEED, **a.named())


def eager(problem: Problem, a: Arguments, mask: Tensor | None = None) -> Tensor:
    """As a person writes it; ``mask`` is 0 where PyTorch's dropout drops an element, else 1 / (1 - p)."""
    x, dropout = a.inputs[0], problem.settings[2]
    u = eager_bottleneck(x, activation=problem.settings[0], **a.named())
    if dropout:
        u = F.dropout(u, dropout) if mask is None else u * mask
    return x + u


def adapterhub(problem: Problem, a: Arguments) -> nn.Module:
    """The library's own layer, holding these very parameters."""
    from adapters import SeqBnConfig
    from adapters.methods.modeling import Adapter

    activation, norm, dropout = problem.settings
    config = SeqBnConfig(non_linearity=activation, ln_before=norm, dropout=dropout)
    layer, named = Adapter("default", problem.features, problem.hidden, config), a.named()
    down = next(module for module in layer.adapter_down if isinstance(module, nn.Linear))
    for module, name in (
        (down, "down"),
        (layer.adapter_up, "up"),
        (getattr(layer, "adapter_norm_before", None), "norm"),
    ):
        if module is not None:
            module.weight, module.bias = (nn.Parameter(named[f"{name}_{part}"]) for part in ("weight", "bias"))
    return layer.train()


@dataclass(frozen=True)
class Provider:
    """One way of computing the op: ``run(problem, arguments)`` gives its output."""

    name: str
    run: Callable[[Problem, Arguments], Tensor]
    own: bool = False

    def variant(self, problem: Problem, draw: Callable[[int], Arguments]) -> Variant:
        def bind(i: int) -> Call:
            a = draw(i)
            return Call(lambda: [self.run(problem, a)], a.inputs, [a.grad], a.inputs[1:])

        def plain(dtype: torch.dtype | None) -> Sequence[Tensor]:
            a = draw(0) if dtype is None else draw(0).to(dtype)
            if self.own:
                y = defined(problem, a)
            else:
                torch.manual_seed(SEED)  # the mask that the variant drew after the same seed
                mask = F.dropout(torch.ones_like(draw(0).inputs[0]), problem.settings[2]).to(a.grad.dtype)
                y = eager(problem, a, mask)
            return [y, *torch.autograd.grad(y, a.inputs, a.grad)]

        return Variant(self.name, bind, plain, problem.traffic, own=self.own)


class _Library(Provider):
    """The layer is made once for each set of arguments; its parameters are what is differentiated."""

    def variant(self, problem: Problem, draw: Callable[[int], Arguments]) -> Variant:
        def bind(i: int) -> Call:
            a = draw(i)
            layer = adapterhub(problem, a)
            parts = dict(layer.named_parameters(remove_duplicate=False))
            down = next(key for key in parts if key.startswith("adapter_down") and parts[key].dim() == 2)
            keys = [down, down.replace("weight", "bias"), "adapter_up.weight", "adapter_up.bias"]
            keys += ["adapter_norm_before.weight", "adapter_norm_before.bias"] if problem.settings[1] else []
            x, parameters = a.inputs[0], [parts[key] for key in keys]
            return Call(lambda: [layer(x, x)[0]], [x, *parameters], [a.grad], parameters)

        return replace(super().variant(problem, draw), bind=bind)


def providers(problem: Problem, compiled: bool = False) -> list[Provider]:
    listed = [Provider("ours", ours, own=True), Provider(EAGER, eager)]
    try:
        import adapters  # noqa: F401

        listed.append(_Library(ADAPTERHUB, eager))
    except Exception as error:  # beside another transformers than its own it fails in ways of its own
        print(f"bench_bottleneck: without {ADAPTERHUB}: {error}", file=sys.stderr)
    if compiled:
        listed.append(Provider("torch.compile", peers.compiled()(eager)))
    if problem.device.type == "cuda":
        listed.append(Provider("ours, reference", partial(ours, backend="reference"), own=True))
    return listed


def case(problem: Problem, compiled: bool = False) -> harness.Case:
    """The problem as the harness takes it."""
    draw = cache(partial(Arguments.draw, problem))
    sets = machine.argument_sets(problem.device, problem.traffic(FORWARD)[0], most=8)
    return harness.Case.of(problem, [p.variant(problem, draw) for p in providers(problem, compiled)], sets)


def cases(options: argparse.Namespace) -> list[Callable[[], harness.Case]]:
    on_cpu = options.device.type == "cpu"
    dtype, sizes = (torch.float32, CPU) if on_cpu else (torch.bfloat16, GPU)
    # On a GPU a size takes longer to compile than to time, so the first stands for all.
    return [
        partial(
            case, Problem(*size, form, dtype, options.device), command.compiles(options, on_cpu or size == sizes[0])
        )
        for size in (sizes[:1] if options.quick else sizes)
        for form in options.form or FORMS
    ]


def main(argv: list[str] | None = None) -> int:
    parser = command.parser("bench_bottleneck", __doc__, quick="the first size")
    parser.add_argument("--form", action="append", choices=tuple(FORMS), help="may be repeated")
    command.add_compile(parser, "eager")
    return command.main(parser, cases, argv)


if __name__ == "__main__":
    sys.exit(main())
