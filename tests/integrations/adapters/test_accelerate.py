"""AdapterHub's own library, whose bottleneck layers the fused op serves. Its environment: make test-adapters."""

import copy
import pickle

import pytest
import torch

import fastpeft
from tests.support.adapterhub import ALL, CASES, PRESETS, adapters, bottleneck, build, close, loaded, logits, theirs


def gradients(model):
    model.zero_grad()
    loss = logits(model)
    loss.square().sum().backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "form"), [case for case in CASES if case[0] in ("bert", "llama", "t5")])
def test_same_model(name, form):
    model = theirs(name, ALL[form]())
    text, keys, classes = repr(model), list(model.state_dict()), [type(m) for m in model.modules()]
    expected, wanted = gradients(model)
    assert fastpeft.accelerate(model) is model
    assert (repr(model), list(model.state_dict())) == (text, keys)
    report = fastpeft.report(model)
    assert {row.kind for row in report} == {"bottleneck adapters"}
    after = any(word in form for word in ("gate", "norms", "norm after the", "its own"))
    assert all(("plain PyTorch after the fused op" in row.status) if after else row.fused for row in report)
    assert {row.backend for row in report} == ({None} if after else {"reference"})
    actual, found = gradients(model)
    assert close(actual, expected)
    assert found.keys() == wanted.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for key, gradient in wanted.items():
        assert (found[key] - gradient).abs().max() <= 2**10 * torch.finfo(torch.float32).eps * largest
    fastpeft.accelerate(model, strict=True)
    assert fastpeft.restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(gradients(model)[0], expected)


def test_saves_what_it_did(tmp_path):
    model = fastpeft.accelerate(theirs("bert", PRESETS["seq_bn"]()))
    model.save_adapter(str(tmp_path), "a")
    assert close(logits(loaded("bert", tmp_path)), logits(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.bert.encoder.layer[0].output.adapters))):
        assert "FastAdapter" in {type(m).__name__ for m in other.modules()}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (adapters.CompacterConfig(reduction_factor=4), "its projections are PHMLayer and PHMLayer (Compacter)"),
        (adapters.SeqBnInvConfig(), "NICECouplingBlock has no fused form"),
        (bottleneck(non_linearity="mish"), "activation Mish"),
    ],
)
def test_what_is_not_fused(config, reason):
    model = theirs("bert", config)
    expected = logits(model)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="accelerate: strict, but") as caught:
        fastpeft.accelerate(model, strict=True)
    assert [type(m) for m in model.modules()] == classes
    assert reason in str(caught.value)
    fastpeft.accelerate(model)
    assert any(row.status.startswith(reason) for row in fastpeft.report(model))
    assert close(logits(model), expected)


def test_before_accelerate_the_report_says_so():
    report = fastpeft.report(theirs("bert", PRESETS["seq_bn"]()))
    assert len(report) == 2
    assert "Adapter is the adapters library's own layer; fastpeft.accelerate has not been called" in str(report)


@pytest.mark.parametrize(
    "setup",
    [
        adapters.composition.Stack("a", "b"),
        adapters.composition.Average("a", "b"),
        adapters.composition.Average("a", "b", weights=[0.3, 0.7]),
        adapters.composition.BatchSplit("a", "b", batch_sizes=[1, 1]),
        adapters.composition.Split("a", "b", splits=[2, 3]),
        adapters.composition.Parallel("a", "b"),
        adapters.composition.Stack("a", adapters.composition.Parallel("b", "c")),
        adapters.composition.Fuse("a", "b"),
    ],
    ids=str,
)
def test_compositions(setup):
    model = build("bert")
    adapters.init(model)
    torch.manual_seed(3)
    for name in "abc":
        model.add_adapter(name, config=bottleneck(init_weights="mam_adapter"))
    if isinstance(setup, adapters.composition.Fuse):
        model.add_adapter_fusion(setup)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "adapter" in path:
                parameter.add_(torch.randn(parameter.shape) / 5)
    model.set_active_adapters(setup)
    model.eval()
    expected = logits(model)
    fastpeft.accelerate(model)
    assert close(logits(model), expected)
    rows = [row for row in fastpeft.report(model) if ".adapters." in row.path]
    if isinstance(setup, adapters.composition.Fuse):
        assert {row.status for row in rows} == {"AdapterFusion reads its projection"}
        assert any(row.status == "BertFusion has no fused form" for row in fastpeft.report(model))
        with pytest.raises(ValueError, match="strict"):
            fastpeft.accelerate(model, strict=True)
    else:
        assert all(row.fused for row in rows)


def test_dropout_and_stochastic_depth():
    model = theirs("llama", bottleneck(dropout=0.4))
    expected = logits(model)
    fastpeft.accelerate(model).train()
    torch.manual_seed(1)
    first = logits(model)
    torch.manual_seed(1)
    assert torch.equal(logits(model), first)
    assert not close(first, expected)
    assert close(logits(model.eval()), expected)


def test_bad_models():
    with pytest.raises(ValueError, match="no bottleneck adapter of the adapters library|no LoRA layer"):
        fastpeft.accelerate(build("bert"))
    plain = build("bert")
    adapters.init(plain)
    with pytest.raises(ValueError, match="no LoRA layer"):
        fastpeft.restore(plain)
