"""Two labelled text data sets that every Python has: the standard library's docstrings, and where they come from.

The label is the top-level module ("module"), or what is documented ("kind": a module, class, function or method). The
sources are parsed, never imported. A docstring's own module is struck out of its text, so that label cannot be read
off, and near-duplicates (inherited, copied or boilerplate docstrings) are dropped, so none is in both splits.
"""

import ast
import random
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SHORTEST = 3  # words: "Return self." tells nothing about where it comes from
SHINGLE = 3  # words in a row, the unit in which two texts are compared
KINDS = {ast.Module: "module", ast.ClassDef: "class", ast.FunctionDef: "function", ast.AsyncFunctionDef: "function"}
TESTS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "turtledemo", "__phello__"}


class Split(NamedTuple):
    texts: list[str]
    labels: list[int]


class Data(NamedTuple):
    train: Split
    test: Split
    names: list[str]  # of the labels


def load(
    label: str = "module", classes: int = 8, per_class: int = 1000, test_share: float = 0.25, seed: int = 0
) -> Data:
    """At most ``per_class`` docstrings of each of the classes that have most of them; the same split every time."""
    by_class = read(Path(sysconfig.get_path("stdlib")), label)
    names = sorted(sorted(by_class, key=lambda name: (-len(by_class[name]), name))[:classes])
    if len(names) < 2:
        raise FileNotFoundError(f"no documented Python sources in {sysconfig.get_path('stdlib')}")
    train, test = Split([], []), Split([], [])
    for number, name in enumerate(names):
        texts = sorted(by_class[name])
        random.Random(f"{seed} {name}").shuffle(texts)
        texts = texts[:per_class]
        held_out = round(len(texts) * test_share)
        for split, part in ((test, texts[:held_out]), (train, texts[held_out:])):
            split.texts.extend(part)
            split.labels.extend([number] * len(part))
    return Data(train, test, names)


def read(library: Path, label: str = "module") -> dict[str, list[str]]:
    """Docstrings by their label, without near-duplicates, private modules and tests."""
    by_class, seen = defaultdict(list), Seen()
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        module = parts[0].removeprefix("_py")  # _pydecimal holds decimal's docstrings, _pyio those of io
        if module.startswith("_") or TESTS.intersection(parts):
            continue
        for kind, docstring in docstrings(path):
            text = without_name(docstring, module)
            if len(text.split()) >= SHORTEST and seen.add(text):
                by_class[{"module": module, "kind": kind}[label]].append(text)
    return by_class


def docstrings(path: Path) -> list[tuple[str, str]]:
    """Of the module, its classes, functions and methods: what is documented, and its docstring."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # some files are broken on purpose, or written for Python 2
        return []
    found = ((kind, ast.get_docstring(node)) for kind, node in documented(tree))
    return [(kind, docstring) for kind, docstring in found if docstring]


def documented(node: ast.AST, owner: ast.AST | None = None) -> Iterator[tuple[str, ast.AST]]:
    """What can have a docstring, by its kind. Unlike ast.walk it leaves expressions alone, which are most of a tree."""
    kind = KINDS.get(type(node))
    if kind is not None:
        yield "method" if kind == "function" and isinstance(owner, ast.ClassDef) else kind, node
        owner = node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from documented(child, owner)


def without_name(text: str, module: str) -> str:
    """The text on one line without the words that contain the module's name (two letters: that are it)."""
    word = rf"\w*{module}\w*" if len(module) > 2 else rf"\b{module}\b"
    return " ".join(re.sub(word, " ", text, flags=re.IGNORECASE).split())


class Seen:
    """Texts so far. Two are near-duplicates if they share half of their word triples (Broder's resemblance)."""

    def __init__(self):
        self.sizes = []
        self.holders = defaultdict(list)  # shingle -> texts that have it

    def add(self, text: str) -> bool:
        """Keep the text if it is new."""
        words = re.findall(r"\w+", text.lower())
        shingles = {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
        shared = Counter(other for shingle in shingles for other in self.holders.get(shingle, ()))
        for other, common in shared.items():
            if 2 * common >= len(shingles) + self.sizes[other] - common:
                return False
        for shingle in shingles:
            self.holders[shingle].append(len(self.sizes))
        self.sizes.append(len(shingles))
        return True
