"""What a model must be for a prompt to be put in front of its tokens, found out before anything of it is touched."""

from typing import Any, cast

from torch import Tensor, nn

from ...nn.cache import CACHES, OTHER_CACHES
from ...nn.entry import arguments_of
from ..embeddings import input_embeddings

# Fields of configs by which a layer reads the token ids beside their embeddings; a prompt has no ids.
READS_IDS = ("hidden_size_per_layer_input", "vocab_size_per_layer_input")
# What transformers' families do that their forward's arguments do not tell, by model_type.
UNSUITED = {
    "ctrl": "it changes its embeddings in place",
    "ibert": "its embedding gives a scale beside the vectors",
}


def embedding_of(op: str, method: str, model: Any) -> Any:
    """The model's token embedding.

    Raises:
        TypeError: it has none, or no place for other embeddings.
    """
    arguments = arguments_of(model) if isinstance(model, nn.Module) else ()
    embedding = input_embeddings(model) if "inputs_embeds" in arguments else None
    if embedding is None:
        raise TypeError(
            f"{op}: {type(model).__name__} does not take inputs_embeds, expected for {method} a transformers model"
        )
    if not isinstance(getattr(embedding, "weight", None), Tensor) or cast(Tensor, embedding.weight).dim() != 2:
        raise TypeError(f"{op}: {type(model).__name__} has no token embedding of shape [V, D]")
    return embedding


def refuse_unsuited(op: str, model: Any) -> None:
    """Raise where prompts would not be what they mean.

    Raises:
        TypeError: the message says why.
    """
    reason = _reason(model, tuple(arguments_of(model)))
    if reason is not None:
        raise TypeError(f"{op}: PromptTuning does not serve {type(model).__name__}: {reason}")


def _reason(model: Any, arguments: tuple[str, ...]) -> str | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    unsuited = UNSUITED.get(getattr(text, "model_type", ""))
    if unsuited is not None:
        return unsuited
    if any(getattr(text, name, None) for name in READS_IDS):
        return "its layers read token ids beside their embeddings"
    if "hash_moe" in (getattr(text, "mlp_layer_types", None) or ()):
        return "it chooses experts by token ids"
    others = [name for name in OTHER_CACHES if name in arguments]
    known = [name for name in CACHES if name in arguments]
    if others:
        return f"what it keeps between decoding steps ({', '.join(others)}) cannot carry a note of the prompt"
    generates = bool(getattr(model, "can_generate", bool)())
    if generates and "use_cache" in arguments and not known:
        return f"it keeps something between decoding steps in no argument that is known ({', '.join(CACHES)})"
    return None
