"""LISA: of a stack of blocks only a few train at a time, and which ones changes every so many steps.

Source: Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning" (2024).
"""

import random

import torch
from torch import nn

from ... import _check
from ..attachment import attachment_of
from ..embeddings import input_embeddings, output_embeddings
from .blocks import blocks_of
from .grad_entry import GradEntry
from .selection import Selection, selection_of


class LisaSchedule:
    """Rotates the blocks that train. Call ``step`` before each training step, or pass it to a Trainer as a callback.

    >>> schedule = LisaSchedule(model, n_active=2, every=20)
    >>> optimizer = torch.optim.AdamW(schedule.parameters())     # all that will ever train
    >>> for batch in batches:
    ...     schedule.step(optimizer)
    ...     model(**batch).loss.backward(); optimizer.step(); optimizer.zero_grad()

    Until the first step everything that the schedule ever trains asks for gradients, so that an optimizer that is built
    in between (a Trainer's too) knows it all. Which blocks are active is a function of the seed and the step's number,
    so a resumed run draws the same.

    Args:
        model: A model, whose other parameters are frozen; or a ``Selection``, whose blocks rotate while the rest of it
            always trains.
        n_active: How many blocks train at a time.
        every: The number of steps between draws.
        seed: The seed of the draws.
        train_embeddings: Whether the input embedding of a model always trains.
        train_head: Whether the output head of a model always trains. Tied to the embedding, they are one.
        keep_state: Whether to keep the optimizer's state of blocks that rest. By default it is dropped, which saves its
            memory; a block then starts anew each time, as in the paper.
        blocks: The path of the ModuleList; None is the longest one of modules of one type.

    Raises:
        TypeError: ``model`` is neither a module nor a selection.
        ValueError: There are fewer blocks than are to be active, or no stack of blocks to choose from, or the model has
            adapters. Nothing has been changed then.
    """

    def __init__(
        self,
        model: nn.Module | Selection,
        n_active: int = 2,
        every: int = 20,
        seed: int = 0,
        train_embeddings: bool = False,
        train_head: bool = True,
        keep_state: bool = False,
        blocks: str | None = None,
    ):
        if not isinstance(model, nn.Module | Selection):
            raise TypeError(f"LisaSchedule: model is {type(model).__name__}, expected a torch.nn.Module or a Selection")
        n_active = _check.positive("LisaSchedule", "n_active", n_active)
        self.every, self.seed = (
            _check.positive("LisaSchedule", "every", every),
            _check.integer("LisaSchedule", "seed", seed),
        )
        self.keep_state = keep_state
        selected = dict(model.named_parameters()) if isinstance(model, Selection) else None
        self.model = model.model if isinstance(model, Selection) else model
        self._refuse_adapters("a model without: it trains the model itself, which is their base")
        if selected is None and selection_of(self.model) is not None:
            raise ValueError("LisaSchedule: model has a selection, expected that Selection, or a model without")
        prefixes = [f"{path}." for path in blocks_of("LisaSchedule", self.model, blocks)]
        members = dict(self.model.named_parameters()) if selected is None else selected
        found = [[p for name, p in members.items() if name.startswith(prefix)] for prefix in prefixes]
        self.blocks = [block for block in found if block]
        if n_active > len(self.blocks):
            raise ValueError(f"LisaSchedule: n_active is {n_active}, expected at most {len(self.blocks)} blocks")
        self.n_active, self.steps = n_active, 0
        self.active: tuple[int, ...] = ()
        if selected is None:
            self.always = self._ends(train_embeddings, train_head)
            self._entry: GradEntry | None = GradEntry(self.model)
        else:
            self.always = [p for name, p in selected.items() if not name.startswith(tuple(prefixes))]
            self._entry = None
        self._flags = {name: p.requires_grad for name, p in self.model.named_parameters()}
        self.model.requires_grad_(False)
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def parameters(self) -> list[nn.Parameter]:
        """All that is ever trained, for an optimizer."""
        return [p for block in self.blocks for p in block] + self.always

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> tuple[int, ...]:
        """Choose the blocks of the training step that comes next.

        Args:
            optimizer: The optimizer, whose state of blocks that come to rest is dropped (unless ``keep_state``).

        Returns:
            The numbers of the blocks that train in it.

        Raises:
            ValueError: Adapters have been attached since.
        """
        self._refuse_adapters("a model without; detach them first")
        active = self.drawn(self.steps)
        if active != self.active:
            self._activate(active, optimizer)
        self.steps += 1
        return active

    def drawn(self, step: int) -> tuple[int, ...]:
        """The numbers of the blocks that train in a step.

        Args:
            step: The step's number, counted from 0.
        """
        draw = random.Random(f"{self.seed} {step // self.every}")
        return tuple(sorted(draw.sample(range(len(self.blocks)), self.n_active)))

    def state_dict(self) -> dict:
        """What a resumed run needs: how many steps have been begun."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Go on where another run stopped.

        Args:
            state: What its ``state_dict`` gave.
        """
        self.steps = state["steps"]

    def close(self) -> None:
        """Give every parameter the requires_grad it had.

        Raises:
            ValueError: Adapters have been attached since; nothing has been changed then.
        """
        self._refuse_adapters("a model without; detach them first")
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._flags.get(name, parameter.requires_grad))
        if self._entry is not None:
            self._entry.remove()

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        """transformers' callback: the Trainer counts the steps, so that resuming needs nothing else.

        Args:
            args: The Trainer's arguments, which are not read.
            state: Its state, with ``global_step``.
            control: What is given back.
            optimizer: Its optimizer.
            _: What else a callback is given.
        """
        self.steps = state.global_step
        self.step(optimizer)
        return control

    def __getattr__(self, name):
        if name.startswith("on_"):  # the other events of a TrainerCallback
            return lambda args, state, control, **_: control
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _refuse_adapters(self, expected: str) -> None:
        for path, module in self.model.named_modules():
            if attachment_of(module) is not None:
                raise ValueError(f"LisaSchedule: {path or 'the model'} has adapters, expected {expected}")

    def _activate(self, active: tuple[int, ...], optimizer) -> None:
        for number, block in enumerate(self.blocks):
            for parameter in block:
                parameter.requires_grad_(number in active)
                if number in active:
                    continue
                parameter.grad = None  # or the optimizer would go on updating it
                if optimizer is not None and not self.keep_state:
                    optimizer.state.pop(parameter, None)
        self.active = active

    def _ends(self, train_embeddings: bool, train_head: bool) -> list[nn.Parameter]:
        found: list[nn.Parameter] = []
        for wanted, ask in ((train_embeddings, input_embeddings), (train_head, output_embeddings)):
            module = ask(self.model) if wanted else None
            found += [] if module is None else module.parameters()
        return list(dict.fromkeys(found))
