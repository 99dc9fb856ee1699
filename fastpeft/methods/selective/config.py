"""The config of selective fine-tuning: which of a model's own parameters to train. Checked when it is made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Ids = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Selective:
    """Train parts of the model itself, for ``fastpeft.attach`` and ``fastpeft.select``. At least one part is needed.

    Args:
        layers: blocks of the model's stack: "last:2", "first:2", "3:6" (half open), numbers (negative from the end),
            names, or a list of these. Alone it trains these blocks whole; beside params, rows, columns or
            add_missing_bias it says where those apply.
        params: "bias", "norm" (weights and biases of normalisation layers), names of parameters, their ends, or
            regular expressions for whole names.
        modules: paths or ends of paths of modules that are trained whole, wherever they are (a classifier, lm_head).
        tokens: ids whose rows of the input embedding are trained, or a dict of such lists by path. An output layer
            tied to the embedding goes with it.
        rows: for linear layers, by end of path or regular expression: numbers of the output features to train, or
            the fraction of them, chosen at random with ``seed``. columns: the same for input features.
        add_missing_bias: give linear layers without one a bias of zeros and train it (all but the output head, or
            those with these paths). BitFit for models without biases, such as Llama.
        blocks: path of the ModuleList that layers counts; None is the longest one of modules of one type.
        seed: of the random choice of rows and columns.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.
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
            object.__setattr__(self, name, _words(name, getattr(self, name)))
        if not isinstance(self.add_missing_bias, bool):
            object.__setattr__(self, "add_missing_bias", _words("add_missing_bias", self.add_missing_bias))
        if self.layers is not None and not isinstance(self.layers, str | int):
            object.__setattr__(self, "layers", tuple(self.layers))
        tokens = self.tokens
        if isinstance(tokens, Mapping):
            tokens = {path: _ids(f"tokens[{path!r}]", ids) for path, ids in tokens.items()}
        object.__setattr__(self, "tokens", tokens if isinstance(tokens, dict) else _ids("tokens", tokens))
        for name in ("rows", "columns"):
            object.__setattr__(self, name, _parts(name, getattr(self, name)))
        if self.layers == ():
            raise ValueError("Selective: layers is empty, expected None or blocks")
        if not (self.layers is not None or self.within or self.modules or self.tokens):
            raise ValueError(
                "Selective: nothing is selected, expected layers, params, modules, tokens, rows or columns"
            )

    @property
    def within(self) -> bool:
        """Whether something is selected that ``layers`` restricts."""
        return bool(self.params or self.rows or self.columns or self.add_missing_bias)


def _words(name: str, value: object) -> tuple[str, ...]:
    words = (value,) if isinstance(value, str) else value
    try:
        words = tuple(words)
    except TypeError:
        words = (None,)
    if any(not isinstance(word, str) or not word for word in words):
        raise TypeError(f"Selective: {name} is {value!r}, expected names")
    return words


def _ids(name: str, value: object) -> tuple[int, ...]:
    try:
        numbers = tuple(value.tolist() if hasattr(value, "tolist") else value)
    except TypeError:
        numbers = (None,)
    if any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        raise TypeError(f"Selective: {name} is {value!r}, expected integers")
    return numbers


def _parts(name: str, value: object) -> dict[str, float | tuple[int, ...]]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"Selective: {name} is {type(value).__name__}, expected a dict of paths")
    parts = {}
    for path, part in value.items():
        if isinstance(part, float):
            if not 0 < part <= 1:
                raise ValueError(f"Selective: {name}[{path!r}] is {part}, expected a fraction in (0, 1]")
            parts[path] = part
        else:
            parts[path] = _ids(f"{name}[{path!r}]", part)
    return parts
