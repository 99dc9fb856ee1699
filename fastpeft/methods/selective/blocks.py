"""The stack of blocks of a model, found and not listed by class, and which of its blocks a user means."""

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn


def stacks(model: nn.Module) -> dict[str, list[str]]:
    """Paths of the blocks of every ModuleList of modules of one type that lies in no other one's block.

    One of a single block counts where it holds no longer one: it is a stack that was made short, not a way to wrap.
    """
    modules = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lists = {path: len(module) for path, module in modules if _is_stack(module)}
    found: list[str] = []
    for path in sorted(lists, key=lambda path: lists[path] < 2):  # the longer ones first
        inside = path.startswith(tuple(f"{outer}." for outer in found))
        around = any(inner.startswith(f"{path}.") for inner in found)
        if not inside and not around:
            found.append(path)
    return {path: [f"{path}.{i}".lstrip(".") for i in range(count)] for path, count in lists.items() if path in found}


def _is_stack(module: nn.ModuleList) -> bool:
    return len({type(block) for block in module}) == 1 and next(module[0].parameters(), None) is not None


def blocks_of(op: str, model: nn.Module, stack: str | None) -> list[str]:
    """Paths of the blocks of ``stack``, or of the longest stack.

    Raises:
        ValueError: there is none, or none that is the longest.
    """
    found = stacks(model)
    if stack is not None:
        module = dict(model.named_modules()).get(stack)
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
            lists = ", ".join(found) or "none was found"
            raise ValueError(f"{op}: blocks is {stack!r}, expected the path of a list of modules ({lists})")
        return [f"{stack}.{i}" for i in range(len(module))]
    longest = max(map(len, found.values()), default=0)
    names = [path for path, blocks in found.items() if len(blocks) == longest]
    if len(names) != 1:
        what = f"stacks of the same length: {', '.join(names)}" if names else "no ModuleList of like modules"
        raise ValueError(f"{op}: layers is given, but the model has {what}; say which with blocks=")
    return found[names[0]]


def chosen(op: str, layers: int | str | Sequence[int | str], paths: Sequence[str]) -> list[str]:
    """The blocks that ``layers`` means: "last:2", "first:2", "3:6" (half open), a number, a name, or a list of them."""
    items = [layers] if isinstance(layers, str | int) else layers
    wanted: set[str] = set()
    for item in items:
        found = _one(op, item, paths)
        if not found:
            raise ValueError(f"{op}: layers has {item!r}, which is none of {len(paths)} blocks{near(item, paths)}")
        wanted.update(found)
    return [path for path in paths if path in wanted]


def _one(op: str, item: int | str, paths: Sequence[str]) -> Sequence[str]:
    count = len(paths)
    if isinstance(item, int):
        return [paths[item]] if -count <= item < count else []
    ends = re.fullmatch(r"(last|first):(\d+)", item)
    if ends:
        k = int(ends[2])
        if not 1 <= k <= count:
            raise ValueError(f"{op}: layers is {item!r}, expected 1 to {count} blocks")
        return paths[count - k :] if ends[1] == "last" else paths[:k]
    part = re.fullmatch(r"(-?\d*):(-?\d*)", item)
    if part:
        return paths[slice(*(int(text) if text else None for text in part.groups()))]
    return [path for path in paths if path == item or path.endswith(f".{item}")]


def near(word: object, names: Iterable[str], count: int = 4, words: Sequence[str] = ()) -> str:
    """``; near: ...`` with the names most like ``word``, or the first few.

    Args:
        word: What was given.
        names: What is there; its ends are looked at too.
        count: How many to show.
        words: What means something beside them, and is shown first where it is like ``word``.
    """
    if difflib.get_close_matches(str(word), words):
        return f"; near: {difflib.get_close_matches(str(word), words)[0]}"
    names = list(dict.fromkeys(names))
    ends = {".".join(name.split(".")[-parts:]): name for parts in (1, 2) for name in reversed(names)}
    ends |= {name: name for name in names}
    close = [ends[found] for found in difflib.get_close_matches(str(word), list(ends), count, 0.5)]
    shown = list(dict.fromkeys(close)) or names[:count]
    return f"; near: {', '.join(shown)}" if shown else ""
