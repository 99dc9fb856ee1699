"""Which modules a config means, of which rank and scale: what PEFT makes of the same config, over a table of models."""

import copy

import pytest
from torch import nn

import fastpeft
from fastpeft.nn import LoraLinear
from tests.support import models

peft = pytest.importorskip("peft", reason="PEFT is not installed")


class Nested(nn.Module):
    """Stacks in stacks, and paths that are ends of others."""

    def __init__(self):
        super().__init__()
        blocks = [
            nn.ModuleDict({"fc": nn.Linear(4, 4), "experts": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)})])})
            for _ in range(3)
        ]
        self.blocks, self.fc, self.my_fc = nn.ModuleList(blocks), nn.Linear(4, 4), nn.Linear(4, 4)


MODELS = {
    "llama": models.llama,
    "tied": lambda: models.llama(tied=True),
    "bert": models.bert,
    "gpt2": models.gpt2,
    "t5": models.t5,
    "nested": Nested,
}
PAIR = ["q_proj", "up_proj"]
WHOLE = "model.layers.1.mlp.up_proj"
CONFIGS = [
    {"target_modules": ["q_proj", WHOLE], "layers_to_transform": [0]},  # a whole path is in any layer
    {"target_modules": [WHOLE, "k_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": ["blocks.1.fc", "up"], "layers_to_transform": [0]},
    {"target_modules": ["fc", "my_fc"], "layers_to_transform": [2]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ""},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "lay.*"},
    {"target_modules": ["fc", "up"], "layers_to_transform": [1]},
    {"target_modules": ["fc", "up"], "layers_to_transform": [0], "layers_pattern": "experts"},
    {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"},
    {"target_modules": ["q", "wo"], "layers_to_transform": [1]},
    {"target_modules": ["q", "wo"], "layers_to_transform": [0], "layers_pattern": "block"},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"},
    {"target_modules": ["dense"], "exclude_modules": ["output.dense"]},
    {"target_modules": r".*layers\.\d+\.(self_attn\.q_proj|mlp\.up_proj)"},
    {"target_modules": r"(.*\.)?(q|wo|c_attn|fc)"},
    {"target_modules": ["self_attn.q_proj", "0.mlp.down_proj"]},
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["embed_tokens", "wte", "word_embeddings", "shared"]},
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    {"target_modules": "ALL-linear", "exclude_modules": ["q_proj", "query"]},
    {"target_modules": ["q_proj", "mlp.up_proj"], "modules_to_save": ["1.mlp"]},
    {"target_modules": ["dense"], "modules_to_save": ["classifier", "pooler"]},
    {"target_modules": PAIR, "rank_pattern": {"q_proj": 3, f"^{WHOLE}": 5}, "alpha_pattern": {"1.mlp.up_proj": 32}},
    {"target_modules": PAIR, "rank_pattern": {"layers.0.*": 3}, "alpha_pattern": {".*proj": 32, "q_proj": 2}},
]


def adapted(model, kind, prefix=""):
    layers = {path.removeprefix(prefix): module for path, module in model.named_modules() if isinstance(module, kind)}
    if kind is LoraLinear:
        return {path: (m.adapters["default"].r, m.adapters["default"].scale) for path, m in layers.items()}
    return {path: (m.r["default"], m.scaling["default"]) for path, m in layers.items()}


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_the_same_layers(settings, tmp_path):
    """Attached with PEFT's config, and loaded from what PEFT saves; where PEFT finds nothing, neither do we."""
    compared = 0
    for name, make in MODELS.items():
        config = peft.LoraConfig(r=4, lora_alpha=6, **settings)
        try:
            theirs = peft.get_peft_model(make(), copy.deepcopy(config))
        except ValueError:
            with pytest.raises(ValueError, match="matches no module|which no path|layers is"):
                fastpeft.attach(make(), config)
            continue
        expected = adapted(theirs, peft.tuners.lora.layer.LoraLayer, "base_model.model.")
        theirs.save_pretrained(tmp_path / name)
        assert adapted(fastpeft.load(make(), tmp_path / name), LoraLinear) == expected, name
        if not set(settings) & {"modules_to_save", "rank_pattern"} or name == "llama":  # whose names must match here
            assert adapted(fastpeft.attach(make(), config), LoraLinear) == expected, name
        compared += 1
    assert compared
