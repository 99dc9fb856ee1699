"""Every argument of every public name has an entry of its own in the docstring, and every entry an argument."""

import dataclasses
import importlib
import inspect
import re

import pytest

PACKAGES = ("ops", "reference", "testing", "nn", "methods", "serving", "integrations")
# Folders whose names do not all keep to it yet; one that does must leave the list.
NOT_YET = {"serving", "integrations"}


def public(package: str):
    """(name, object) of every function and class that a package shows, its modules too, or the front door from it."""
    import fastpeft

    module = importlib.import_module(f"fastpeft.{package}")
    found = {}
    for name in getattr(module, "__all__", ()):
        try:
            value = getattr(module, name)
        except ImportError:  # of a library that is not installed
            continue
        inside = vars(value).items() if inspect.ismodule(value) else [(name, value)]
        of_ours = [pair for pair in inside if getattr(pair[1], "__module__", "").startswith("fastpeft.")]
        found |= {label: each for label, each in of_ours if not label.startswith("_")}
    door = {name: getattr(fastpeft, name) for name in fastpeft.__all__}
    found |= {
        n: value for n, value in door.items() if getattr(value, "__module__", "").startswith(f"fastpeft.{package}.")
    }
    return [(n, value) for n, value in found.items() if inspect.isfunction(value) or inspect.isclass(value)]


def entries(docstring: str | None, *sections: str) -> list[str]:
    """The names that begin an entry of these sections, in their order."""
    found, inside = [], False
    for line in inspect.cleandoc(docstring or "").splitlines():
        if re.fullmatch(r"\w[\w ]*:", line):
            inside = line[:-1] in sections
        elif inside and (entry := re.match(r"    \*{0,2}(\w+):(?:\s|$)", line)):
            found.append(entry[1])
    return found


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def missing(name: str, value) -> list[str]:
    """What has no entry, and entries of nothing."""
    if inspect.isfunction(value):
        return differences(name, parameters(value), entries(value.__doc__, "Args"))
    wanted, documented = [], entries(value.__doc__, "Args", "Attributes")
    fields = getattr(value, "_fields", None) or [f.name for f in dataclasses.fields(value)] if is_record(value) else []
    wanted = list(fields) or (parameters(value.__init__) if "__init__" in vars(value) else [])
    if "__init__" in vars(value):
        documented += entries(value.__init__.__doc__, "Args")
    found = differences(name, wanted, [entry for entry in documented if entry in wanted])
    for label, member in vars(value).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if not label.startswith("_") and inspect.isfunction(function):
            found += differences(f"{name}.{label}", parameters(function), entries(function.__doc__, "Args"))
    return found


def is_record(value: type) -> bool:
    return dataclasses.is_dataclass(value) or hasattr(value, "_fields")


def differences(name: str, wanted: list[str], documented: list[str]) -> list[str]:
    return [
        *(f"{name}: {entry} has no entry" for entry in wanted if entry not in documented),
        *(f"{name}: {entry} is no argument" for entry in documented if entry not in wanted),
        *(
            f"{name}: {entry} has {documented.count(entry)} entries"
            for entry in {*documented}
            if documented.count(entry) > 1
        ),
    ]


@pytest.mark.parametrize("package", [package for package in PACKAGES if package not in NOT_YET])
def test_every_argument_has_an_entry_of_its_own(package):
    names = public(package)
    assert names, "nothing was read"
    assert [line for name, value in names for line in missing(name, value)] == []


@pytest.mark.parametrize("package", sorted(NOT_YET))
def test_a_folder_that_keeps_to_it_leaves_the_list(package):
    assert [line for name, value in public(package) for line in missing(name, value)]


def _one(a, b):
    """Two arguments, of which one hides.

    Args:
        a: the first; b: the second.
    """


def _two(a):
    """One argument, of which two are told.

    Args:
        a: the first.
        b: no argument.

    Returns:
        c: nothing.
    """


@dataclasses.dataclass
class _Record:
    """A field without an entry, and a method.

    Attributes:
        a: a number.
    """

    a: int
    b: int

    def method(self, c):
        """c is not in a section."""


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (_one, ["_one: b has no entry"]),
        (_two, ["_two: b is no argument"]),
        (_Record, ["_Record: b has no entry", "_Record.method: c has no entry"]),
    ],
)
def test_what_is_missing_is_seen(value, said):
    assert missing(value.__name__, value) == said
