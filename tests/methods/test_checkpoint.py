"""Adapters on disk: both ways with the real PEFT, whole or not at all, bad files refused before anything changes."""

import io
import json
import os
import pickle

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import Lora
from fastpeft.methods import adapter_state_dict
from tests.support import models
from tests.support.models import close

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8), "out": nn.Linear(8, 8)}) for _ in range(3)
        )
        self.norm = nn.LayerNorm(8)
        self.score = nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["out"](layer["q_proj"](x).tanh())
        return self.score(self.norm(x))


def build(seed=0):
    torch.manual_seed(seed)
    return Net()


X = torch.linspace(-1, 1, 40).view(5, 8)


def trained(**settings):
    """A model whose every trained parameter has moved."""
    model = fastpeft.attach(build(), Lora(**{"r": 4, **settings}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    return model.eval()


SETTINGS = [
    {},
    {"rslora": True, "alpha": 5, "dropout": 0.3},
    {"rank_pattern": {"q_proj": 2, r"1\.out": 7}, "alpha_pattern": {r"layers\.2\..*": 3}},
    {"targets": ["q_proj", "score"]},
    {"targets": r".*\.(q_proj|out)", "exclude": ["1.out"]},
    {"targets": ["q_proj", "out"], "layers": [0, 2], "layers_pattern": "layers"},
    {"modules_to_save": ["score"]},
    {"modules_to_save": ["score", "norm"], "bias": "all"},
    {"bias": "lora_only", "targets": ["out"]},
    {"bias": "all", "lora_bias": True},
    {"init": "gaussian"},
]
FIELDS = {
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "exclude": "exclude_modules",
    "layers": "layers_to_transform",
    "rslora": "use_rslora",
    "init": "init_lora_weights",
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_round_trip(settings, tmp_path):
    model = trained(**settings)
    fastpeft.save(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    new = fastpeft.load(build().eval(), tmp_path)
    assert torch.equal(new(X), model(X))
    config, again = (m.fastpeft_attachment.configs["default"] for m in (model, new))
    if settings.get("targets") and not settings.get("layers"):  # else the paths are written
        assert again == config
    # Into an adapter that is there, under another name, and once more beside the first.
    other = fastpeft.attach(build(), Lora(**{"r": 4, **settings}), "mine").eval()
    assert not torch.equal(other(X), model(X))
    fastpeft.load(other, tmp_path, "mine")
    assert torch.equal(other(X), model(X))
    fastpeft.detach(new)
    assert torch.equal(new(X), build()(X))


@pytest.mark.oldest
@pytest.mark.parametrize("settings", SETTINGS)
class TestBothWaysWithPeft:
    """PEFT 0.15 loses the biases of bias="lora_only" when it saves; that checkpoint is refused, not half read."""

    def test_peft_reads_ours(self, settings, tmp_path):
        peft = pytest.importorskip("peft", reason="PEFT is not installed")
        model = trained(**settings)
        fastpeft.save(model, tmp_path)
        wrapped = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
        assert close(wrapped(X), model(X))
        ours = {path.removesuffix(".base_layer") for path, m in model.named_modules() if path.endswith(".base_layer")}
        theirs = {
            p.removesuffix(".base_layer")
            for p, _ in wrapped.base_model.model.named_modules()
            if p.endswith("base_layer")
        }
        assert ours == theirs
        with wrapped.disable_adapter(), fastpeft.disable_adapter(model):
            if settings.get("bias", "none") == "none":  # PEFT leaves trained biases in place
                assert close(wrapped(X), model(X))

    def test_we_read_peft_s(self, settings, tmp_path):
        peft = pytest.importorskip("peft", reason="PEFT is not installed")
        if "layers" in settings and tuple(map(int, peft.__version__.split(".")[:2])) < (0, 19):
            pytest.skip("this PEFT finds layers_to_transform only below another module")
        named = {FIELDS.get(name, name): value for name, value in {"targets": "all-linear", **settings}.items()}
        wrapped = peft.get_peft_model(build(), peft.LoraConfig(r=4, **named)).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
        expected = wrapped(X)
        wrapped.save_pretrained(tmp_path)
        saved = safetensors.load_file(tmp_path / "adapter_model.safetensors")
        if settings.get("bias") == "lora_only" and not any(key.endswith("base_layer.bias") for key in saved):
            with pytest.raises(ValueError, match=r"missing layers\.0\.out\.base_layer\.bias"):
                fastpeft.load(build(), tmp_path)
            return
        model = fastpeft.load(build().eval(), tmp_path)
        assert close(model(X), expected)
        # What we then write holds the tensors that PEFT wrote.
        fastpeft.save(model, tmp_path / "again")
        again = safetensors.load_file(tmp_path / "again" / "adapter_model.safetensors")
        kept = {key for key in saved if "original_module" not in key and "modules_to_save" not in key}
        assert again.keys() == kept
        assert all(torch.equal(again[key], saved[key]) for key in kept)


def test_conv1d_both_ways(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    ids = torch.arange(10).view(2, 5)
    model = fastpeft.attach(models.gpt2(), Lora(r=3, init="random"))
    fastpeft.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    wrapped = peft.PeftModel.from_pretrained(models.gpt2(), tmp_path).eval()
    assert close(wrapped(ids).logits, model(ids).logits)
    wrapped.save_pretrained(tmp_path / "theirs")
    assert close(fastpeft.load(models.gpt2(), tmp_path / "theirs")(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("task", "targets"), [("SEQ_CLS", "all-linear"), ("TOKEN_CLS", ["query", "dense"])])
def test_a_classifier_that_peft_saved(task, targets, tmp_path):
    """PEFT names two heads in modules_to_save, of which a model has one."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    make = models.bert if task == "SEQ_CLS" else models.bert_tokens
    config = peft.LoraConfig(task_type=task, r=2, target_modules=targets, init_lora_weights=False)
    wrapped = peft.get_peft_model(make(), config).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    wrapped.save_pretrained(tmp_path)
    ids = torch.arange(10).view(2, 5)
    assert close(fastpeft.load(make(), tmp_path)(ids).logits, wrapped(ids).logits)


def test_peft_reads_lora_bias_beside_any_init(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = trained(lora_bias=True, init="gaussian")
    fastpeft.save(model, tmp_path)
    assert close(peft.PeftModel.from_pretrained(build(), tmp_path).eval()(X), model(X))


def test_paths_that_are_ends_of_others(tmp_path):
    """PEFT takes the path "0" for the end of "1.0", which is no linear layer."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 2))

    model = fastpeft.attach(net(), Lora(r=2, init="random"))
    fastpeft.save(model, tmp_path)
    assert close(peft.PeftModel.from_pretrained(net(), tmp_path)(X), model(X))
    assert torch.equal(fastpeft.load(net(), tmp_path)(X), model(X))


def test_second_adapter_beside_the_first(tmp_path):
    fastpeft.save(trained(targets=["out"]), tmp_path)
    model = trained(modules_to_save=["score"])
    before = model(X)
    fastpeft.load(model, tmp_path, "b")
    assert torch.equal(model(X), before)
    fastpeft.set_adapter(model, "b")
    assert torch.equal(model(X), trained(targets=["out"])(X))
    fastpeft.save(model, tmp_path / "b", "b")
    assert torch.equal(fastpeft.load(build().eval(), tmp_path / "b")(X), model(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype, tmp_path):
    model = fastpeft.attach(build().to(dtype), Lora(r=2, init="random"))
    fastpeft.save(model, tmp_path)
    assert {t.dtype for t in safetensors.load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    assert torch.equal(fastpeft.load(build().to(dtype), tmp_path)(X.to(dtype)), model(X.to(dtype)))
    fastpeft.save(fastpeft.attach(build().to(dtype), Lora(r=2, dtype=dtype)), tmp_path)
    assert {t.dtype for t in safetensors.load_file(tmp_path / "adapter_model.safetensors").values()} == {dtype}


def test_state_dict_is_the_model_s():
    model = trained(targets=["q_proj"], lora_bias=True)
    tensors = adapter_state_dict(model)
    names = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
    assert list(tensors) == [f"base_model.model.layers.{i}.q_proj.{name}" for i in range(3) for name in names]
    tensors["base_model.model.layers.0.q_proj.lora_A.weight"].zero_()
    assert not model.layers[0]["q_proj"].adapters["default"].lora_A.any()


class TestWriting:
    def test_a_failure_leaves_the_old_files(self, tmp_path, monkeypatch):
        fastpeft.save(trained(), tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

        def failing(tensors, path, **_):
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(safetensors, "save_file", failing)
        with pytest.raises(OSError, match="disk full"):
            fastpeft.save(trained(r=2), tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_overwrites_and_makes_folders(self, tmp_path):
        for r in (2, 4):
            fastpeft.save(trained(r=r), tmp_path / "a" / "b")
        assert torch.equal(fastpeft.load(build().eval(), str(tmp_path / "a" / "b"))(X), trained()(X))
        mode = (tmp_path / "a" / "b" / "adapter_config.json").stat().st_mode
        plain = tmp_path / "plain"
        plain.touch()
        assert mode == plain.stat().st_mode

    def test_refusals_write_nothing(self, tmp_path):
        model = trained()
        with pytest.raises(ValueError, match="save: no adapter 'x', expected one of default"):
            fastpeft.save(model, tmp_path / "d", "x")
        fastpeft.merge(model)
        with pytest.raises(ValueError, match="save: the adapters are merged"):
            fastpeft.save(model, tmp_path / "d")
        with torch.device("meta"):
            model = fastpeft.attach(Net(), Lora())
        with pytest.raises(ValueError, match="is on the meta device"):
            fastpeft.save(model, tmp_path / "d")
        with pytest.raises(ValueError, match="nothing is attached"):
            fastpeft.save(build(), tmp_path / "d")
        assert not (tmp_path / "d").exists()


def unchanged(model, run, error, message):
    """The call raises, and neither modules nor values nor flags are others than before."""
    state = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    text, attributes = repr(model), set(model.__dict__)
    with pytest.raises(error, match=message):
        run(model)
    assert (repr(model), set(model.__dict__)) == (text, attributes)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == state[name][0]
        assert torch.equal(parameter, state[name][1])


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


class TestReading:
    @pytest.fixture(autouse=True)
    def saved(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        fastpeft.save(trained(), "checkpoint")
        self.folder = tmp_path / "checkpoint"
        self.weights, self.config = self.folder / "adapter_model.safetensors", self.folder / "adapter_config.json"

    def refused(self, message, error=ValueError, model=None):
        unchanged(model or build(), lambda m: fastpeft.load(m, self.folder), error, message)
        if model is None:
            unchanged(trained(), lambda m: fastpeft.load(m, self.folder), error, message)

    def edit(self, **fields):
        self.config.write_text(json.dumps({**json.loads(self.config.read_text()), **fields}))

    def test_truncated(self):
        data = self.weights.read_bytes()
        for length in (0, 4, 100, len(data) - 1):
            self.weights.write_bytes(data[:length])
            self.refused("truncated or no safetensors file")

    @pytest.mark.parametrize("content", [b"PK\x03\x04 a zip", b"{}", b"\xff" * 64, pickle.dumps(Bomb())])
    def test_foreign(self, content):
        self.weights.write_bytes(content)
        self.refused("truncated or no safetensors file")
        assert not os.path.exists("exploded")

    def test_pickled_is_never_opened(self):
        self.weights.unlink()
        buffer = io.BytesIO()
        torch.save(Bomb(), buffer)
        (self.folder / "adapter_model.bin").write_bytes(buffer.getvalue())
        self.refused(r"adapter_model\.bin, which would be unpickled, expected adapter_model\.safetensors")
        assert not os.path.exists("exploded")

    def test_missing(self, tmp_path):
        self.weights.unlink()
        self.refused(r"has no adapter_model\.safetensors", FileNotFoundError)
        self.config.unlink()
        self.refused(r"has no adapter_config\.json", FileNotFoundError)
        self.folder = tmp_path / "nowhere"
        self.refused(r"nowhere has no adapter_config\.json", FileNotFoundError)

    def test_keys_of_something_else(self):
        safetensors.save_file({"lm_head.weight": torch.zeros(2)}, self.weights)
        self.refused(r"has lm_head\.weight, expected keys that start with base_model\.model\.")
        safetensors.save_file({}, self.weights)
        self.refused("has no tensors")

    def test_for_another_model(self):
        model = build()
        model.layers = model.layers[:2]
        self.refused(
            r"for another model:\n  unexpected layers\.2\.(.|\n)*unexpected layers\.2\.q_proj\.lora_A\.weight",
            model=model,
        )
        model = build()
        model.layers[1]["extra"] = nn.Linear(8, 8)
        self.edit(target_modules=["q_proj", "out", "extra", "score"])
        self.refused(r"missing layers\.1\.extra\.lora_A\.weight", model=model)
        model = build()
        model.layers[1]["out"] = nn.Linear(9, 8)
        self.refused(r"layers\.1\.out\.lora_A\.weight has shape \[4, 8\], expected \[4, 9\]", model=model)
        self.refused(r"targets=\[.*\] matches no module of Sequential", model=nn.Sequential(nn.Linear(2, 2)))

    def test_many_differences_are_counted(self):
        model = nn.Sequential(*(build() for _ in range(2)))
        self.edit(target_modules=["q_proj", "out", "score"])
        self.refused(r"missing 0\.layers\.0\.q_proj(.|\n)*and 34 more", model=model)

    def test_wrong_rank_or_dtype(self):
        self.edit(r=8)
        unchanged(
            build(), lambda m: fastpeft.load(m, self.folder), ValueError, r"has shape \[4, 8\], expected \[8, 8\]"
        )
        self.edit(r=4)
        tensors = safetensors.load_file(self.weights)
        key = next(iter(tensors))
        safetensors.save_file({**tensors, key: tensors[key].to(torch.int8)}, self.weights)
        self.refused(r"is torch\.int8")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"use_dora": True}, "has use_dora=True, which is not served"),
            ({"trainable_token_indices": [1]}, "is no trainable_tokens_delta of the 1 token_indices"),
            ({"layer_replication": [[0, 1]]}, "has layer_replication"),
            ({"target_parameters": ["x"]}, "has target_parameters"),
            ({"alora_invocation_tokens": [1]}, "has alora_invocation_tokens"),
            ({"use_qalora": True}, "has use_qalora"),
            ({"loftq_config": {"bits": 4}}, "has loftq_config"),
            ({"a_field_of_tomorrow": 3}, "has a_field_of_tomorrow=3, which is not served"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the frozen weights"),
            ({"init_lora_weights": ["x"]}, "init_lora_weights="),
            ({"peft_type": "IA3"}, "peft_type='IA3', expected 'LORA'"),
            ({"bias": "boft_only"}, "bias='boft_only'"),
            ({"r": 0}, "Lora: r is 0"),
            ({"r": "8"}, "Lora: r is '8'"),
            ({"lora_alpha": float("nan")}, "Lora: alpha is nan"),
            ({"lora_dropout": 1.5}, "Lora: dropout is 1.5"),
            ({"target_modules": None}, "no LoRA config, expected the fields peft_type, r, target_modules"),
            ({"target_modules": "(" * 3}, "Lora: targets is"),
        ],
    )
    def test_config_that_is_not_served(self, fields, message):
        self.edit(**fields)
        self.refused(message)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "is no JSON"),
            ("{", "is no JSON"),
            ("[1]", "is no LoRA config"),
            ('{"r": 3}', "is no LoRA config"),
            ("\0", "JSON"),
        ],
    )
    def test_config_that_is_none(self, content, message):
        self.config.write_text(content)
        self.refused(message)

    def test_merged_model(self):
        model = trained()
        fastpeft.merge(model)
        self.refused("load: the adapters are merged", model=model)

    def test_without_safetensors(self, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        for run in (lambda: fastpeft.load(build(), self.folder), lambda: fastpeft.save(trained(), self.folder)):
            with pytest.raises(ImportError, match=r"it comes with transformers and PEFT \(pip install safetensors\)"):
                run()
