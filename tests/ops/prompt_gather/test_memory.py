"""prompt_gather's memory: what it reads, writes and keeps; any strides; 64-bit offsets."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fastpeft.ops import prompt_gather
from fastpeft.testing import guarded, poisoned
from fastpeft.testing.prompt_gather import PromptProblem
from tests.support.backends import BACKENDS, DEVICE
from tests.support.exactness import assert_same

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_source = pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])


def integers(**settings):
    return PromptProblem.make(device=DEVICE, integers=True, columns=18, **settings)


@each_source
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@each_backend
def test_nothing_is_read_or_written_outside(backend, left, embeds):
    """Operands lie in buffers of NaN; what the op allocates is NaN until written, between guards."""
    problem, checks = integers(left=left, embeds=embeds), []

    def guard(tensor):
        view, check = guarded(tensor)
        checks.append(check)
        return view

    inside = problem.map(guard)
    before = [t.clone() for t in (problem.ids, problem.mask, problem.labels)]
    # By themselves: where eager tensors are concatenated, so are the guards'.
    table = torch.cat(inside.prompts)
    x = inside.table[inside.ids].requires_grad_(embeds)
    given = {"inputs_embeds": x} if embeds else {"input_ids": inside.ids, "embedding": inside.table}
    options = {"attention_mask": inside.mask, "labels": inside.labels, "backend": backend}
    table, check = guarded(table)
    checks.append(check)
    table.requires_grad_()
    with poisoned():
        lengths = [len(p) for p in problem.prompts]
        found = prompt_gather(
            table, inside.prompt_ids, **given, lengths=lengths, padding_side="left" if left else "right", **options
        )
        grads = torch.autograd.grad(found.inputs_embeds, [table, *([x] if embeds else [])], inside.dy)
    for check in checks:
        check()
    exact = problem.exact()
    wanted = [exact[name] for name in ("y", "mask", "positions", "labels")]
    wanted += [torch.cat([exact[f"dprompt{p}"] for p in range(3)]), *([exact["dx"]] if embeds else [])]
    for one, two in zip(wanted, [*found, *grads], strict=True):
        assert torch.equal(one.double(), two.double())
    for one, two in zip(before, (inside.ids, inside.mask, inside.labels), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(problem.table, inside.table)


def sliced(t):
    big = t.new_full([2 * n + 3 for n in t.shape], torch.nan if t.is_floating_point() else 1 << 30)
    return big[tuple(slice(1, 1 + 2 * n, 2) for n in t.shape)].copy_(t)


def reversed_dimensions(t):
    order = list(range(t.dim()))[::-1]
    return t.permute(order).contiguous().permute(order)


@each_source
@each_backend
@pytest.mark.parametrize("which", ["prompts", "table", "ids", "mask", "labels", "dy"])
@pytest.mark.parametrize("change", [sliced, reversed_dimensions], ids=lambda f: f.__name__)
def test_any_strides(backend, which, change, embeds):
    problem = integers(embeds=embeds)
    value = getattr(problem, which)
    moved = tuple(map(change, value)) if which == "prompts" else change(value)
    assert_same(problem.exact(), replace(problem, **{which: moved}).fused(backend))


@each_backend
@pytest.mark.parametrize("change", [sliced, reversed_dimensions], ids=lambda f: f.__name__)
def test_any_strides_of_the_other_operands(backend, change):
    """One prompt (which nothing concatenates), embeddings, prompt_ids and positions."""
    p = integers(lengths=(5,), prompt_ids=(0, -1, 0))
    ids, x = torch.tensor(p.prompt_ids, device=DEVICE), p.table[p.ids]
    positions = torch.arange(7, device=DEVICE).flip(0)[None] + torch.arange(3, device=DEVICE)[:, None]
    plain = prompt_gather(p.prompts, ids, inputs_embeds=x, position_ids=positions, backend=backend)
    moved = [change(t) for t in (p.prompts[0], ids, x, positions)]
    prompt, x = moved[0].requires_grad_(), moved[2].requires_grad_()
    other = prompt_gather([prompt], moved[1], inputs_embeds=x, position_ids=moved[3], backend=backend)
    for one, two in zip(plain[:3], other[:3], strict=True):
        assert torch.equal(one, two)
    found = torch.autograd.grad(other.inputs_embeds, [prompt, x], p.dy)
    exact = replace(p, mask=None, embeds=True).exact()
    for one, name in zip(found, ("dprompt0", "dx"), strict=True):
        assert torch.equal(one.double(), exact[name])


@each_backend
def test_expanded_gradient(backend):
    """That of a sum: one number with strides of 0."""
    p = integers(embeds=True)
    p = replace(p, dy=torch.ones((), device=DEVICE).expand_as(p.dy))
    assert_same(p.exact(), p.fused(backend))


@each_backend
def test_keeps_four_integers_a_row(backend):
    p, kept = integers(embeds=True), []
    prompts = [t.requires_grad_() for t in p.prompts]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        table = torch.cat(prompts)
        lengths = [len(t) for t in prompts]
        x = p.table[p.ids].requires_grad_()
        y = prompt_gather(table, p.prompt_ids, inputs_embeds=x, lengths=lengths, backend=backend).inputs_embeds
    assert [tuple(t.shape) for t in kept] == [(len(p.prompt_ids), 4)]
    once = torch.autograd.grad(y, [x, *prompts], p.dy, retain_graph=True)
    again = torch.autograd.grad(y, [x, *prompts], p.dy)
    assert all(torch.equal(one, two) for one, two in zip(once, again, strict=True))


BIG = """
import torch
from fastpeft.ops import prompt_gather

def apart(t, dim):  # t with one dimension so far apart that the last offset needs 33 bits; few pages are touched
    strides = [1] * t.dim()
    strides[dim] = 2**30
    for d in reversed(range(t.dim() - 1)):
        if d != dim:
            strides[d] = 64 * (1 if d == t.dim() - 2 or d == 1 else 8)
    buffer = torch.empty(2**30 * (t.shape[dim] - 1) + 4096, dtype=t.dtype, device=DEVICE)
    return torch.as_strided(buffer, t.shape, strides).copy_(t)

x = torch.arange(4 * 4 * 4, device=DEVICE).view(4, 4, 4).half()
prompt = torch.full((3, 4), 100.0, device=DEVICE).half()
ids = torch.tensor([0, -1, 0, 0], device=DEVICE)

def run(prompt, x, dy):
    prompt, x = prompt.detach().requires_grad_(), x.detach().requires_grad_()
    y = prompt_gather([prompt], ids, inputs_embeds=x, backend=BACKEND).inputs_embeds
    return [y.detach(), *torch.autograd.grad(y, [prompt, x], dy)]

dy = torch.arange(4 * 7 * 4, device=DEVICE).view(4, 7, 4).half() % 5
plain = run(prompt, x, dy)
for dim in range(3):
    for moved in ((prompt, apart(x, dim), dy), (prompt, x, apart(dy[:, :4], dim) if dim == 1 else apart(dy, dim))):
        if moved[2].shape != dy.shape:
            continue
        for one, two in zip(plain, run(*moved), strict=True):
            assert torch.equal(one, two), dim
for dim in range(2):
    for one, two in zip(plain, run(apart(prompt, dim), x, dy), strict=True):
        assert torch.equal(one, two), dim
table = apart(x[0], 0)
tokens = torch.tensor([[3, 0], [2, 1], [0, 0], [1, 3]], device=DEVICE)
far = prompt_gather([prompt], ids, tokens, table, backend=BACKEND)
near = prompt_gather([prompt], ids, tokens, x[0], backend=BACKEND)
assert torch.equal(far.inputs_embeds, near.inputs_embeds)
"""


@each_backend
def test_offsets_are_64_bit(backend):
    source = f"DEVICE, BACKEND = {DEVICE.type!r}, {backend!r}\n" + BIG
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
