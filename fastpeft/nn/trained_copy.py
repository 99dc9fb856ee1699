"""A module beside which copies of it are trained, one for each adapter (a classifier head, an embedding)."""

import copy
from typing import Any

from torch import nn

from .adapter import adapter_name


class TrainedCopy(nn.Module):
    """Calls the copy of the active adapter, or the original where there is none.

    Attributes that are not its own are the called module's, so that ``head.weight`` and ``head.out_features`` go on
    working. The original is frozen.

    Args:
        original_module: The module to leave as it is.
    """

    fastpeft_original = "original_module"

    def __init__(self, original_module: nn.Module):
        super().__init__()
        self.original_module = original_module.requires_grad_(False)
        self.copies = nn.ModuleDict()
        self.active: str | None = None
        self.disabled = False
        self.train(original_module.training)

    def add_copy(self, name: str) -> nn.Module:
        """Add a copy of the original; it is inactive and frozen until ``set_active``.

        Args:
            name: The copy's name.

        Returns:
            The copy.

        Raises:
            ValueError: ``name`` cannot be part of a parameter's name.
        """
        self.copies[adapter_name("TrainedCopy", name)] = copy.deepcopy(self.original_module)
        return self.copies[name]

    def set_active(self, name: str | None, trainable: bool = True) -> None:
        """Call this copy from now on, and train it unless told otherwise; the others are frozen.

        Args:
            name: The copy's name; None is the original.
            trainable: Whether the copy asks for gradients.
        """
        self.active = name
        for other, module in self.copies.items():
            module.requires_grad_(trainable and other == name)

    def current(self) -> nn.Module:
        """The module that is called."""
        modules: Any = self._modules
        return modules["original_module"] if self.disabled or self.active is None else modules["copies"][self.active]

    def forward(self, *args, **kwargs):
        """What the called module returns.

        Args:
            args: The called module's arguments.
            kwargs: The same.
        """
        return self.current()(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.current(), name)
