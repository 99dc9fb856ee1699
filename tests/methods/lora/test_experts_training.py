"""Adapted experts in training loops: gradient checkpoints, autocast, torch.compile, Trainer, who gets which token."""

import copy

import pytest
import torch
import torch._dynamo.testing

import fastpeft
from fastpeft import Lora
from tests.support.expert_models import IDS, close, gradients_of, layers_of, loss_of
from tests.support.models import build

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.:FutureWarning")


def attached(family="qwen3_moe", **settings):
    torch.manual_seed(1)
    return fastpeft.attach(build(family), Lora(**{"r": 3, "init": "random", "experts": True, **settings}))


def gradients(model):
    model.zero_grad()
    torch.manual_seed(7)
    loss_of(model).backward()
    return gradients_of(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_the_same_masks(reentrant):
    model = attached(dropout=0.25).train()
    wanted = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(model)
    assert all(close(found[key], wanted[key]) for key in wanted)  # another mask would show at once
    assert any(".experts." in key and grad.any() for key, grad in wanted.items())


def test_autocast():
    """Frozen products are in the weights' dtype, whatever autocast says; gradients are the parameters'."""
    model = attached().train()
    exact = {key: grad.double() for key, grad in gradients(copy.deepcopy(model).double()).items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        for layer in layers_of(model):
            layer._served = "not served here"  # W + scale · B A, by transformers' own experts
        plain = gradients(model)
    for key, grad in exact.items():
        assert found[key].dtype == torch.float32
        errors = [(grads[key] - grad).square().mean().sqrt() for grads in (found, plain)]
        assert errors[0] <= 1.5 * errors[1] + 1e-6, key


def test_compiled():
    layer = layers_of(attached())[0]
    x, index, weights = torch.randn(9, 32), torch.randint(6, (9, 2)), torch.rand(9, 2)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)

    def differentiate(function):
        layer.zero_grad()
        y = function(x, index, weights)
        y.square().sum().backward()
        return y, *(p.grad for p in layer.parameters() if p.requires_grad)

    for found, wanted in zip(differentiate(compiled), differentiate(layer), strict=True):
        assert close(found, wanted)
    assert graphs.frame_count == 1


def test_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = attached(dropout=0.1)
    before = {key: value.clone() for key, value in fastpeft.methods.adapter_state_dict(model).items()}
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    settings = {"max_steps": 2, "report_to": [], "use_cpu": True, "gradient_checkpointing": True, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(str(tmp_path), learning_rate=1e-2, disable_tqdm=True, **settings)
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    after = fastpeft.methods.adapter_state_dict(model)
    assert all(not torch.equal(after[key], before[key]) for key in after if ".experts." in key)
    fastpeft.save(model, tmp_path / "adapter")
    other = fastpeft.load(build("qwen3_moe"), tmp_path / "adapter")
    assert close(other(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("who", ["all to one", "one has none", "top-1", "no tokens", "elsewhere"])
def test_who_gets_tokens(family, who):
    """Beside the base with W + scale · B A for its weights."""
    layer = layers_of(attached(family))[0]
    index = {
        "all to one": torch.full((5, 1), 3),
        "one has none": torch.tensor([[0, 1], [1, 2], [4, 5]]),
        "top-1": torch.tensor([[2], [0], [5]]),
        "no tokens": torch.empty(0, 2, dtype=torch.int64),
        "elsewhere": torch.tensor([[0, 6], [6, 6], [2, 6]]),  # expert parallelism: this rank has no such expert
    }[who]
    x, weights = torch.randn(len(index), 32), torch.rand(index.shape).masked_fill(index == 6, 0)
    layer.base_layer._is_expert_parallel = who == "elsewhere"
    parameters = [p for p in layer.parameters() if p.requires_grad]
    fused = layer(x, index, weights)
    wanted = torch.autograd.grad(fused.square().sum(), parameters)
    layer._served = "not served here"
    layer.base_layer.config._experts_implementation = "grouped_mm" if who == "elsewhere" else "eager"
    plain = layer(x, index, weights)
    assert close(fused, plain) if len(index) else fused.shape == plain.shape
    found = torch.autograd.grad(plain.square().sum(), parameters) if plain.requires_grad else wanted
    assert all(close(one, other) for one, other in zip(wanted, found, strict=True))


def test_second_gradients_are_refused():
    layer = layers_of(attached())[0]
    x = torch.randn(4, 32, requires_grad=True)
    y = layer(x, torch.randint(6, (4, 2)), torch.rand(4, 2))
    with pytest.raises(RuntimeError, match="experts: gradients of gradients are not served"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_router_logits_and_their_loss_are_unchanged():
    model = build("mixtral")
    wanted = model(input_ids=IDS, labels=IDS, output_router_logits=True)
    fastpeft.attach(model, Lora(r=3))
    found = model(input_ids=IDS, labels=IDS, output_router_logits=True)
    assert close(found.aux_loss, wanted.aux_loss)
    assert all(map(close, found.router_logits, wanted.router_logits))
