"""Real text that every Python has: prose for the base model, and a different kind for each tenant's adapter."""

import sysconfig
from pathlib import Path
from typing import NamedTuple

import docstrings

LONGEST = 400_000  # characters of a tenant's text
HELD_OUT = 0.1


class Text(NamedTuple):
    train: str
    test: str


def prose() -> Text:
    """The language reference, as ``help()`` shows it."""
    from pydoc_data.topics import topics

    return split("\n\n".join(topics[name] for name in sorted(topics)))


def tenants(count: int) -> dict[str, Text]:
    """One of docstrings, the others of the source code of the largest packages of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    sizes = {folder.name: sum(p.stat().st_size for p in sources(folder)) for folder in library.iterdir()}
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[: count - 1]
    found = (text for path in sorted(library.glob("*.py")) for _, text in docstrings.docstrings(path))
    texts = {"docstrings": split("\n\n".join(found)[:LONGEST])}
    for name in largest:
        read = (path.read_text("utf-8", "replace") for path in sources(library / name))
        texts[name] = split("\n\n".join(read)[:LONGEST])
    return texts


def sources(folder: Path) -> list[Path]:
    skipped = folder.name.startswith("_") or folder.name in docstrings.TESTS or folder.name == "pydoc_data"  # the prose
    if skipped or not (folder / "__init__.py").is_file():
        return []
    return [p for p in sorted(folder.rglob("*.py")) if not docstrings.TESTS.intersection(p.relative_to(folder).parts)]


def split(text: str) -> Text:
    cut = int(len(text) * (1 - HELD_OUT))
    return Text(text[:cut], text[cut:])
