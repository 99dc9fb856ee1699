"""PEFT's files for prompts and prefixes: ``prompt_embeddings`` in a safetensors file without any prefix of keys."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from .files import read_safetensors
from .peft_files import Unserved, of_model, weights_of

EMBEDDINGS = "prompt_embeddings"
_MODEL = "base_model."  # what PEFT puts before the names of a model's own parameters beside a prompt
# Fields that do not change what a trained prompt computes, or that the model itself tells.
WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "encoder_hidden_size",
    "inference_mode",
    "init_weights",
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "num_virtual_tokens",
    "peft_type",
    "peft_version",
    "prefix_projection",
    "prompt_tuning_init",
    "prompt_tuning_init_state_dict_path",
    "prompt_tuning_init_text",
    "revision",
    "task_type",
    "token_dim",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
}


def check_fields(op: str, fields: Mapping, source: str = "adapter_config.json") -> int:
    """The number of virtual tokens.

    Raises:
        ValueError: it is missing, or a field asks for what is not served here.
    """
    length = fields.get("num_virtual_tokens")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"{op}: {source} has num_virtual_tokens={length!r}, expected at least 1")
    if fields.get("num_transformer_submodules") not in (None, 1):
        given = fields["num_transformer_submodules"]
        raise Unserved(f"{op}: {source} has num_transformer_submodules={given}, expected 1")
    for name, value in fields.items():
        if value and name not in WITHOUT_EFFECT:
            raise Unserved(f"{op}: {source} has {name}={value!r}, which is not served")
    return length


def read_embeddings(op: str, directory: Path) -> dict[str, Tensor]:
    """The tensors of ``adapter_model.safetensors``; those of the model itself as ``path.base_layer.weight``.

    Raises:
        FileNotFoundError: there is none. ValueError: pickled, truncated, or without prompt_embeddings.
    """
    path = weights_of(op, directory)
    tensors = read_safetensors(op, path)
    if EMBEDDINGS not in tensors:
        raise ValueError(f"{op}: {path} has {', '.join(sorted(tensors)[:3]) or 'no tensors'}, expected {EMBEDDINGS}")
    return {key if key == EMBEDDINGS else of_model(key.removeprefix(_MODEL)): t for key, t in tensors.items()}


def fields_of(model: nn.Module, peft_type: str, length: int, **fields) -> dict:
    """What PEFT's configs of both kinds have in common.

    Its classes for classifiers refuse files without a trained head; the one for feature extraction puts prompts before
    any encoder's input, so models that do not generate are written as that.
    """
    config = getattr(model, "config", None)
    task = "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"
    common = {
        "peft_type": peft_type,
        "task_type": task if getattr(model, "can_generate", bool)() else "FEATURE_EXTRACTION",
        "num_virtual_tokens": length,
        "num_transformer_submodules": 1,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
    }
    return dict(sorted({**common, **fields}.items()))
