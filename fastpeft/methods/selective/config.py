"""The config of selective fine-tuning: which of a model's own parameters to train. Checked when it is made."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ... import _check

Ids = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Selective:
    """Train parts of the model itself, for ``fastpeft.attach`` and ``fastpeft.select``. At least one part is needed.

    Args:
        layers: Blocks of the model's stack: "last:2", "first:2", "3:6" (half open), numbers (negative from the end),
            names, or a list of these. Alone it trains these blocks whole; beside params, rows, columns or
            add_missing_bias it says where those apply.
        params: "bias", "norm" (weights and biases of normalisation layers), names of parameters, their ends, or
            regular expressions for whole names; or a list of these.
        modules: Paths or ends of paths of modules that are trained whole, wherever they are (a classifier, lm_head).
        tokens: Ids whose rows of the input embedding are trained, or a dict of such lists by path. An output layer
            tied to the embedding goes with it.
        rows: For linear layers, by end of path or regular expression, the numbers of the output features to train, or
            the fraction of them in (0, 1], chosen at random with ``seed``.
        columns: The same for input features.
        add_missing_bias: Whether linear layers without a bias, all but the output head, get one of zeros that is
            trained; or the paths of those that do. This is BitFit for models without biases, such as Llama.
        blocks: The path of the ModuleList that layers counts; None is the longest one of modules of one type.
        seed: The seed of the random choice of rows and columns.

    Raises:
        TypeError: An argument has a type that it may not have; the error names it and what was expected.
        ValueError: An argument has a value that it may not have, likewise; or nothing is selected.
    """

    layers: str | int | Sequence[int | str] | None = None
    params: str | Sequence[str] = ()
    modules: str | Sequence[str] = ()
    tokens: Ids | Mapping[str, Ids] = ()
    rows: Mapping[str, float | Ids] | None = None
    columns: Mapping[str, float | Ids] | None = None
    add_missing_bias: bool | Sequence[str] = False
    blocks: str | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("params", "modules"):
            self._set(name, _words(name, getattr(self, name)))
        if not isinstance(self.add_missing_bias, bool):
            self._set("add_missing_bias", _words("add_missing_bias", self.add_missing_bias))
        if self.layers is not None and not isinstance(self.layers, str):
            self._set("layers", _blocks(self.layers))
        tokens = self.tokens
        if isinstance(tokens, Mapping):
            tokens = {path: _check.integers("Selective", f"tokens[{path!r}]", ids) for path, ids in tokens.items()}
        self._set("tokens", tokens if isinstance(tokens, dict) else _check.integers("Selective", "tokens", tokens))
        for name in ("rows", "columns"):
            self._set(name, _parts(name, getattr(self, name)))
        self._set("seed", _check.integer("Selective", "seed", self.seed))
        if self.layers == ():
            raise ValueError("Selective: layers is empty, expected None or blocks")
        if not (self.layers is not None or self.within or self.modules or self.tokens):
            raise ValueError(
                "Selective: nothing is selected, expected layers, params, modules, tokens, rows or columns"
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def within(self) -> bool:
        """Whether something is selected that ``layers`` restricts."""
        return bool(self.params or self.rows or self.columns or self.add_missing_bias)


def _words(name: str, value: object) -> tuple[str, ...]:
    return _check.names("Selective", name, (value,) if isinstance(value, str) else value)


def _blocks(value: object) -> int | str | tuple[int | str, ...]:
    def block(item: object) -> int | str:
        expected = 'numbers, names, "last:2", "first:2" or "3:6"'
        return item if isinstance(item, str) else _check.integer("Selective", "layers", item, expected)

    return tuple(map(block, value)) if isinstance(value, Iterable) else block(value)


def _parts(name: str, value: object) -> dict[str, float | tuple[int, ...]]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"Selective: {name} is {_check.shown(value)}, expected a dict of paths")
    parts: dict[str, float | tuple[int, ...]] = {}
    for path, part in value.items():
        label = f"{name}[{path!r}]"
        if isinstance(part, Iterable):
            parts[path] = _check.integers("Selective", label, part)
            continue
        fraction = _check.finite("Selective", label, part)
        if isinstance(part, int) or not 0 < fraction <= 1:
            given = _check.shown(part)
            raise ValueError(f"Selective: {label} is {given}, expected a fraction in (0, 1], or numbers in a list")
        parts[path] = fraction
    return parts
