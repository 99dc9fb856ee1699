"""Stand-ins for the tiny models with experts that PEFT's tests fetch from the hub: the same kinds, from configs."""

import torch


def _llama4():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"hidden_size": 16, "intermediate_size": 32, "intermediate_size_mlp": 48, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 2, "vocab_size": 1024}
    return Llama4ForCausalLM(Llama4TextConfig(**sizes, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0))


def _gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 8, "num_hidden_layers": 2, "vocab_size": 1024}
    return GptOssForCausalLM(GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0))


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1024, pad_token_id=0))


MODELS = {
    "trl-internal-testing/tiny-Llama4ForCausalLM": _llama4,
    "trl-internal-testing/tiny-GptOssForCausalLM": _gpt_oss,
    "hf-internal-testing/tiny-random-LlamaForCausalLM": _llama,
}


def stand_in_models():
    """Have ``AutoModelForCausalLM.from_pretrained`` build these where their names are given."""
    from transformers import AutoModelForCausalLM

    fetch = AutoModelForCausalLM.from_pretrained.__func__

    def from_pretrained(cls, name, *args, **kwargs):
        if name not in MODELS:
            return fetch(cls, name, *args, **kwargs)
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        model.config._name_or_path = name
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        return model if dtype is None else model.to(dtype)

    AutoModelForCausalLM.from_pretrained = classmethod(from_pretrained)
