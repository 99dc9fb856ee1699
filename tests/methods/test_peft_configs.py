"""attach with PEFT's own configs: the same parameters train, or the error names what is not served."""

import copy

import pytest
import torch

import fastpeft
from tests.support.models import bert, gpt2, llama, prompts
from tests.support.selections import names
from tests.support.untouched import assert_untouched, snapshot

peft = pytest.importorskip("peft", reason="PEFT is not installed")


def q_proj(**settings):
    return peft.LoraConfig(target_modules=["q_proj"], **settings)


def trained(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def both(make, config):
    """Our model and PEFT's of the same config; PEFT changes the config and the model that it is given."""
    ours = fastpeft.attach(make(), copy.deepcopy(config))
    theirs = peft.get_peft_model(make(), copy.deepcopy(config))
    assert trained(ours) == trained(theirs) > 0
    return ours, theirs


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (llama, {"target_modules": "all-linear"}),
        (llama, {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 5, "use_rslora": True}),
        (llama, {"target_modules": {"q_proj", "down_proj"}, "rank_pattern": {"q_proj": 2}, "lora_dropout": 0.1}),
        (llama, {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": "gaussian"}),
        (llama, {"target_modules": r".*\.(q|k)_proj", "exclude_modules": ["0.self_attn.k_proj"]}),
        (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        (bert, {"target_modules": ["query"], "bias": "lora_only"}),
        (bert, {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
        (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),  # trains the head without being told
    ],
)
def test_lora(make, settings):
    ours, theirs = both(make, peft.LoraConfig(**settings))
    layers = [m for m in ours.modules() if isinstance(m, fastpeft.nn.LoraLinear)]
    adapters = [layer.adapters["default"] for layer in layers]
    others = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.layer.LoraLayer)]
    assert [(a.r, a.scale, a.dropout) for a in adapters] == [
        (m.r["default"], m.scaling["default"], settings.get("lora_dropout", 0.0)) for m in others
    ]


def test_the_defaults_are_pefts():
    ours = fastpeft.Lora()
    theirs = peft.LoraConfig()
    assert (ours.r, ours.alpha, ours.dropout) == (theirs.r, theirs.lora_alpha, theirs.lora_dropout)
    alone = fastpeft.nn.LoraLinear(torch.nn.Linear(4, 4)).adapters["default"]
    assert (alone.r, alone.alpha, alone.scale) == (theirs.r, theirs.lora_alpha, 1.0)


def test_lora_with_token_rows():
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5])
    ours, _ = both(llama, config)
    assert [type(part) for part in ours.fastpeft_attachment.parts("default")] == [fastpeft.Lora, fastpeft.Selective]


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=6),
        peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_methods(config):
    config.task_type = config.task_type or "CAUSAL_LM"
    ours, theirs = both(llama, config)
    ids = prompts(2)
    assert ours(ids).logits.shape[-1] == theirs(input_ids=ids).logits.shape[-1]


def test_token_rows_alone():
    ours = fastpeft.attach(llama(), peft.TrainableTokensConfig(token_indices=[2, 9], target_modules=["embed_tokens"]))
    (part,) = ours.fastpeft_attachment.records["selective"].changes.of["default"].plan.slices
    assert (part.path, part.index.tolist()) == ("model.embed_tokens", [2, 9])
    assert names(fastpeft.select(llama(), tokens=[2, 9])) == {"model.embed_tokens.tokens"}  # the same by our own word


def test_beside_configs_of_ours():
    config = [peft.LoraConfig(target_modules=["q_proj"]), fastpeft.Bottleneck(size=2)]
    model = fastpeft.attach(llama(), config, "both")
    assert fastpeft.report(model).fused == 4
    assert fastpeft.active_adapters(model) == ("both",)


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (
            llama,
            peft.LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 1)]),
            r"peft\.LoraConfig has layer_replication=\[\(0, 1\)\], which",
        ),
        (
            llama,
            peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
            "init_lora_weights='pissa', expec",
        ),
        (
            llama,
            peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="orthogonal"),
            "'orthogonal', expected one",
        ),
        (llama, peft.LoraConfig(), r"peft\.LoraConfig has target_modules=None, expected names or 'all-linear'"),
        (
            llama,
            peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
            r"peft\.IA3Config, which is not served",
        ),
        (llama, peft.LNTuningConfig(), "target_modules=None, expected names of normalisation layers"),
        (
            bert,
            peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
            r"head \(classifier\) PEFT trains too",
        ),
        (
            llama,
            peft.PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True),
            "encoder_hidden_size=None, expected the hidden units",
        ),
        (
            llama,
            peft.PromptTuningConfig(
                num_virtual_tokens=4, prompt_tuning_init="TEXT", prompt_tuning_init_text="x", tokenizer_name_or_path="y"
            ),
            "prompt_tuning_init='TEXT', expected one of RANDOM, SAMPLE_VOCAB; from a text",
        ),
    ],
)
def test_what_is_not_served(make, config, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"attach: .*{message}"):
        fastpeft.attach(model, config)
    assert_untouched(model, before)
