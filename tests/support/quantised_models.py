"""Tiny models loaded in 4 or 8 bits by bitsandbytes, where that is installed."""

import tempfile

import pytest
import torch

BF16 = torch.bfloat16
FORMATS = ("nf4", "nf4 nested", "fp4", "int8")


def load(family: str = "llama", bits: str = "nf4", dtype: torch.dtype = BF16):
    """``family`` with two layers, 64 wide, loaded as transformers loads a model with a BitsAndBytesConfig."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import transformers

    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    config, model = kinds[family]
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    if bits != "int8":
        kind, _, nested = bits.partition(" ")
        settings = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=bool(nested),
        )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        made = model(config(**sizes, num_attention_heads=4, num_key_value_heads=2)).to(dtype)
        made.save_pretrained(folder)
        return model.from_pretrained(folder, quantization_config=settings, device_map={"": "cpu"}, dtype=dtype)


def ids(rows: int = 2, tokens: int = 40) -> torch.Tensor:
    """Token ids, more rows than those of which a layer is called as it is."""
    return torch.randint(128, (rows, tokens), generator=torch.Generator().manual_seed(1))
