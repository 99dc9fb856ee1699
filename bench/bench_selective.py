"""Chosen rows and columns, chosen tokens and the last blocks, beside whole-weight training and PEFT's ways.

    python -m bench.bench_selective --device cpu --out rows.jsonl [--quick] [--case rows] [--shape 384x1536]

A step is forward, backward and AdamW. Cases: "rows" (a linear layer; the yardstick trains its whole weight: PEFT has
nothing structured), "tokens" (an embedding of 32,000 tokens; PEFT's is TrainableTokens), and "blocks" (the last 2 of 8
Llama blocks under gradient checkpointing; PEFT's has the embedding's output require a gradient, as PEFT asks for).
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastpeft
from fastpeft.nn import RowSparseLinear, TokenRows

from . import command, harness
from .harness import BOTH, FROZEN, PEER, Call, Case, Variant
from .report import WHOLE

SHARE = 0.05  # of the rows or columns
CPU_SHAPES, GPU_SHAPES = ("384x1536", "1536x384", "384x384", "768x3072"), ("4096x4096", "4096x14336", "14336x4096")


@dataclass(frozen=True)
class Step(Call):
    """A call whose pass ends with the optimizer's step on what it trains, the last of ``wrt``."""

    optimizer: torch.optim.Optimizer | None = None

    def both(self):
        for tensor in self.wrt:
            tensor.grad = None
        # Not autograd.grad, which would leave out what leads to no asked tensor, and training does not.
        torch.autograd.backward(self.forward(), self.grads)
        if self.optimizer is not None:
            self.optimizer.step()
        return [tensor.grad for tensor in self.wrt]


def _adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, foreach=len(parameters) > 1)


def _normal(seed: int, *shape, device, dtype, spread=1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).mul_(spread).to(dtype)


# one linear layer


def row_case(shape: str, rows: int, dtype: torch.dtype, device: torch.device) -> Case:
    k, n = map(int, shape.split("x"))

    @cache
    def draw(i):
        make = partial(_normal, device=device, dtype=dtype)
        return make(3 * i, rows, k), make(3 * i + 1, n, k, spread=k**-0.5), make(3 * i + 2, rows, n)

    def linear(i):
        layer = nn.Linear(k, n, bias=False, device="meta", dtype=dtype)
        layer.weight = nn.Parameter(draw(i)[1].clone(), requires_grad=False)
        return layer

    def bind(i, kind):
        x, dy = draw(i)[0].detach().requires_grad_(), draw(i)[2]
        layer, trained = linear(i), []
        if kind == WHOLE:
            trained = [layer.weight.requires_grad_()]
        elif kind != FROZEN:
            layer = RowSparseLinear(layer, **{kind: _chosen(n if kind == "rows" else k)})
            trained = [layer.trained]
        resident = [*layer.parameters()]
        return Step(lambda: [layer(x)], [x, *trained], [dy], resident, _adamw(trained) if trained else None)

    def plain(dtype, kind):
        x, weight, dy = (t.to(dtype or t.dtype) for t in draw(0))
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = F.linear(x, weight)
        dx, dw = torch.autograd.grad(y, (x, weight), dy)
        if kind in (FROZEN, WHOLE):
            return [y, dx, *([dw] if kind == WHOLE else [])]
        index = torch.tensor(_chosen(n if kind == "rows" else k), device=device)
        return [y, dx, _of_trained(dw.index_select(int(kind == "columns"), index))]

    def traffic(which, kind):
        share = {FROZEN: 0, WHOLE: 1}.get(kind, SHARE)
        directions = 1 if which == harness.FORWARD else 2
        moved = dtype.itemsize * directions * (rows * k + rows * n + n * k)
        operations = directions * 2 * rows * n * k
        if directions == 2:
            operations += round(share * 2 * rows * n * k)
            # x again, dW, and in AdamW the parameter and two moments, read and written.
            moved += dtype.itemsize * (rows * k * bool(share) + round(share * n * k) * 8)
        return moved, operations

    kinds = {FROZEN: FROZEN, WHOLE: WHOLE, "ours, rows": "rows", "ours, columns": "columns"}
    variants = [
        Variant(
            name, partial(bind, kind=kind), partial(plain, kind=kind), partial(traffic, kind=kind), own="ours" in name
        )
        for name, kind in kinds.items()
    ]
    fields = harness.columns("row_linear", shape, rows, dtype, rank=None, dropout=None)
    return Case(fields, variants, 1 if device.type == "cpu" else 4, device, dtype)


def _of_trained(gradient: Tensor) -> Tensor:
    """In the dtype of what is trained, float32 beside weights of 16 bits."""
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _chosen(size: int) -> list[int]:
    count = max(1, round(SHARE * size))
    return sorted(torch.randperm(size, generator=torch.Generator().manual_seed(0))[:count].tolist())


# an embedding


def token_case(tokens: int, device: torch.device, dtype: torch.dtype, vocabulary=32000, width=1024, chosen=8) -> Case:
    ids_chosen = list(range(0, vocabulary, vocabulary // chosen))[:chosen]

    @cache
    def draw(i):
        table = _normal(2 * i, vocabulary, width, device=device, dtype=dtype)
        ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(i))
        ids[0, ::16] = torch.tensor(ids_chosen).repeat(tokens)[: len(ids[0, ::16])]
        return table, ids.to(device), _normal(2 * i + 1, 1, tokens, width, device=device, dtype=dtype)

    def bind(i, kind):
        table, ids, dy = draw(i)
        layer = nn.Embedding.from_pretrained(table.clone(), freeze=kind != WHOLE)
        trained = [layer.weight]
        if kind == PEER:
            import peft

            config = peft.TrainableTokensConfig(token_indices=ids_chosen, target_modules=["embed"])
            layer = peft.get_peft_model(nn.ModuleDict({"embed": layer}), config).base_model.model["embed"]
            trained = [layer.trainable_tokens_delta["default"]]
        elif kind == "ours":
            layer = TokenRows(layer, ids_chosen)
            trained = [layer.trained]
        return Step(lambda: [layer(ids)], trained, [dy], [*layer.parameters()], _adamw(trained))

    def plain(dtype, kind):
        table, ids, dy = draw(0)
        table = table.to(dtype or table.dtype).detach().requires_grad_()
        y = F.embedding(ids, table)
        (grad,) = torch.autograd.grad(y, table, dy.to(y.dtype))
        return [y, grad if kind == WHOLE else _of_trained(grad[ids_chosen])]

    def traffic(which, kind):
        directions = 1 if which == harness.FORWARD else 2
        rows = vocabulary if kind == WHOLE else chosen
        return dtype.itemsize * width * (2 * tokens * directions + (directions - 1) * 8 * rows), 0

    variants = [
        Variant(
            name, partial(bind, kind=name), partial(plain, kind=name), partial(traffic, kind=name), own=name == "ours"
        )
        for name in (WHOLE, PEER, "ours")
    ]
    fields = harness.columns("token_rows", f"{vocabulary}x{width}", tokens, dtype, rank=chosen, dropout=None)
    return Case(fields, variants, 1, device, dtype)


# the last blocks of a model


def block_case(device: torch.device, dtype: torch.dtype, width=256, blocks=8, tokens=128) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1024, num_hidden_layers=blocks, num_key_value_heads=width // 64, **sizes)
    base = LlamaForCausalLM(config).to(device, dtype)
    ids = torch.randint(1024, (4, tokens), generator=torch.Generator().manual_seed(0)).to(device)

    def build(kind, to):
        model = copy.deepcopy(base).to(to or dtype).train()
        if kind != "no checkpoints":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if kind == "ours":
            fastpeft.select(model, layers="last:2")
        else:
            model.requires_grad_(False)
            model.model.layers[-2:].requires_grad_(True)
            if kind == PEER and not getattr(model, "_require_grads_hook", None):
                model.enable_input_require_grads()
        return model, [p for p in model.parameters() if p.requires_grad]

    def bind(i, kind):
        model, trained = build(kind, None)
        forward = lambda: [_loss(model, ids)]  # noqa: E731
        one = torch.ones((), device=device, dtype=torch.float32)
        return Step(forward, trained, [one], [*model.parameters()], _adamw(trained))

    def plain(to, kind):
        model, trained = build("no checkpoints", to)
        loss = _loss(model, ids)
        return [loss, *torch.autograd.grad(loss, trained)]

    # Forward through all blocks, backward through two of them, and their forward again: 2, 4 and 2 operations a weight.
    weights = sum(p.numel() for p in base.model.layers[0].parameters())
    traffic = lambda which: (0, 2 * 4 * tokens * weights * (blocks + (which == BOTH) * 3 * 2))  # noqa: E731
    names = ("no checkpoints", PEER, "ours")
    variants = [Variant(n, partial(bind, kind=n), partial(plain, kind=n), traffic, own=n == "ours") for n in names]
    fields = harness.columns("last 2 blocks", f"{blocks}x{width}", 4 * tokens, dtype, rank=None, dropout=None)
    return Case(fields, variants, 1, device, dtype, (BOTH,))


def _loss(model, ids) -> Tensor:
    # Not the mean of the squares of all logits, which float16 could not hold.
    return F.cross_entropy(model(input_ids=ids, use_cache=False).logits.flatten(0, 1).to(torch.float32), ids.flatten())


def cases(options: argparse.Namespace) -> list[Callable[[], Case]]:
    device, small = options.device, options.device.type == "cpu"
    dtype, rows = (torch.float32, 512) if small else (torch.bfloat16, 8192)
    shapes = options.shape or (CPU_SHAPES if small else GPU_SHAPES)
    made = {
        "rows": [partial(row_case, shape, options.rows or rows, dtype, device) for shape in shapes],
        "tokens": [partial(token_case, 1024 if small else 8192, device, dtype)],
        "blocks": [partial(block_case, device, torch.float32)],
    }
    found = [case for name in options.case or made for case in made[name]]
    return found[:2] if options.quick else found


def main(argv: list[str] | None = None) -> int:
    parser = command.parser("bench_selective", __doc__, quick="the first two cases")
    parser.add_argument("--case", action="append", choices=("rows", "tokens", "blocks"), help="may be repeated")
    parser.add_argument("--shape", action="append", help="KxN of the linear layer; may be repeated")
    parser.add_argument("--rows", type=int, help="rows of x")
    return command.main(parser, cases, argv)


if __name__ == "__main__":
    sys.exit(main())
