"""fastpeft inspect and fastpeft convert: every format told apart, faults named, nothing unpickled, values kept."""

import json
import os
import pickle

import pytest
import torch

import fastpeft
from fastpeft import Bottleneck, Lora
from fastpeft.cli import main
from fastpeft.methods.formats.conversion import convert
from fastpeft.methods.formats.inspection import inspect_checkpoints
from tests.support.models import build, close, logits

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


def saved(folder, *configs, family="llama"):
    torch.manual_seed(0)
    model = fastpeft.attach(build(family), list(configs))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) / 3)
    fastpeft.save(model, folder)
    return model


def one(folder):
    (found,) = inspect_checkpoints(folder)
    return found


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


class TestInspect:
    def test_lora(self, tmp_path, capsys):
        model = saved(tmp_path, Lora(r=3, alpha=7, dropout=0.1, targets=["q_proj", "down_proj"]))
        found = one(tmp_path)
        assert (found.format, found.method) == ("PEFT", "LoRA, r=3, alpha=7, dropout=0.1")
        assert found.modules == [("down_proj", 2), ("q_proj", 2)]
        assert found.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert (found.dtypes, found.nbytes, found.problems) == (("float32",), 4 * found.parameters, [])
        assert "lora_linear" in found.served
        assert main(["inspect", str(tmp_path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[3] == "base model  not named"
        assert lines[4] == "modules     4: down_proj (2), q_proj (2)"
        assert lines[5] == f"parameters  {found.parameters:,} (float32, 0.0 MiB)"
        assert lines[7] == "problems    none"

    def test_bottleneck(self, tmp_path):
        saved(tmp_path / "a", Bottleneck("double_seq_bn", size=5, norm="layer", gating=True))
        found = one(tmp_path / "a")
        assert found.format == "AdapterHub"
        assert found.method == "bottleneck adapters, 5 wide, after attention mlp; silu, scale 1.0, norm layer, gate"
        assert found.modules == [("attention_adapters", 2), ("output_adapters", 2)]
        assert "the fused op bottleneck, then its gate or norm in PyTorch" in found.served
        assert not found.problems
        saved(tmp_path / "b", Bottleneck("par_bn", targets=["0.mlp", "self_attn"], norm="rms"))
        found = one(tmp_path / "b")
        assert (found.format, found.modules) == ("fastpeft", [("self_attn", 2), ("mlp", 1)])
        assert found.method == "bottleneck adapters, 16 wide, by rule; relu, scale 4.0, norm rms"
        assert not found.problems

    def test_several(self, tmp_path, capsys):
        """An adapter of two methods is a folder of two checkpoints."""
        saved(tmp_path, Lora(r=2), Bottleneck())
        assert [found.format for found in inspect_checkpoints(tmp_path)] == ["AdapterHub", "PEFT"]
        assert main(["inspect", str(tmp_path)]) == 0
        assert capsys.readouterr().out.count("checkpoint ") == 2

    def test_peft_s_own(self, tmp_path):
        peft = pytest.importorskip("peft", reason="PEFT is not installed")
        for kind, config, served in (
            ("IA3", peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "nothing here; PEFT itself"),
            ("PROMPT_TUNING", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "fastpeft.load"),
            ("TOKENS", peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]), "fastpeft.load"),
            ("LORA", peft.LoraConfig(use_dora=True, target_modules=["q_proj"]), "fastpeft.load"),
        ):
            peft.get_peft_model(build("llama"), config).save_pretrained(tmp_path / kind)
            found = one(tmp_path / kind)
            assert found.served.startswith(served)
            zero = ["every lora_B is zero: it has not been trained and does nothing"]
            assert bool(found.problems) == (kind == "IA3")
            assert kind != "TOKENS" or (found.notes == zero and found.method.endswith("and token rows"))
        assert "4 virtual tokens" in one(tmp_path / "PROMPT_TUNING").method
        assert one(tmp_path / "IA3").problems == [f"{tmp_path / 'IA3'} is PEFT's IA3: peft_type='IA3' is not served"]
        assert one(tmp_path / "LORA").method.startswith("LoRA with DoRA")

    def test_faults(self, tmp_path, capsys):
        saved(tmp_path, Lora(r=3, targets=["q_proj"]))
        weights = tmp_path / "adapter_model.safetensors"
        tensors = safetensors.load_file(weights)
        a = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        b = a.replace("lora_A", "lora_B")
        whole = json.loads((tmp_path / "adapter_config.json").read_text())

        def problems(changed=None, code=1, **fields):
            safetensors.save_file({**tensors, **(changed or {})}, weights)
            (tmp_path / "adapter_config.json").write_text(json.dumps({**whole, **fields}))
            assert main(["inspect", str(tmp_path)]) == code
            assert ("problems    none" in capsys.readouterr().out) == (code == 0)
            return "\n".join(one(tmp_path).problems)

        broken, path = f"{tmp_path} is broken:", "model.layers.0.self_attn.q_proj"
        nan = torch.full_like(tensors[a], float("nan"))
        assert problems({a: nan}) == f"{broken} {a} has values that are not finite"
        short = problems({a: tensors[a][:2].contiguous()})
        assert short == f"{broken} lora_A [2, 32] of {path} is not of rank 3, which the config says"
        assert problems({"odd.lora_A.weight": tensors[a].clone()}).splitlines() == [
            f"{tmp_path} has odd.lora_A.weight, expected keys that start with base_model.model.",
            f"{broken} odd has no lora_B beside its lora_A",
        ]
        assert "of rank 8, which the config says" in problems(r=8)
        assert f"{path} has no lora_magnitude_vector, but the config says use_dora" in problems(use_dora=True)
        assert "odd.kind is no part of LoRA" in problems({"base_model.model.odd.kind": tensors[a].clone()})
        zero = {key: torch.zeros_like(tensor) for key, tensor in tensors.items() if "lora_B" in key}
        assert b in zero
        assert problems(zero, code=0) == ""
        assert one(tmp_path).notes == ["every lora_B is zero: it has not been trained and does nothing"]
        weights.write_bytes(weights.read_bytes()[:50])
        assert "truncated or no safetensors file" in "\n".join(one(tmp_path).problems)
        weights.unlink()
        assert "has no adapter_model.safetensors" in "\n".join(one(tmp_path).problems)

    def test_what_is_no_checkpoint(self, tmp_path, capsys):
        assert main(["inspect", str(tmp_path)]) == 2
        assert f"fastpeft inspect: {tmp_path} has no adapter_config.json" in capsys.readouterr().err
        (tmp_path / "adapter_config.json").write_text("{")
        assert main(["inspect", str(tmp_path)]) == 2
        assert "is no JSON" in capsys.readouterr().err
        (tmp_path / "adapter_config.json").write_text("{}")
        assert main(["inspect", str(tmp_path)]) == 1
        assert "is neither PEFT's (peft_type) nor AdapterHub's (config)" in capsys.readouterr().out

    def test_nothing_is_unpickled(self, tmp_path, monkeypatch):
        class Bomb:
            def __reduce__(self):
                return os.mkdir, ("exploded",)

        monkeypatch.chdir(tmp_path)
        saved(tmp_path / "a", Bottleneck())
        saved(tmp_path / "b", Lora())
        for folder, safe, pickled in (
            ("a", "adapter.safetensors", "pytorch_adapter.bin"),
            ("b", "adapter_model.safetensors", "adapter_model.bin"),
        ):
            (tmp_path / folder / safe).unlink()
            (tmp_path / folder / pickled).write_bytes(pickle.dumps({"x": Bomb()}))
            assert one(tmp_path / folder).problems
            with pytest.raises(ValueError, match="truncated or holds more than tensors|which would be unpickled"):
                convert(tmp_path / folder, tmp_path / "out", "fastpeft")
            with pytest.raises(ValueError, match="truncated or holds more than tensors|which would be unpickled"):
                fastpeft.load(build("llama"), tmp_path / folder)
        assert not (tmp_path / "exploded").exists()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("norm", [None, "layer"])
def test_adapterhub_s_keys(norm, tmp_path):
    """The projection is adapter_down.0, or .1 behind a norm that is there twice; found in any order of the file."""
    model = saved(tmp_path, Bottleneck(size=3, norm=norm, scale="channel", gating=True, norm_after=True))
    path = tmp_path / "adapter.safetensors"
    tensors = safetensors.load_file(path)
    holder = "model.layers.1.output_adapters.adapters.default."
    shapes = {key.removeprefix(holder): list(t.shape) for key, t in tensors.items() if key.startswith(holder)}
    common = {
        "adapter_up.weight": [32, 3], "adapter_up.bias": [32], "scaling": [32], "gate.weight": [1, 32],
        "gate.bias": [1], "adapter_norm_after.weight": [32], "adapter_norm_after.bias": [32],
    }  # fmt: skip
    plain = {"adapter_down.0.weight": [3, 32], "adapter_down.0.bias": [3]}
    behind = {"adapter_down.1.weight": [3, 32], "adapter_down.1.bias": [3]}
    for name in ("adapter_down.0", "adapter_norm_before"):
        behind |= {f"{name}.weight": [32], f"{name}.bias": [32]}
    assert shapes == common | (behind if norm else plain)
    path.unlink()
    for order in (sorted(tensors), sorted(tensors, reverse=True)):
        torch.save({key: tensors[key] for key in order}, tmp_path / "pytorch_adapter.bin")
        assert torch.equal(logits(fastpeft.load(build("llama"), tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"phm_layer": True}, "phm_layer=True: Compacter is not served by attach"),
        ({"inv_adapter": "nice"}, "inv_adapter='nice': an invertible adapter is not served"),
        ({"non_linearity": "mish"}, "non_linearity='mish', expected one of relu"),
        ({"sideways": 1}, "sideways=1, which is not served"),
        ({"architecture": "lora"}, "AdapterHub's of a lora adapter, expected a bottleneck adapter"),
    ],
)
def test_adapterhub_configs_that_are_not_served(inner, message, tmp_path):
    saved(tmp_path, Bottleneck())
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    edit(tmp_path, config={**fields["config"], **inner})
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        fastpeft.load(model, tmp_path)
    assert not hasattr(model, "fastpeft_attachment")
    assert any(message in problem for problem in one(tmp_path).problems)


class TestConvert:
    def test_a_pickled_peft_checkpoint(self, tmp_path):
        peft = pytest.importorskip("peft", reason="PEFT is not installed")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(build("llama"), config).eval()
        model.save_pretrained(tmp_path / "old", safe_serialization=False)
        if not (tmp_path / "old" / "adapter_model.bin").exists():  # PEFT may write safetensors all the same
            tensors = safetensors.load_file(tmp_path / "old" / "adapter_model.safetensors")
            torch.save(tensors, tmp_path / "old" / "adapter_model.bin")
            (tmp_path / "old" / "adapter_model.safetensors").unlink()
        assert "is pickled" in str(one(tmp_path / "old")) or "are pickled" in str(one(tmp_path / "old"))
        assert main(["convert", str(tmp_path / "old"), str(tmp_path / "new"), "--to", "peft"]) == 0
        assert not one(tmp_path / "new").problems
        assert close(logits(fastpeft.load(build("llama"), tmp_path / "new")), logits(model))

    def test_a_pickled_adapterhub_checkpoint(self, tmp_path):
        model = saved(tmp_path / "old", Bottleneck(norm="layer", reduction_factor=4))
        (tmp_path / "old" / "adapter.safetensors").unlink()
        assert not one(tmp_path / "old").problems
        for to in ("adapters", "fastpeft"):
            convert(tmp_path / "old", tmp_path / to, to)
            assert (tmp_path / to / "adapter.safetensors").exists()
            assert torch.equal(logits(fastpeft.load(build("llama"), tmp_path / to)), logits(model))

    @pytest.mark.parametrize("family", ["llama", "bert"])
    def test_lora_there_and_back(self, family, tmp_path):
        targets = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "key", "intermediate.dense"]}[family]
        model = saved(tmp_path / "peft", Lora(r=3, alpha=7, targets=targets), family=family)
        convert(tmp_path / "peft", tmp_path / "hub", "adapters")
        fields = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())["config"]
        assert (fields["architecture"], fields["r"], fields["alpha"]) == ("lora", 3, 7)
        assert fields["attn_matrices"] == (["q", "v"] if family == "llama" else ["k", "q"])
        convert(tmp_path / "hub", tmp_path / "back", "peft")
        assert torch.equal(logits(fastpeft.load(build(family), tmp_path / "back")), logits(model))

    @pytest.mark.parametrize(
        ("config", "to", "message"),
        [
            (Bottleneck(), "peft", "PEFT has no form for bottleneck adapters"),
            (Bottleneck(targets=["mlp"]), "peft", "PEFT has no form for peft_type='FASTPEFT_BOTTLENECK'"),
            (Bottleneck(targets=["mlp"]), "adapters", "AdapterHub has no form for peft_type='FASTPEFT_BOTTLENECK'"),
            (Lora(rslora=True), "adapters", "AdapterHub's LoRA has no form for rslora=True"),
            (Lora(rank_pattern={"q_proj": 2}), "adapters", "has no form for rank_pattern={'q_proj': 2}"),
            (Lora(targets=["o_proj"]), "adapters", "has no adapter at model.layers.0.self_attn.o_proj"),
            (Lora(targets=["0.self_attn.q_proj", "1.self_attn.v_proj"]), "adapters", "these differ"),
            (Lora(), "onnx", "to is 'onnx', expected one of peft, adapters, fastpeft"),
        ],
    )
    def test_what_cannot_be_said(self, config, to, message, tmp_path):
        saved(tmp_path / "a", config)
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "a", tmp_path / "b", to)
        assert not (tmp_path / "b").exists()

    def test_bad_folders(self, tmp_path, capsys):
        saved(tmp_path / "a", Lora())
        before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
        assert main(["convert", str(tmp_path / "a"), str(tmp_path / "a"), "--to", "peft"]) == 2
        assert "holds a checkpoint already" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
        assert main(["convert", str(tmp_path / "none"), str(tmp_path / "b"), "--to", "peft"]) == 2
        assert "has no adapter_config.json" in capsys.readouterr().err
        (tmp_path / "a" / "adapter_config.json").write_text("{}")
        assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "peft"]) == 2
        assert "is neither PEFT's" in capsys.readouterr().err
