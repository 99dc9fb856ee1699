"""Checkpoints between PEFT and us for every family of small models: what one writes the other computes. A table."""

import pytest
import torch

import fastpeft
from tests.support.models import FAMILIES, MOE_FAMILIES, build, close, logits

peft = pytest.importorskip("peft", reason="PEFT is not installed")

# By PEFT's words; what each means is the same for all families.
KINDS = {
    "LoRA": {"target_modules": "all-linear"},
    "rsLoRA, patterns": {
        "target_modules": r".*\.(q|v|q_proj|v_proj|query|value|c_attn|in_proj|o_proj)",
        "use_rslora": True,
        "rank_pattern": {r".*0.*": 3},
        "alpha_pattern": {r".*1.*": 5},
    },
    "LoRA, norms copied": {
        "target_modules": "all-linear",
        "modules_to_save": ["norm", "ln_f", "LayerNorm", "layernorm"],
    },
}


def outputs(model):
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with torch.no_grad():
        return logits(base)


def trained(family, settings):
    """PEFT's model, everything that it trains moved."""
    torch.manual_seed(4)
    wrapped = peft.get_peft_model(build(family), peft.LoraConfig(r=2, lora_alpha=4, **settings)).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) / 8)
    return wrapped


def row(family, settings, folder):
    """Largest differences: of PEFT's checkpoint loaded here, and of what we then save loaded in PEFT."""
    wrapped = trained(family, settings)
    expected = outputs(wrapped)
    assert not close(outputs(build(family)), expected)
    wrapped.save_pretrained(folder / "theirs")
    model = fastpeft.load(build(family), folder / "theirs")
    fastpeft.save(model, folder / "ours")
    again = peft.PeftModel.from_pretrained(build(family), folder / "ours").eval()
    found = outputs(model), outputs(again)
    assert all(close(actual, expected) for actual in found), family
    return len(fastpeft.report(model).layers), [(actual - expected).abs().max().item() for actual in found]


@pytest.mark.parametrize("kind", KINDS)
def test_every_family(kind, tmp_path, capsys):
    """Of models with experts PEFT's "all-linear" means the experts too, which load refuses (``target_parameters``)."""
    families = FAMILIES if KINDS[kind]["target_modules"] == "all-linear" else {**FAMILIES, **MOE_FAMILIES}
    lines = [f"{kind}: largest difference of the outputs", f"{'family':13} layers  PEFT's here  ours in PEFT"]
    for family in families:
        layers, (here, there) = row(family, KINDS[kind], tmp_path / family)
        lines.append(f"{family:13} {layers:6} {here:12.1e} {there:13.1e}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def test_all_linear_of_a_mixture_is_read(tmp_path):
    """PEFT adapts the experts too, as parameters."""
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(build("mixtral"), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = fastpeft.load(build("mixtral"), tmp_path).eval()
    assert any(row.kind == "LoRA layers" and "experts" in row.path for row in fastpeft.report(ours))
    assert close(outputs(ours), outputs(theirs))
