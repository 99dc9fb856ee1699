"""Which layers of a model are usually called with one tensor: siblings, by the names of their modules."""

import re
from collections.abc import Callable, Iterator

from torch import nn

# Names of children of one parent that are usually called with one tensor.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, BART, Whisper, CLIP
    ("query", "key", "value"),  # BERT, RoBERTa, ELECTRA, ViT
    ("q", "k", "v"),  # T5, MPNet
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT, XLM
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa
    ("wq", "wk", "wv"),  # Llama as published
    ("to_q", "to_k", "to_v"),  # diffusers
    ("linear_q", "linear_k", "linear_v"),  # Conformer
    ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek
    ("gate_proj", "up_proj"),  # Llama, Mistral, Qwen, Gemma
    ("w1", "w3"),  # Llama as published
    ("wi_0", "wi_1"),  # T5 v1.1
)
# A parent with such a name feeds its first sibling, the query, from elsewhere: the others share without it.
_CROSS = re.compile(r"cross|encoder_attn|encdec|(^|\.)attn2(\.|$)", re.IGNORECASE)


def siblings(model: nn.Module, takes_part: Callable[[nn.Module], bool]) -> Iterator[list[nn.Module]]:
    """Groups of two or more modules in ``model`` that take part and, by their names, receive the same tensor."""
    return (members for _, members in families(model, takes_part))


def families(
    model: nn.Module, takes_part: Callable[[nn.Module], bool]
) -> Iterator[tuple[nn.Module | None, list[nn.Module]]]:
    """The same with the module whose forward calls them: their parent, or what is around it if that has no forward."""
    modules = dict(model.named_modules())
    for path, parent in modules.items():
        for names in SIBLINGS:
            names = names[1:] if len(names) == 3 and _CROSS.search(path) else names
            members = [child for child in (getattr(parent, name, None) for name in names) if child is not None]
            members = [child for child in members if isinstance(child, nn.Module) and takes_part(child)]
            if len(members) > 1 and len({id(child) for child in members}) == len(members):
                yield _caller(modules, path), members


def _caller(modules: dict[str, nn.Module], path: str) -> nn.Module | None:
    while type(modules[path]).forward is nn.Module.forward or isinstance(modules[path], nn.Sequential):
        if path == "":
            return None
        path = path.rpartition(".")[0]
    return modules[path]
