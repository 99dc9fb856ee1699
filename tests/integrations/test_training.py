"""Attached models beside PEFT's own from the same weights: outputs, gradients, training; other people's loops."""

import copy

import pytest
import torch

import fastpeft
from tests.support import siblings
from tests.support.models import bert, gpt2, llama
from tests.support.peft_pairs import assert_close, build, gated_t5, loss_of, mlp, pair

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

PATTERNS = {"rank_pattern": {"q_proj": 2, r"1\.mlp\.up_proj": 7}, "alpha_pattern": {r"layers\.0\..*_proj": 3.0}}
HEAD = {"modules_to_save": ["classifier"]}
CASES = [
    (llama, {}),
    (bert, {"exclude": ["classifier"]}),
    (gpt2, {}),
    (gated_t5, {}),
    (mlp, {}),
    (llama, {"rslora": True}),
    (llama, PATTERNS),
    (llama, {"rslora": True, **PATTERNS}),
    (llama, {"targets": ["q_proj", "v_proj"], "layers": 1}),
    (llama, {"targets": ["o_proj", "v_proj"], "layers": [0], "layers_pattern": "layers"}),
    (llama, {"targets": r".*\.(q|k)_proj"}),
    (llama, {"exclude": ["v_proj"]}),
    (llama, {"exclude": r".*0\.mlp.*"}),
    (llama, {"modules_to_save": ["embed_tokens"]}),
    (bert, HEAD),
    (bert, {"bias": "all", "exclude": ["classifier"]}),
    (bert, {"bias": "lora_only", "targets": ["query"]}),
    (bert, {"lora_bias": True, **HEAD}),
    (bert, {"lora_bias": True, "bias": "all", **HEAD}),
    (mlp, {"targets": ["0", "2.0"], "bias": "all"}),
]


@pytest.mark.oldest
@pytest.mark.parametrize(("kind", "settings"), CASES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_training_equals_peft(kind, settings):
    """Which layers, which trained parameters, outputs, gradients, and the weights after a few steps."""
    ours, wrapped, names = pair(kind, settings)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2) for m in (ours, wrapped)]
    first = []
    for i in range(4):
        losses = [loss_of(model, kind, seed=i) for model in (ours, wrapped)]
        assert_close(*losses)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                assert_close(parameter.grad, names[name].grad)
        for optimizer in optimizers:
            optimizer.step()
        first.append(losses[0].item())
    for name, parameter in ours.named_parameters():
        assert_close(parameter, names[name])
    assert first[0] != first[-1]


@pytest.mark.parametrize("kind", [llama, gated_t5])
def test_mixed_precision_weights_are_no_less_accurate_than_pefts(kind):
    """bfloat16 model, float32 adapters, PEFT's default: the loss beside float64's."""
    ours, wrapped, _ = pair(kind, {}, dtype=torch.bfloat16)
    exact = loss_of(copy.deepcopy(ours).double(), kind)
    errors = [abs(loss_of(model, kind).item() - exact.item()) for model in (ours, wrapped)]
    # A scalar's rounding is luck: at most a bfloat16 unit of the loss beside twice PEFT's error.
    assert errors[0] <= 2 * errors[1] + 2**-8 * exact.item()
    assert {p.dtype for n, p in ours.named_parameters() if ".lora_" in n} == {torch.float32}


@pytest.mark.parametrize(
    ("kind", "groups"),
    [(llama, {3: 2, 2: 2}), (bert, {3: 2}), (gpt2, {}), (gated_t5, {3: 4, 2: 6})],
)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_sharing_changes_nothing(kind, groups, dropout, monkeypatch):
    calls = siblings.counted(monkeypatch)
    models = [build(kind), build(kind)]
    losses = []
    for model, share in zip(models, (True, False), strict=True):
        torch.manual_seed(1)
        settings = {"share_inputs": share, "fuse_mlp": False}
        fastpeft.attach(model, fastpeft.Lora(r=4, dropout=dropout, init="random", **settings))
        torch.manual_seed(3)
        losses.append(loss_of(model, kind))
        losses[-1].backward()
        found = {count: calls.count(count) for count in set(calls)}
        assert found == (groups if share else {})
        calls.clear()
    assert_close(*losses)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        if one.requires_grad:
            assert_close(one.grad, other.grad)


def test_decoder_with_cross_attention(monkeypatch):
    """BERT as a decoder: its cross-attention's query reads another tensor than key and value."""
    models = []
    for share in (True, False):
        model = transformers.BertLMHeadModel(bert(is_decoder=True, add_cross_attention=True).config)
        model.load_state_dict(
            {k: torch.sin(torch.arange(v.numel()).view(v.shape) + 1.0) / 4 for k, v in model.state_dict().items()}
        )
        torch.manual_seed(1)
        fastpeft.attach(model.double(), fastpeft.Lora(r=4, init="random", share_inputs=share))
        models.append(model)
    ids, states = torch.arange(12).view(2, 6), torch.randn(2, 9, 32, dtype=torch.float64)
    for _ in range(3):
        losses = [model(input_ids=ids, encoder_hidden_states=states, labels=ids).loss for model in models]
        assert_close(*losses)
        for loss in losses:
            loss.backward()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        if one.requires_grad:
            assert_close(one.grad, other.grad)
    shares = {row.path: len(row.shares_with) for row in fastpeft.report(models[0])}
    prefix = "bert.encoder.layer.0."
    assert shares[f"{prefix}attention.self.query"] == 2
    assert shares[f"{prefix}crossattention.self.query"] == 0
    assert shares[f"{prefix}crossattention.self.key"] == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [llama, gated_t5])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing(kind, reentrant, dropout):
    gradients = []
    for checkpointing in (False, True):
        model = build(kind)
        if kind is gated_t5:
            model.config.use_cache = False
        torch.manual_seed(1)
        fastpeft.attach(model, fastpeft.Lora(r=4, dropout=dropout, init="random"))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        for i in range(2):
            model.zero_grad()
            torch.manual_seed(3 + i)
            loss_of(model, kind, seed=i).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)


def test_generate():
    ours, wrapped, _ = pair(llama, {})
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = torch.arange(8).view(2, 4)
    assert torch.equal(ours.eval().generate(ids, **arguments), wrapped.eval().generate(input_ids=ids, **arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    ours, wrapped, names = pair(llama, {}, dtype=torch.float32)
    exact = loss_of(copy.deepcopy(ours).double(), llama)
    with torch.autocast("cpu", dtype):
        losses = [loss_of(model, llama) for model in (ours, wrapped)]
    [loss.backward() for loss in losses]
    errors = [abs(loss.item() - exact.item()) for loss in losses]
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * exact.item()
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            # Both round every activation to 16 bits; they agree as far as that goes.
            assert (parameter.grad - names[name].grad).norm() <= 32 * torch.finfo(dtype).eps * names[name].grad.norm()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph_dynamic(backend):
    torch._dynamo.reset()
    model = build(mlp)
    fastpeft.attach(model, fastpeft.Lora(r=4, init="random"))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 11):
        x = torch.randn(rows, 8, dtype=torch.float64)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            y = run(x)
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        for one, other in zip(*results, strict=True):
            assert_close(one, other)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = (torch.arange(6) * (i + 3)) % 50
        return {"input_ids": ids, "labels": ids}


def test_trainer(tmp_path):
    """Hugging Face's Trainer with checkpointing, beside PEFT's model in the same Trainer."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    losses = []
    for model in pair(llama, {}, dtype=torch.float32, initializer_range=0.02)[:2]:
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path, per_device_train_batch_size=4, max_steps=4, learning_rate=1e-2, logging_steps=1,
            gradient_checkpointing=True, report_to=[], save_strategy="no", use_cpu=True, seed=0, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=Rows())
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(losses[0]) == 4
    assert losses[0][-1] < losses[0][0]
    # Logged losses are float32, rounded to a few digits; 1e-4 of the loss is their last digit and float32's drift.
    assert torch.allclose(*(torch.tensor(values) for values in losses), rtol=1e-4, atol=1e-4)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    ours, wrapped, names = pair(mlp, {})
    for model in (ours, wrapped):
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        for i in range(3):
            with accelerator.accumulate(prepared):
                optimizer.zero_grad()
                accelerator.backward(loss_of(prepared, mlp, seed=i))
                optimizer.step()
    for name, parameter in ours.named_parameters():
        assert_close(parameter, names[name])
