"""fastpeft.accelerate on real architectures: PEFT's numbers, loss curves and checkpoints, half the saved bytes."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn

import fastpeft
from fastpeft.integrations.peft import FastLoraLinear
from fastpeft.testing import error_vs_eager
from tests.support.models import build, gpt2, llama

pytestmark = pytest.mark.oldest


def bert_words():
    return build("bert", "BertForMaskedLM")


TARGETS = {llama: "all-linear", bert_words: ["query", "key", "value", "dense"], gpt2: ["c_attn", "c_proj", "c_fc"]}
MODELS = pytest.mark.parametrize("architecture", TARGETS, ids=lambda f: f.__name__)


def peft_model(architecture, dtype=torch.float32, **settings):
    """A model with adapters that act from the start."""
    model, targets = architecture().train(), TARGETS[architecture]
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": targets, **settings}
    settings["fan_in_fan_out"] = architecture is gpt2
    return get_peft_model(model.to(dtype), LoraConfig(**settings)).train()


def tokens(seed=0):
    return torch.randint(0, 64, (3, 11), generator=torch.Generator().manual_seed(seed))


def step(model, ids):
    """Loss, logits and the gradients of all that is trained."""
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return {
        "loss": output.loss.detach(),
        "logits": output.logits.detach(),
        **{name: p.grad for name, p in model.named_parameters() if p.requires_grad},
    }


def assert_equal(ours, theirs, tolerance):
    """Both dictionaries hold the same; the tolerance is relative to each tensor's largest element."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        difference = (ours[name] - expected).abs().max() / expected.abs().max()
        assert difference <= tolerance, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("share_inputs", [True, False])
@MODELS
def test_outputs_and_gradients_are_pefts(architecture, share_inputs):
    model = peft_model(architecture, torch.float64)
    ours = fastpeft.accelerate(copy.deepcopy(model), strict=True, share_inputs=share_inputs)
    assert fastpeft.report(ours).fused == len(fastpeft.report(ours)) > 0
    shared = sum(bool(layer.shares_with) for layer in fastpeft.report(ours))
    assert (shared > 0) == (share_inputs and architecture is not gpt2)
    assert_equal(step(ours, tokens()), step(model, tokens()), 1e-12)


@pytest.mark.parametrize("case", ["two adapters", "tensor scaling", "lora_bias", "sharing taken back"])
def test_siblings_in_every_state(case):
    model = peft_model(llama, torch.float64, lora_bias=case == "lora_bias")
    if case == "two adapters":
        model.add_adapter("b", LoraConfig(r=3, init_lora_weights=False, target_modules="all-linear"))
        model.base_model.set_adapter(["default", "b"])
    if case == "tensor scaling":
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] = torch.tensor(0.7)
    ours = fastpeft.accelerate(copy.deepcopy(model), strict=True)
    if case == "sharing taken back":
        fastpeft.accelerate(ours, share_inputs=False)
    assert any(layer.shares_with for layer in fastpeft.report(ours)) == (case == "lora_bias")
    assert_equal(step(ours, tokens()), step(model, tokens()), 1e-12)


def test_bias_of_a_wide_adapter_keeps_its_precision():
    """float32 adapters on a bfloat16 model: the gradient of B's bias is not rounded to bfloat16, shared or not."""
    ours = fastpeft.accelerate(peft_model(llama, torch.bfloat16, lora_bias=True), strict=True)
    assert {bool(layer.shares_with) for layer in fastpeft.report(ours)} == {True, False}
    grads = {name: grad for name, grad in step(ours, tokens()).items() if name.endswith("lora_B.default.bias")}
    assert len(grads) == 14
    assert all(grad.dtype == torch.float32 and (grad.bfloat16() != grad).any() for grad in grads.values())


@MODELS
def test_state_dict_and_structure_are_pefts(architecture):
    model = peft_model(architecture)
    ours = fastpeft.accelerate(copy.deepcopy(model))
    assert list(ours.state_dict()) == list(model.state_dict())
    assert [(n, p.requires_grad) for n, p in ours.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in model.named_modules()]
    layers = [row for row in fastpeft.report(ours) if row.kind == "LoRA layers"]
    assert sum(isinstance(module, FastLoraLinear) for module in ours.modules()) == len(layers)


@MODELS
def test_restore_is_exact(architecture):
    model = peft_model(architecture)
    ours = fastpeft.restore(fastpeft.accelerate(copy.deepcopy(model)))
    assert not any(isinstance(module, FastLoraLinear) for module in ours.modules())
    for module, original in zip(ours.modules(), model.modules(), strict=True):
        assert type(module) is type(original)
        assert module.__dict__.keys() == original.__dict__.keys()
    assert_equal(step(ours, tokens()), step(model, tokens()), 0)


def loss_curve(model, steps=20):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for i in range(steps):
        losses.append(step(model, tokens(i % 4))["loss"])
        optimizer.step()
    return torch.stack(losses).double()


@MODELS
def test_loss_curve_is_pefts(architecture):
    """Eight steps are no farther from float64's than twice PEFT's, by the median of three: after them chance rules."""
    errors = []
    for seed in range(3):
        model, _ = peft_model(architecture), torch.manual_seed(seed)
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.data.add_(0.01 * torch.randn_like(p))
        exact = loss_curve(copy.deepcopy(model).double())
        assert exact[-4:].mean() < exact[:4].mean()
        curves = loss_curve(fastpeft.accelerate(copy.deepcopy(model), strict=True)), loss_curve(model)
        errors.append([(curve - exact)[:8].square().mean().sqrt() for curve in curves])
    assert torch.tensor(errors).median(0).values.log2().diff() >= -1  # PEFT's over ours, at least a half


@MODELS
def test_trained_checkpoint_loads_in_plain_peft(architecture, tmp_path):
    ours = fastpeft.accelerate(peft_model(architecture, lora_dropout=0.1))
    loss_curve(ours, steps=3)
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(architecture(), tmp_path).eval()
    assert not any(isinstance(module, FastLoraLinear) for module in loaded.modules())
    logits = loaded(input_ids=tokens()).logits
    torch.testing.assert_close(ours.eval()(input_ids=tokens()).logits, logits)
    assert torch.equal(fastpeft.restore(ours)(input_ids=tokens()).logits, logits)


@MODELS
def test_register_trains_as_peft(architecture):
    model = peft_model(architecture, torch.float64)
    torch.manual_seed(0)
    base, targets = architecture(), TARGETS[architecture]
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets)
    ours = get_peft_model(base.double(), fastpeft.register(config)).train()
    assert fastpeft.report(ours).fused == len(fastpeft.report(ours)) == len(fastpeft.report(model)) > 0
    ours.load_state_dict(model.state_dict())
    assert ours.peft_config["default"].fan_in_fan_out == (architecture is gpt2)
    assert_equal(step(ours, tokens()), step(model, tokens()), 1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("share_inputs", [True, False])
def test_gradient_checkpointing_draws_the_same_masks(reentrant, share_inputs):
    ours = fastpeft.accelerate(peft_model(llama, torch.float64, lora_dropout=0.2), share_inputs=share_inputs)
    ours.enable_input_require_grads()
    torch.manual_seed(1)
    expected = step(ours, tokens())
    torch.manual_seed(2)
    assert not torch.equal(step(ours, tokens())["logits"], expected["logits"])
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(1)
    assert_equal(step(ours, tokens()), expected, 1e-12)


def test_trainer(tmp_path):
    """Hugging Face's Trainer: the same losses as with PEFT's layers."""

    def losses(model, name):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=3,
            per_device_train_batch_size=2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
        )
        rows = [{"input_ids": row, "labels": row} for row in tokens(3)]
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model = peft_model(llama)
    ours = losses(fastpeft.accelerate(copy.deepcopy(model)), "ours")
    assert len(ours) == 3
    assert ours == pytest.approx(losses(model, "theirs"), rel=1e-4)  # the log is rounded to four digits


def layer(dtype, adapter_dtype, dropout=0.0, lora_bias=False, adapters=1, k=192, n=160):
    """One PEFT layer around nn.Linear, with adapters of their own dtype."""
    torch.manual_seed(0)
    # Rank 16: below 12 MKL sums along K in another order, which would set one adapter apart from two.
    config = {"r": 16, "lora_alpha": 16, "lora_dropout": dropout, "init_lora_weights": False, "lora_bias": lora_bias}
    config = LoraConfig(target_modules=["0"], **config)
    model = get_peft_model(nn.Sequential(nn.Linear(k, n)).to(dtype), config, autocast_adapter_dtype=False)
    names = ["default", *(f"extra{i}" for i in range(1, adapters))]
    for name in names[1:]:
        model.add_adapter(name, copy.deepcopy(config))
    model.base_model.set_adapter(names)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
    return model.train()


def gradients(model, x, dy):
    """Everything a training step makes of one layer, keyed by name."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.backward(dy.to(y.dtype))
    grads = {name.split("lora_")[-1]: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **grads}


DTYPES = [
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
]


@pytest.mark.parametrize("case", ["plain", "lora_bias", "two adapters"])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES, ids=str)
def test_never_less_accurate_than_peft(dtype, adapter_dtype, case):
    model = layer(dtype, adapter_dtype, lora_bias=case == "lora_bias", adapters=1 + (case == "two adapters"))
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(4, 96, size, generator=generator).to(dtype) for size in (192, 160))
    ours = fastpeft.accelerate(copy.deepcopy(model), strict=True)
    exact = gradients(copy.deepcopy(model).double(), x.double(), dy.double())
    ours, theirs = gradients(ours, x, dy), gradients(model, x, dy)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        ratios = error_vs_eager(ours[name], value, exact[name])
        assert ratios.ok, f"{name}: {ratios}"


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES[:2] + DTYPES[4:], ids=str)
def test_autocast(dtype, adapter_dtype):
    model = layer(dtype, adapter_dtype, lora_bias=True)
    x, dy = (torch.randn(256, size, generator=torch.Generator().manual_seed(size)) for size in (192, 160))
    ours = fastpeft.accelerate(copy.deepcopy(model), strict=True)
    exact = gradients(copy.deepcopy(model).double(), x.double(), dy.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = gradients(ours, x, dy), gradients(model, x, dy)
    assert ours["y"].dtype == theirs["y"].dtype == torch.bfloat16
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        ratios = error_vs_eager(ours[name], value, exact[name])
        assert ratios.ok, f"{name}: {ratios}"


def saved_bytes(model, x):
    """What the forward keeps for backward, each storage once, without parameters."""
    parameters, storages = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    return sum(storage.nbytes() for storage in storages.values()), y


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_half_of_the_saved_activations(dropout):
    """bfloat16 base, float32 adapters: PEFT keeps a float32 copy of x (with dropout: and a mask); we keep x."""
    model = layer(torch.bfloat16, torch.float32, dropout, k=1024)
    x = torch.randn(512, 1024).to(torch.bfloat16).requires_grad_()
    theirs, _ = saved_bytes(model, x)
    ours, _ = saved_bytes(fastpeft.accelerate(model), x)
    assert x.nbytes < ours <= (0.52 if dropout == 0 else 0.27) * theirs
