"""Chosen rows or columns of a frozen weight as a small trained parameter, and the weight that always holds them.

The optimizer sees the small parameter ``trained``. The weight stays one dense tensor: whenever it is read, what has
been trained is written into it, so forward is the plain computation, and whoever else holds the weight (a tied output
layer, ``state_dict``, a merge) finds it up to date. It is written every time, in training and in evaluation, since
nothing tells reliably that nothing has changed: no counter moves where somebody writes through ``.data`` or into the
memory, and copies, pickles and parameters that are put in another's place have counters of their own.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import _check
from .base_layer import trained_dtype


class LiveSlice(nn.Module):
    """Parameters ``weight`` (the base's own, frozen) and ``trained`` (a slice of it), buffer ``index``.

    The state dict is the base layer's: the weight as trained. Where ``trained`` is wider than the weight it is there
    too. Loading a weight loads its slice.

    Args:
        base_layer: The module to stand for; it is not changed.
        index: ``[n]`` int64, the numbers of the chosen rows or columns.
        columns: Whether ``index`` counts the weight's columns.
        transposed: Whether the base stores the weight the other way round, as ``[K, N]``.
        trained: The slice of a layer that is tied to this one; None for one of its own.
        dtype: The slice's dtype; None is the weight's, or float32 where that is 16 bits wide.
    """

    index: Tensor
    trained: nn.Parameter
    fastpeft_trains = "trains rows or columns of its weight"
    _written: int | None  # the version of the slice that the weight holds

    def __init__(
        self,
        base_layer: Any,
        index: Tensor,
        columns: bool = False,
        transposed: bool = False,
        trained: nn.Parameter | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.__dict__["base_layer"] = base_layer  # no submodule: the parameters keep the names they had
        self.columns, self.transposed = columns, transposed
        weight = base_layer.weight
        self._parameters["weight"] = weight
        self._parameters["bias"] = getattr(base_layer, "bias", None)
        self.register_buffer("index", index.to(weight.device), persistent=False)
        if trained is None:
            dtype = dtype or trained_dtype(weight.dtype)
            values = self._matrix(weight.detach()).index_select(int(columns), self.index)
            trained = nn.Parameter(values.to(dtype, memory_format=torch.contiguous_format, copy=True))
        self.trained = trained
        self._written = trained._version
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The whole weight, with what has been trained so far."""
        self.write()
        return self.stored

    @property
    def stored(self) -> nn.Parameter:
        """The weight as it lies in memory, whether or not it is up to date."""
        return cast(nn.Parameter, self._parameters["weight"])

    def stand_for(self, base_layer: nn.Module) -> None:
        """Take the place of this module, with the parameters and the mode that it has now."""
        self.__dict__["base_layer"] = base_layer
        self._parameters |= {name: base_layer._parameters.get(name) for name in ("weight", "bias")}
        weight = self.stored
        self.trained.data, self.index = self.trained.data.to(weight.device), self.index.to(weight.device)
        self._written = None
        self.train(base_layer.training)

    def give_back(self) -> nn.Module:
        """The module that this stood for, with the parameters and the mode that this has: they may be others by now."""
        base = self.__dict__["base_layer"]
        base._parameters |= {name: self._parameters[name] for name in ("weight", "bias") if name in base._parameters}
        return base.train(self.training)

    def write(self) -> None:
        """Bring the weight up to date."""
        parameters, index = self._parameters, self._buffers["index"]  # past nn.Module's slow __getattr__
        weight, trained = cast(Tensor, parameters["weight"]), cast(Tensor, parameters["trained"])
        if weight.is_meta or trained.is_meta:
            return
        # A counted write, so that a backward that needs the old weight raises. Not where the counter stands: the value
        # is most likely the same then, as between the micro-batches of a pipeline, whose backwards are still to come.
        compiling = torch.compiler.is_compiling()
        version = None if compiling or trained.is_inference() else trained._version
        # detach shares the counter, .data does not; neither records a gradient, without the time that no_grad takes.
        target = weight.detach() if version is None or version != self._written else weight.data
        values = trained.detach() if trained.dtype == weight.dtype else trained.detach().to(weight.dtype)
        self._matrix(target).index_copy_(int(self.columns), cast(Tensor, index), values)
        if not compiling:
            self._written = version

    def current(self) -> Tensor:
        """``[N, K]`` for a forward."""
        return self._matrix(self.weight)

    def written(self) -> Tensor:
        """``[N, K]`` with the trained part, which gets its gradient from here; the weight in memory is left alone."""
        return self._matrix(self.stored.detach()).index_copy(
            int(self.columns), self.index, self.trained.to(self.stored.dtype)
        )

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__:
                raise
            return getattr(self.__dict__["base_layer"], name)

    def __getstate__(self):
        self.write()
        return {**self.__dict__, "_written": None}  # a copy's counter is its own

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.write()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.trained.dtype == self.stored.dtype:
            del destination[f"{prefix}trained"]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *errors):
        self.write()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *errors)
        key = f"{prefix}trained"
        if key in state_dict:
            return
        if key in missing_keys:
            missing_keys.remove(key)
        if f"{prefix}weight" in state_dict:
            rows = self._matrix(self.stored.detach()).index_select(int(self.columns), self.index)
            if self.trained.is_meta:  # the weight has been assigned to a model without memory
                self.trained = nn.Parameter(rows.to(self.trained.dtype), self.trained.requires_grad)
            with torch.no_grad():
                self.trained.copy_(rows)


def index_of(op: str, name: str, numbers, size: int) -> Tensor:
    """Distinct numbers in [0, size), sorted, as an int64 tensor; negative ones count from the end.

    Raises:
        TypeError: A number is no integer.
        ValueError: A number is out of range, two are the same, or there is none.
    """
    found = _check.integers(op, name, [numbers] if isinstance(numbers, int) else numbers)
    for number in found:
        if not -size <= number < size:
            raise ValueError(f"{op}: {name} has {number}, expected integers in [0, {size})")
    distinct = sorted({number % size for number in found})
    if not distinct or len(distinct) < len(found):
        raise ValueError(
            f"{op}: {name} has {len(found)} numbers of which {len(distinct)} differ, expected distinct ones"
        )
    return torch.tensor(distinct, dtype=torch.int64)
