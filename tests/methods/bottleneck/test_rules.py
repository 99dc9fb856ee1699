"""Bottleneck adapters where a rule says, on any model."""

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import Bottleneck
from tests.support.bottlenecks import holders, move
from tests.support.models import close
from tests.support.untouched import assert_untouched, snapshot


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)) for _ in range(3))
        self.norm, self.score = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, ids):
        h = self.embed(ids)
        for layer in self.layers:
            h = h + layer(h)
        return self.score(self.norm(h))


X = torch.arange(22).view(2, 11) % 11


def net():
    torch.manual_seed(0)
    return Net().eval()


class TestByRule:
    @pytest.mark.parametrize(
        ("targets", "paths"),
        [
            (["layers.1", "norm"], ["layers.1", "norm"]),
            (["2"], ["layers.0.2", "layers.1.2", "layers.2", "layers.2.2"]),
            (r"layers\.[02]", ["layers.0", "layers.2"]),
            (lambda path, module: isinstance(module, nn.LayerNorm), ["norm"]),
            (["score", "embed"], ["embed", "score"]),
        ],
    )
    def test_targets(self, targets, paths, tmp_path):
        model = net()
        with torch.no_grad():
            before, expected = snapshot(model), model(X)
        fastpeft.attach(model, Bottleneck(targets=targets, size=2, init="houlsby"))
        assert sorted(h.site.path for h in holders(model)) == sorted(paths)
        move(model)(X).sum().backward()
        with torch.no_grad():
            moved = model(X)
            assert not close(moved, expected)
            fastpeft.save(model, tmp_path)
            assert torch.equal(fastpeft.load(net(), tmp_path)(X), moved)
            fastpeft.detach(model)
        assert_untouched(model, before)

    @torch.no_grad()
    def test_follows_or_stands_beside(self):
        for parallel in (False, True):
            model = fastpeft.attach(net(), Bottleneck(targets=["layers.1"], size=2, parallel=parallel))
            move(model)
            layer = model.layers[1]
            adapter = layer.fastpeft_bottleneck.adapters["default"]
            x = torch.randn(4, 8)
            h = net().layers[1](x)
            assert close(layer(x), h + adapter(x if parallel else h, torch.zeros_like(h)))

    def test_pytorch_s_fused_encoder_does_not_bypass_the_adapters(self):
        torch.manual_seed(0)
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2).eval()
        x = torch.randn(3, 5, 8)
        padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
        model = move(fastpeft.attach(encoder, Bottleneck(targets=["linear2"], size=2)))
        with torch.no_grad():
            found = model(x, src_key_padding_mask=padding)[~padding]
        assert close(found, model(x, src_key_padding_mask=padding)[~padding])

    def test_bad_rules(self):
        model = net()
        before = snapshot(model)
        for settings, message in (
            ({"targets": ["mlp"]}, r"targets=\['mlp'\] matches no module, expected some of embed, layers, norm, score"),
            ({"targets": r"layer"}, "targets='layer' matches no module"),
            ({"targets": lambda path, module: False}, "targets=a function matches no module"),
            ({"targets": ["layers.0.1"]}, r"the width of layers\.0\.1, a Tanh, cannot be read off; give features"),
            ({"targets": ["layers"]}, "targets names layers, a ModuleList, which is never called"),
            ({}, "Net has no layers built like those of Llama, BERT, GPT-2, T5 or ViT; say which"),
        ):
            with pytest.raises(ValueError, match=message):
                fastpeft.attach(model, Bottleneck(**settings))
        assert_untouched(model, before)
        fastpeft.attach(model, Bottleneck(targets=["layers.0.1"], features=12, size=2))
        model(X)

    def test_a_module_that_returns_no_tensor(self):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Linear(3, 3)

            def forward(self, x):
                return {"y": self.inner(x)}

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.odd = Odd()

            def forward(self, x):
                return self.odd(x)["y"]

        model = fastpeft.attach(Outer(), Bottleneck(targets=["odd"]))
        with pytest.raises(TypeError, match="bottleneck: odd returns dict, expected a tensor"):
            model(torch.ones(1, 3))
