"""What a model must be for its layers to be given keys and values, found out before anything of it is touched."""

import dis
import functools
import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from ...nn.entry import arguments_of, entered
from ...nn.prefix import Sizes
from ...nn.prefix_function import eager_of
from ..embeddings import input_embeddings

# The kinds of attention that a prefix has a meaning in; transformers' configs name them by layer.
KINDS = ("full_attention", "sliding_attention", "attention", "hybrid")
# What a forward does to keys, values or masks after the cache has them; a prefix beside them would miss it.
CHANGES = {
    "repeat",
    "repeat_interleave",
    "repeat_kv",
    "chunk",
    "split",
    "expand",
    "cat",
    "stack",
    "transpose",
    "indexer",
}


def sizes_of(op: str, model: nn.Module) -> Sizes:
    """Layers and heads of a transformers model.

    Raises:
        TypeError: not a model that prefixes can be given to; the message says why.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "_attn_implementation"):
        raise TypeError(
            f"{op}: expected for PrefixTuning a transformers model with attention functions, not {type(model).__name__}"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"{op}: {type(model).__name__} is an encoder-decoder, expected for PrefixTuning one stack of layers"
        )
    text, embedding = text_config(model), input_embeddings(model)
    embeds = getattr(getattr(embedding, "weight", None), "dim", int)() == 2
    reason = _reason(model, text) if embeds else "it embeds no tokens"
    sizes = _sizes(text, list(attentions(model))) if reason is None else "unknown"
    reason = sizes if reason is None and isinstance(sizes, str) else reason
    if reason is not None:
        raise TypeError(f"{op}: PrefixTuning does not serve {type(model).__name__}: {reason}")
    return cast(Sizes, sizes)


def _sizes(text: Any, found: list[Any]) -> Sizes | str:
    try:
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        groups = getattr(text, "num_key_value_heads", None) or heads
    except RuntimeError:  # transformers' for a config by layer
        return "its layers differ in their heads"
    for module in found:
        own = getattr(module, "head_dim", width), getattr(module, "v_head_dim", width)
        if set(own) != {width} or heads // getattr(module, "num_key_value_groups", heads // groups) != groups:
            return f"layer {module.layer_idx} has heads of another number or width than {groups} and {width}"
    return Sizes(text.num_hidden_layers, groups, width)


def text_config(model: Any) -> Any:
    """The config of the part of a model that reads tokens."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def attentions(model: nn.Module) -> Iterator[Any]:
    """Every self-attention over tokens that calls transformers' attention functions and knows its layer."""
    for path, module in list(entered(model).values())[-1].named_modules():
        attends = "ALL_ATTENTION_FUNCTIONS" in _names(cast(Any, type(module)))
        known = attends and isinstance(getattr(module, "layer_idx", None), int)
        if known and not getattr(module, "is_cross_attention", False) and "crossattention" not in path:
            yield module


@functools.cache
def _names(kind: type) -> tuple[str, ...]:
    """What the forward of a class of modules names, in its order."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)  # type: ignore[attr-defined]
    if code is None:
        return ()
    return tuple(step.argval for step in dis.get_instructions(code) if isinstance(step.argval, str))


def _reason(model: nn.Module, text: Any) -> str | None:
    if importlib.util.find_spec("transformers.masking_utils") is None:
        return "this transformers has no masks by the name of an attention function, expected 4.53 or later"
    inner: Any = list(entered(model).values())[-1]
    if "past_key_values" not in arguments_of(inner):
        return "its layers take no keys and values beside their own (past_key_values)"
    count = getattr(text, "num_hidden_layers", None)
    found = list(attentions(model))
    layers = sorted(module.layer_idx for module in found)
    if count is None or layers != list(range(count)):
        missing = [] if count is None else sorted(set(range(count)) - set(layers))
        which = f"layers {_listed(missing)} of {count}" if missing else "its layers"
        return f"{which} do not attend by transformers' attention functions, once each"
    own = next(filter(None, map(_own_reason, found)), None)
    if own is not None:
        return own
    others = sorted({str(kind) for kind in getattr(text, "layer_types", None) or ()} - set(KINDS))
    if others:
        return f"a prefix has no meaning in layers of {', '.join(others)}"
    if getattr(text, "num_kv_shared_layers", 0):
        return f"{text.num_kv_shared_layers} of its layers read the keys and values of others"
    stops = next((kind for path in _paths(model) for kind in path if not _hands_on(kind)), None)
    if stops is not None:
        return f"{stops.__name__} does not hand keyword arguments on to its attention"
    if text._attn_implementation == "eager" and any(eager_of(module) is None for module in found):
        return "its eager attention is not by itself, expected attn_implementation='sdpa'"
    return None


def _own_reason(module: Any) -> str | None:
    kind = cast(Any, type(module))
    names = _names(kind)
    if getattr(module, "kv_lora_rank", None):
        return f"{kind.__name__} makes keys and values of a latent vector, which differ in width"
    after = names[names.index("update") :] if "update" in names else ()
    changed = ", ".join(sorted(set(after) & CHANGES))
    return (
        f"{kind.__name__} goes on to change keys, values or masks that it has cached ({changed})" if changed else None
    )


def _paths(model: nn.Module) -> Iterator[list[type]]:
    """For every attention the classes that a call goes through on its way there, itself among them."""
    modules, inside = dict(model.named_modules()), {id(module) for module in attentions(model)}
    for path, module in modules.items():
        if id(module) in inside:
            steps = path.split(".")
            above = [type(modules[".".join(steps[:i])]) for i in range(len(steps) + 1)]
            yield [kind for kind in above if kind.forward not in (nn.Module.forward, nn.ModuleList.forward)]


@functools.cache
def _hands_on(kind: type) -> bool:
    """Whether a class's forward takes any keyword arguments and calls something with what it was given."""
    forward = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]  # of a module
    takes = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())
    code = getattr(forward, "__code__", None)
    return takes and (code is None or any(step.opname == "CALL_FUNCTION_EX" for step in dis.get_instructions(code)))


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers[:4])) + (", ..." if len(layers) > 4 else "")
