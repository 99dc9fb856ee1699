"""prompt_gather among PyTorch's machinery (opcheck, torch.compile, autocast), and what it refuses."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastpeft
from fastpeft import _backend
from fastpeft.ops import prompt_gather
from fastpeft.testing.prompt_gather import PromptProblem
from tests.support.backends import BACKENDS, DEVICE, FP64

each_backend = pytest.mark.parametrize("backend", BACKENDS)


@each_backend
@pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(backend, embeds, masked):
    p = PromptProblem.make((3, 5), (1, -1, 0), 6, 8, device=DEVICE)
    absent = torch.empty(0, dtype=torch.int64, device=DEVICE)
    table = torch.cat(p.prompts).requires_grad_()
    source = p.table[p.ids].requires_grad_() if embeds else p.table
    integers = [absent if embeds else p.ids, torch.tensor(p.prompt_ids, device=DEVICE)]
    integers += [p.mask, p.labels, p.ids] if masked else [absent] * 3
    args = (table, source, *integers, [3, 5], 11, True, -100, backend)
    torch.library.opcheck(torch.ops.fastpeft.prompt_gather.default, args)
    rows = torch.ops.fastpeft.prompt_gather(*args)[1]
    needs = [True, embeds]
    args = (p.dy, rows, [3, 5], table.dtype, 6, needs, backend)
    torch.library.opcheck(torch.ops.fastpeft.prompt_gather_backward.default, args)


@each_backend
def test_compiled_gradients_are_the_eager_ones(backend):
    """One graph for every number of rows and tokens."""
    torch._dynamo.reset()

    def function(prompts, prompt_ids, x, mask):
        batch = prompt_gather(prompts, prompt_ids, inputs_embeds=x.sin(), attention_mask=mask, backend=backend)
        weight = batch.attention_mask[..., None] * (1 + batch.position_ids[..., None])
        return (batch.inputs_embeds.tanh() * weight).sum()

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    for ids, tokens in (((0, 2, -1, 0), 7), ((2, 1, 0, 0, -1), 9), ((1,) * 6, 12)):
        p = PromptProblem.make((3, 2, 11), ids, tokens, 8, device=DEVICE)
        rows, x = torch.tensor(ids, device=DEVICE), p.table[p.ids]
        one, other = ([t.clone().requires_grad_() for t in (*p.prompts, x)] for _ in range(2))
        function(one[:3], rows, one[3], p.mask).backward()
        compiled(other[:3], rows, other[3], p.mask).backward()
        for t, want in zip(other, one, strict=True):
            assert torch.equal(t.grad, want.grad)
    assert graphs.frame_count == 1


FIRST_CALL = """
import torch
from fastpeft.ops import prompt_gather

def function(prompt, table, ids):
    return prompt_gather([prompt], [0, -1], ids, table).inputs_embeds.square().sum()

prompt, table = torch.randn(3, 8, device=DEVICE, requires_grad=True), torch.randn(9, 8, device=DEVICE)
ids = torch.tensor([[1, 2, 8], [3, 0, 1]], device=DEVICE)
torch.compile(function, BACKEND fullgraph=True, dynamic=True)(prompt, table, ids).backward()
(grad,) = torch.autograd.grad(function(prompt, table, ids), prompt)
torch.testing.assert_close(prompt.grad, grad)
"""


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "no triton"])
def test_compiled_as_the_first_call_of_a_process(triton):
    source = "" if triton else "import sys\nsys.modules['triton'] = None\n"
    source += f"DEVICE = {DEVICE.type if triton else 'cpu'!r}\n"
    source += FIRST_CALL.replace("BACKEND", "" if triton else "backend='aot_eager',")
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@each_backend
def test_autocast_changes_nothing(backend):
    """As it changes nothing of an embedding."""
    p = PromptProblem.make(device=DEVICE)
    plain = p.fused(backend)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        cast = p.fused(backend)
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


@each_backend
def test_inference_mode(backend):
    p = PromptProblem.make(device=DEVICE)
    with torch.inference_mode():
        y = prompt_gather(p.prompts, p.prompt_ids, p.ids, p.table, attention_mask=p.mask, backend=backend)
    assert torch.equal(y.inputs_embeds, p.fused(backend)["y"])


@each_backend
def test_prompts_alone_need_no_gradient_of_tokens(backend):
    p = PromptProblem.make(device=DEVICE, embeds=True)
    x = p.table[p.ids]
    y = prompt_gather(p.prompts, p.prompt_ids, inputs_embeds=x.requires_grad_(), backend=backend).inputs_embeds
    assert torch.autograd.grad(y, x, p.dy)[0].shape == x.shape
    prompts = [t.requires_grad_() for t in p.prompts]
    y = prompt_gather(prompts, p.prompt_ids, inputs_embeds=x.detach(), backend=backend).inputs_embeds
    y.backward(p.dy)
    assert all(t.grad is not None for t in prompts)


GOOD = {
    "prompts": [torch.ones(2, 4, device=DEVICE), torch.ones(3, 4, device=DEVICE)],
    "prompt_ids": [0, None],
    "input_ids": torch.zeros(2, 5, dtype=torch.int64, device=DEVICE),
    "embedding": torch.ones(7, 4, device=DEVICE),
}
ROW = torch.zeros(2, 6, dtype=torch.int64, device=DEVICE)
BAD = {
    "prompts is one tensor without lengths": {"prompts": torch.ones(5, 4, device=DEVICE)},
    "expected numbers of at least 0 that add up to 5": {"prompts": torch.ones(5, 4, device=DEVICE), "lengths": [2, 2]},
    "lengths is \\[-1, 6\\]": {"prompts": torch.ones(5, 4, device=DEVICE), "lengths": [-1, 6]},
    "lengths is given beside one tensor for each": {"lengths": [2, 3]},
    r"prompts\[1\] has D=5, expected D=4": {"prompts": [torch.ones(2, 4), torch.ones(3, 5)]},
    r"prompts\[1\] has dtype torch.float64, expected torch.float32": {
        "prompts": [torch.ones(2, 4, device=DEVICE), torch.ones(3, 4, device=DEVICE, dtype=FP64)]
    },
    r"prompts\[0\] has shape \[4\]": {"prompts": [torch.ones(4, device=DEVICE)]},
    "prompt_ids holds prompt 2, expected -1 ... 1": {"prompt_ids": [0, 2]},
    "prompt_ids holds prompt -2": {"prompt_ids": [0, -2]},
    r"prompt_ids\[1\] is True, expected -1 ... 1": {"prompt_ids": [0, True]},
    "prompt_ids has 3 items, expected one for each of 2 rows": {"prompt_ids": [0, 1, 0]},
    r"prompt_ids has shape \[3\]": {"prompt_ids": torch.zeros(3, dtype=torch.int64, device=DEVICE)},
    "prompt_ids has dtype torch.float32": {"prompt_ids": torch.zeros(2, device=DEVICE)},
    "expected input_ids and embedding, or inputs_embeds": {"embedding": None},
    "inputs_embeds is given beside": {"inputs_embeds": torch.ones(2, 5, 4, device=DEVICE)},
    "input_ids has dtype torch.float32": {"input_ids": torch.zeros(2, 5, device=DEVICE)},
    r"input_ids has shape \[5\], expected \[B, T\]": {"input_ids": torch.zeros(5, dtype=torch.int64, device=DEVICE)},
    "embedding is a list of 1, expected a tensor": {"embedding": [1.0]},
    r"attention_mask has shape \[2, 6\], expected \[2, 5\]": {"attention_mask": ROW},
    "attention_mask is a list of 1": {"attention_mask": [[1]]},
    "labels has dtype torch.bool": {"labels": torch.ones(2, 5, dtype=torch.bool, device=DEVICE)},
    r"position_ids has shape \[2, 6\]": {"position_ids": ROW},
    "padding_side is 'up'": {"padding_side": "up"},
    r"ignore_index is 1.5 \(float\)": {"ignore_index": 1.5},
    "backend is 'fast', expected one of": {"backend": "fast"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_calls(message):
    if DEVICE.type == "cuda" and "D=5" in message:
        pytest.skip("names the device first")
    with pytest.raises((ValueError, TypeError), match="^prompt_gather: .*" + message):
        prompt_gather(**{**GOOD, **BAD[message]})
    assert prompt_gather(**GOOD).inputs_embeds.shape == (2, 7, 4)


@each_backend
def test_what_does_not_exist(backend):
    """On the CPU an error; on a GPU, where looking would wait for the device, no prompt, and NaN for a token."""
    wild = {"prompt_ids": torch.tensor([0, 2], device=DEVICE)}, {"input_ids": torch.full((2, 5), 7, device=DEVICE)}
    negative = {"prompt_ids": torch.tensor([-2, 0], device=DEVICE)}, {"input_ids": GOOD["input_ids"] - 1}
    for settings in (*wild, *negative):
        if DEVICE.type == "cpu":
            with pytest.raises(
                ValueError, match=r"prompt_gather: (prompt_ids holds prompt|input_ids holds token) -?\d,"
            ):
                prompt_gather(**{**GOOD, **settings}, backend=backend)
        else:
            found = prompt_gather(**{**GOOD, **settings}, backend="triton")
            assert "prompt_ids" in settings or found.inputs_embeds.isnan().any()


def test_kernels_keep_to_what_exists():
    """The launcher itself, which on a GPU nobody checked for: no prompt, and NaN for a token."""
    kernels = pytest.importorskip("fastpeft.kernels.prompt_gather", reason="Triton is not installed")
    prompts, embedding = torch.cat(GOOD["prompts"]), GOOD["embedding"]
    ids = torch.tensor([[0, 7, 6], [-1, 1, 2]], device=DEVICE)
    for wrong in (2, -2, 1 << 40):
        rows = torch.tensor([wrong, 1], device=DEVICE)
        y, mask, *_, spans = kernels.forward(prompts, [2, 3], rows, embedding, ids, None, None, None, 6, False, -100)
        assert y[:, :, 0].isnan().tolist() == [[False, True, *[False] * 4], [False, False, False, True, False, False]]
        assert mask.sum(1).tolist() == [3, 6]
        assert spans[:, 0].tolist() == [-1, 1]


def test_explain():
    text = fastpeft.explain("prompt_gather", GOOD["prompts"], [0, 1], GOOD["input_ids"], GOOD["embedding"])
    assert str(text).startswith("prompt_gather: served by ")
    table = torch.ones(2, 4, device=DEVICE)
    assert fastpeft.explain("prompt_gather", table, inputs_embeds=table[None]).backend == text.backend


def test_bfloat16_is_declined_in_the_interpreter(monkeypatch):
    if DEVICE.type == "cuda":
        pytest.skip("a GPU rounds")
    monkeypatch.setattr(_backend, "interprets_bfloat16", False)  # as it is without the tests' correction
    with pytest.raises(ValueError, match="bfloat16"):
        prompt_gather(GOOD["prompts"], [0, 1], GOOD["input_ids"], GOOD["embedding"].bfloat16(), backend="triton")
