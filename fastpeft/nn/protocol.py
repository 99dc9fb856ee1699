"""What modules tell about themselves: every attribute that is known by its name alone is declared here.

A module takes part by what its class has; nothing is inherited, so that a layer of another library can be given our
forward and keep its own bases. The functions below look at the class, since modules that stand for others hand out the
attributes of what they stand for.
"""

from typing import Any, ClassVar, Protocol, cast

from torch import Tensor, nn

from .branch import Branch


class Reported(Protocol):
    """A layer that has a line of its own in ``fastpeft.report``.

    Attributes:
        fastpeft_kind: what such layers are called when they are counted: "LoRA layers", "bottleneck adapters".
    """

    fastpeft_kind: ClassVar[str]

    def fastpeft_report(self) -> str:
        """``"fused"``, or why the layer does not run as one fused op as things stand."""
        ...

    def fastpeft_backend(self) -> str:
        """The backend that serves a fused layer for an x of one row on the device of its weights."""
        ...


class Group(Protocol):
    """Layers that share their input, as ``sharing.SharedInput`` does it."""

    def forward(self, module: nn.Module, x: Tensor, branch: object) -> Tensor | None:
        """The member's output from a shared call, or None: then it computes alone.

        ``branch`` is what its ``fastpeft_branch`` gives.
        """
        ...

    def partners(self, module: nn.Module) -> list[nn.Module]:
        """The members that share with this one as things stand."""
        ...


class Sharing(Protocol):
    """A layer that can be computed in one call with siblings that receive the same tensor.

    Attributes:
        fastpeft_shared: its group, which ``share_inputs`` sets on the instance; None for a layer on its own.
    """

    fastpeft_shared: Group | None

    def fastpeft_branch(self) -> Branch | str:
        """What the group computes for this layer, or why the layer must compute alone.

        Asked twice without a change in between, it gives the same tensor objects.
        """
        ...

    def fastpeft_projection(self) -> tuple[Branch, Tensor | None] | str:
        """What a gated MLP computes for this layer, and the magnitude of DoRA or None; or why the layer computes alone.

        Asked twice without a change in between, it gives the same tensor objects.
        """
        ...

    def fastpeft_guard(self, guards: Any) -> None:
        """Names to ``guards`` (see ``guarding``) all that those two read where they give a branch."""
        ...


class StandsFor(Protocol):
    """A module that stands where another one was and keeps that one as a child.

    Attributes:
        fastpeft_original: the child's name, which is left out of the paths and names that configs and checkpoints use.
    """

    fastpeft_original: ClassVar[str]


class Trains(Protocol):
    """A layer that trains parts of its weight, so that nobody may compute with that weight in the layer's place.

    Attributes:
        fastpeft_trains: what it does, as the end of a sentence about it.
    """

    fastpeft_trains: ClassVar[str]


class Added(Protocol):
    """A module that was added to a model, so that no method takes it for a part of the model itself.

    Attributes:
        fastpeft_added: True. Where the class is ``Reported`` too, its line speaks for the modules inside it.
    """

    fastpeft_added: ClassVar[bool]


def reported(module: nn.Module) -> Reported | None:
    """The module, if it has a line of its own in a report."""
    return cast(Reported, module) if hasattr(type(module), "fastpeft_report") else None


def is_added(module: nn.Module) -> bool:
    """Whether the module was added to a model."""
    return getattr(type(module), "fastpeft_added", False)


def original_child(module: nn.Module) -> str | None:
    """Where a module that stands for another keeps it; None for a module that stands for itself."""
    return getattr(type(module), "fastpeft_original", None)
