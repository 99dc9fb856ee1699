"""Checkpoints whole or not at all; bad files refused before anything changes."""

import io
import json
import os
import pickle

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import Lora
from tests.support.saved_net import Net, X, build, trained

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


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
            build(), lambda m: fastpeft.load(m, self.folder), ValueError, r"lora_A \[4, 8\] of .* is not of rank 8"
        )
        self.edit(r=4)
        tensors = safetensors.load_file(self.weights)
        key = next(iter(tensors))
        safetensors.save_file({**tensors, key: tensors[key].to(torch.int8)}, self.weights)
        self.refused(r"is torch\.int8")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"use_qalora": True}, "has use_qalora=True, which is not served"),
            ({"trainable_token_indices": [1]}, "is no trainable_tokens_delta of the 1 token_indices"),
            ({"layer_replication": [[0, 1]]}, "has layer_replication"),
            ({"alora_invocation_tokens": [1]}, "has alora_invocation_tokens"),
            ({"use_qalora": True}, "has use_qalora"),
            ({"loftq_config": {"bits": 4}}, "has loftq_config"),
            ({"a_field_of_tomorrow": 3}, "has a_field_of_tomorrow=3, which is not served"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the frozen weights"),
            ({"init_lora_weights": ["x"]}, "init_lora_weights="),
            ({"peft_type": "IA3"}, "is PEFT's IA3: peft_type='IA3' is not served"),
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
            ("[1]", "is neither PEFT's"),
            ('{"r": 3}', "is neither PEFT's"),
            ('{"peft_type": "LORA", "r": 3}', "is no LoRA config"),
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
