"""Siblings under gradient checkpointing, whose recomputation must repeat the forward."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.support.siblings import assert_same, build, input_, step


def recomputed(model, reentrant, *args):
    return checkpoint(model, *args, use_reentrant=reentrant)


class TestCheckpointing:
    """Recomputation draws the same masks and saves the same tensors, whatever has been learned in between."""

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize(
        ("dropout", "noise", "cross"),  # with dropout and one of the others, masks are drawn at another time: see below
        [(0.0, 0.0, False), (0.0, 0.5, False), (0.0, 0.0, True), (0.0, 0.5, True), (0.4, 0.0, False)],
    )
    def test_gradients_are_those_without(self, reentrant, dropout, noise, cross):
        model, plain = build(dropout=dropout, noise=noise), build(False, dropout=dropout, noise=noise)
        tensors = [input_(seed=1), input_(seed=2)][: 1 + cross]
        for i in range(3):
            expected = step(plain, *tensors, seed=i)
            assert_same(step(model, *tensors, seed=i, run=lambda *args: recomputed(model, reentrant, *args)), expected)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("cross", [False, True])
    def test_gradient_is_that_of_the_output(self, reentrant, cross):
        """By finite differences: with a seed held, the step is a function; its gradient must be its derivative."""
        model = build(dropout=0.4, noise=0.3)
        tensors = [input_(seed=1), input_(seed=2)][: 1 + cross]

        def loss(*args):
            torch.manual_seed(3)
            return recomputed(model, reentrant, *args).square().sum()

        loss(*tensors).backward()  # wrong guesses are made here
        for _ in range(2):
            for tensor in tensors:
                tensor.grad = None
            loss(*tensors).backward()
            for tensor in tensors:
                direction = torch.randn_like(tensor)
                h = 1e-6
                with torch.no_grad():
                    shifted = [[t + s * h * direction if t is tensor else t for t in tensors] for s in (1, -1)]
                plus, minus = (loss(*(t.detach().requires_grad_() for t in ts)).item() for ts in shifted)
                slope = (tensor.grad * direction).sum().item()
                # Truncation h², rounding eps / h: both are below 1e-8 relative to the loss.
                assert abs((plus - minus) / (2 * h) - slope) <= 1e-6 * max(1, abs(slope))

    def test_shares_inside_a_checkpoint(self, calls):
        model = build(dropout=0.4)
        step(model, input_(), run=lambda x: checkpoint(model, x, use_reentrant=False))
        assert calls == [3, 3]  # forward and recomputation

    def test_a_wrong_guess_stays_while_it_can_be_replayed(self, calls):
        model, tensors = build(), (input_(seed=1), input_(seed=2))
        run = lambda *args: checkpoint(model, *args, use_reentrant=False)  # noqa: E731
        losses = [run(*tensors).sum() for _ in range(2)]  # two forwards, then two backwards
        sum(losses).backward()
        assert set(calls) == {3}
        for reentrant in (False, True):
            expected = step(build(False), *tensors)
            assert_same(step(model, *tensors, run=lambda *a, r=reentrant: recomputed(model, r, *a)), expected)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    def test_siblings_in_different_checkpoints(self, reentrant, dropout):
        """One sibling's output must not come from another's checkpoint: its own recomputation would lack it."""
        model, plain = build(dropout=dropout), build(False, dropout=dropout)

        def run(module):
            def forward(x):
                q = checkpoint(module.q_proj, x, use_reentrant=reentrant)
                k = checkpoint(lambda x: module.k_proj(x).tanh(), x, use_reentrant=reentrant)
                return torch.cat([q * module.v_proj(x), k], -1).tanh()

            return forward

        for i in range(2):
            actual = step(model, input_(), run=run(model), seed=i)
            if not dropout:
                assert_same(actual, step(plain, input_(), run=run(plain), seed=i))
        x, h = input_(), 1e-6
        direction = torch.randn_like(x)

        def loss(x):
            torch.manual_seed(3)
            return run(model)(x).square().sum()

        loss(x), loss(input_(seed=2))  # wrong guesses are made here
        loss(x).backward()
        plus, minus = (loss((x.detach() + s * h * direction).requires_grad_()).item() for s in (1, -1))
        slope = (x.grad * direction).sum().item()
        assert abs((plus - minus) / (2 * h) - slope) <= 1e-6 * max(1, abs(slope))

    def test_offloading_hooks(self):
        model, plain = build(dropout=0.2), build(False, dropout=0.2)

        def run(module):
            def forward(x):
                with torch.autograd.graph.save_on_cpu():
                    return module(x)

            return forward

        assert_same(step(model, input_(), run=run(model)), step(plain, input_(), run=run(plain)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_checkpoint_inside_the_module_that_holds_the_siblings(reentrant, dropout):
    """Its recomputation calls the siblings past the module's hooks."""

    def forward(model):
        whole = type(model).forward
        return lambda x: checkpoint(lambda t: whole(model, t), x, use_reentrant=reentrant)

    model, plain = build(dropout=dropout), build(False, dropout=dropout)
    model.forward, plain.forward = forward(model), forward(plain)
    for i in range(3):
        assert_same(step(model, input_(seed=i), seed=i), step(plain, input_(seed=i), seed=i))
    assert model.group.rounds > 0 or (reentrant and dropout)
