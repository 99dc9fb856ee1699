"""Problems for prompt_gather, solved three ways: fused, eager, exact."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import _backend, ops, reference
from ..ops.prompt_gather import REASONS
from .accuracy import TRAINING, Ratios, error_vs_eager, integer_inputs, worst


def eager_prompt_gather(prompts, prompt_ids, x, attention_mask=None, left=False) -> Tensor:
    """What a person writes for a batch of different prompts: embeddings ``[B, W, D]``, padded row by row.

    Args:
        prompts: ``[P_i, D]`` of each prompt.
        prompt_ids: the number of each row's prompt, or -1.
        x: the tokens' embeddings ``[B, T, D]``.
        attention_mask: ``[B, T]``, or None for all ones.
        left: put the padding in front.
    """
    rows = []
    for b, p in enumerate(prompt_ids):
        tokens = x[b]
        if attention_mask is not None:
            on = attention_mask[b].nonzero()[:, 0]
            tokens = tokens[on[0] : on[-1] + 1] if len(on) else tokens[:0]
        rows.append(tokens if p < 0 else torch.cat([prompts[p].to(x.dtype), tokens]))
    width = x.shape[1] + max((len(prompts[p]) for p in prompt_ids if p >= 0), default=0)
    padded = []
    for row in rows:
        padding = row.new_zeros(width - len(row), row.shape[1])
        padded.append(torch.cat([padding, row] if left else [row, padding]))
    return torch.stack(padded)


@dataclass(frozen=True)
class PromptProblem:
    """Operands of ``prompt_gather`` and the gradient of its embeddings.

    ``fused``, ``eager`` and ``exact`` return embeddings and gradients by name: y, dprompt0, ..., and dx where the
    tokens are given as embeddings; ``fused`` and ``exact`` also mask, positions and labels.

    Attributes:
        prompts: ``[P_i, D]`` of each prompt.
        prompt_ids: the number of each row's prompt, or -1.
        table: the embeddings ``[V, D]``.
        ids: the tokens ``[B, T]``.
        mask: the attention mask ``[B, T]``, or None.
        labels: ``[B, T]``, or None.
        dy: the incoming gradient ``[B, W, D]``.
        left: whether padding comes in front.
        embeds: whether the op is given embeddings in place of tokens.
    """

    prompts: tuple[Tensor, ...]
    prompt_ids: tuple[int, ...]
    table: Tensor
    ids: Tensor
    mask: Tensor | None
    labels: Tensor | None
    dy: Tensor
    left: bool
    embeds: bool

    @classmethod
    def make(
        cls,
        lengths: Sequence[int] = (3, 0, 11),
        prompt_ids: Sequence[int] = (0, 2, 0, -1, 1, 2),
        tokens: int = 7,
        columns: int = 24,
        dtype: torch.dtype = torch.float32,
        prompt_dtype: torch.dtype | None = None,
        device="cpu",
        padded: bool = True,
        left: bool = False,
        embeds: bool = False,
        integers: bool = False,
        seed: int = 0,
    ) -> "PromptProblem":
        """Random operands.

        Args:
            lengths: rows of each prompt.
            prompt_ids: the number of each row's prompt, or -1.
            tokens: T.
            columns: D.
            dtype: of the operands.
            prompt_dtype: of the prompts; None: the operands'.
            device: where the tensors lie.
            padded: whether rows in turn have padding left, right, all over, a hole, and none.
            left: whether padding comes in front in the output.
            embeds: whether the op is given embeddings in place of tokens.
            integers: draw -1, 0 and 1 alone, on which all arithmetic is exact; see ``integer_inputs``.
            seed: of the draws. The same arguments give the same problem.
        """
        generator = torch.Generator().manual_seed(seed)
        rows, vocabulary = len(prompt_ids), 19

        def draw(*size, to=dtype):
            if integers:
                return integer_inputs(size, dtype=to, seed=int(torch.randint(1 << 30, (), generator=generator)))[0]
            return torch.randn(size, generator=generator, dtype=torch.float64).to(to)

        mask = torch.ones(rows, tokens, dtype=torch.int64)
        for b in range(rows):
            mask[b, [slice(0, 2), slice(tokens - 3, tokens), slice(0, tokens), slice(2, 3), slice(0, 0)][b % 5]] = 0
        width = tokens + max((lengths[p] for p in prompt_ids if p >= 0), default=0)
        found = cls(
            prompts=tuple(draw(n, columns, to=prompt_dtype or dtype) for n in lengths),
            prompt_ids=tuple(prompt_ids),
            table=draw(vocabulary, columns),
            ids=torch.randint(vocabulary, (rows, tokens), generator=generator),
            mask=mask if padded else None,
            labels=torch.randint(vocabulary, (rows, tokens), generator=generator),
            dy=draw(rows, width, columns),
            left=left,
            embeds=embeds,
        )
        return found.map(lambda t: t.to(device), lambda t: t.to(device))

    def fused(self, backend: str | None = None) -> dict[str, Tensor]:
        """Outputs and gradients of fastpeft's op.

        Args:
            backend: which serves the op; None for the automatic choice.
        """

        def call(prompts, x):
            ids, table, x = (None, None, x) if self.embeds else (self.ids, self.table, None)
            side = "left" if self.left else "right"
            return ops.prompt_gather(
                prompts, self.prompt_ids, ids, table, x, self.mask, self.labels, padding_side=side, backend=backend
            )

        return self.differentiate(call)

    def eager(self) -> dict[str, Tensor]:
        return self.differentiate(lambda p, x: [eager_prompt_gather(p, self.prompt_ids, x, self.mask, self.left)])

    def exact(self) -> dict[str, Tensor]:
        def definition(prompts, x):
            lengths = [len(p) for p in prompts]
            options = self.mask, self.labels, None, self.left
            return reference.prompt_gather(torch.cat(prompts), lengths, self.prompt_ids, x, self.dy.shape[1], *options)

        return self.map(lambda t: t.detach().double()).differentiate(definition)

    def map(self, function: Callable, integers: Callable = lambda t: t) -> "PromptProblem":
        """The same problem with its tensors replaced.

        Args:
            function: takes a tensor and returns one, of another dtype or device, say.
            integers: the same for tensors of integers.
        """
        return replace(
            self,
            prompts=tuple(map(function, self.prompts)),
            table=function(self.table),
            dy=function(self.dy),
            ids=integers(self.ids),
            mask=None if self.mask is None else integers(self.mask),
            labels=None if self.labels is None else integers(self.labels),
        )

    def differentiate(self, call: Callable) -> dict[str, Tensor]:
        """Run ``call`` and backward from ``dy``.

        Args:
            call: takes the prompts and the tokens' embeddings x, and returns the op's outputs.
        """
        prompts = [p.detach().requires_grad_() for p in self.prompts]
        x = self.table.detach()[self.ids].requires_grad_(self.embeds)
        y, *rest = call(prompts, x)
        leaves = [*prompts, *([x] if self.embeds else [])]
        grads = torch.autograd.grad(y, leaves, self.dy, allow_unused=True)
        names = [*(f"dprompt{p}" for p in range(len(prompts))), "dx"]
        found = {"y": y.detach()}
        for name, leaf, grad in zip(names, leaves, grads, strict=False):
            found[name] = torch.zeros_like(leaf) if grad is None else grad
        return found | dict(zip(("mask", "positions", "labels"), rest, strict=False))


def ratios(problem: PromptProblem, backend: str | None = None) -> dict[str, Ratios]:
    """``error_vs_eager`` of the embeddings and every gradient of the problem."""
    fused, eager, exact = problem.fused(backend), problem.eager(), problem.exact()
    return {name: error_vs_eager(fused[name], eager[name], exact[name]) for name in eager}


def check(device: torch.device | str) -> Iterator[tuple[str, torch.dtype, Ratios]]:
    """Every dtype that training uses, ids and embeddings, on each backend that serves ``device``; the worst ratios."""
    for dtype, prompt in TRAINING:
        for embeds in (False, True):
            ids = [(b * 7) % 4 - 1 for b in range(12)]
            problem = PromptProblem.make((20, 5, 33), ids, 17, 96, dtype, prompt, device, embeds=embeds)
            for backend in _backend.ORDER:
                if REASONS[backend](problem.table, problem.prompts[0]) is None:
                    found = worst(ratios(problem, backend).values())
                    note = (", embeddings" if embeds else "") + ("" if dtype == prompt else ", fp32 prompts")
                    yield f"prompt_gather {backend}{note}", dtype, found
