"""``fastpeft.select``: train chosen parts of a model itself, and nothing else."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from ..attachment import attachment_of
from ..formats.files import whole
from ..own import own_modules
from ..placement import model_inside
from . import files
from .change import Change
from .config import Ids, Selective
from .grad_entry import GradEntry
from .plan import Plan, is_norm, resolve

KEY = "fastpeft_selection"


@dataclass(frozen=True)
class Group:
    """One line of a selection's table."""

    name: str
    tensors: int
    parameters: int


class Selection:
    """What ``select`` trains on a model. Printing it gives a table; ``revert`` takes it back, bit for bit.

    Attributes:
        model: The model.
        plan: What is trained: names of parameters, new biases, slices of weights.
        notes: What a user should know, a sentence each (tied weights).
    """

    def __init__(self, model: nn.Module, plan: Plan):
        self.model, self.plan, self.notes = model, plan, tuple(plan.notes)
        self._flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        try:
            self._change = Change(model, plan)  # memory may run out here; nothing else has been changed yet
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self._flags[name])
        self._entry = GradEntry(model)
        model.requires_grad_(False)
        self._change.enter(model)
        self._change.train(model, True)
        model.__dict__[KEY] = self

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained: whole parameters by name; ``path.rows``, ``path.columns`` and ``path.tokens`` are slices.

        Raises:
            ValueError: The selection has been reverted.
        """
        self._check_alive("named_parameters")
        for name, parameter in self._change.parameters(self.model).items():  # parameters, since the change acts
            yield name, cast(nn.Parameter, parameter)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained, for an optimizer that is to treat all of it alike."""
        return (parameter for _, parameter in self.named_parameters())

    def param_groups(
        self, lr: float, norm_lr: float | None = None, bias_lr: float | None = None, weight_decay: float = 0.0
    ) -> list[dict]:
        """Parameter groups for an optimizer: weights, token rows, biases, norms.

        Args:
            lr: The learning rate of weights and token rows.
            norm_lr: The learning rate of normalisation layers; None is ``lr``.
            bias_lr: The learning rate of biases; None is ``lr``.
            weight_decay: The decay of weights, their rows and their columns; norms, biases and token rows do not decay.

        Returns:
            The groups that have parameters, each with "params", "lr", "weight_decay" and "name".
        """
        rates = {"weights": lr, "tokens": lr, "biases": lr if bias_lr is None else bias_lr}
        rates["norms"] = lr if norm_lr is None else norm_lr
        members: dict[str, list] = {kind: [] for kind in rates}
        modules = own_modules(self.model)
        norms = {path for path, module in modules.items() if is_norm(module)}
        tokens = {part.key for part in self.plan.slices if part.kind == "tokens"}
        for name, parameter in self.named_parameters():
            kind = "norms" if name.rpartition(".")[0] in norms else "biases" if parameter.dim() < 2 else "weights"
            members["tokens" if name in tokens else kind].append(parameter)
        return [
            {
                "params": found,
                "lr": rates[kind],
                "weight_decay": weight_decay if kind == "weights" else 0.0,
                "name": kind,
            }
            for kind, found in members.items()
            if found
        ]

    def revert(self) -> nn.Module:
        """Give the model back the values, modules and requires_grad flags it had, bit for bit; return it.

        Raises:
            ValueError: adapters have been attached since; nothing has been changed then.
        """
        self._check_alive("revert")
        since = any(attachment_of(module) is not None for module in self.model.modules())
        names = {name for name, _ in self.model.named_parameters()}
        if since or not names.issuperset(self._flags):  # the latter: to a model around this one
            raise ValueError("Selection: revert, but adapters have been attached since; detach them first")
        self._change.rest(self.model)
        self._change.leave(self.model)
        self._entry.remove()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._flags.get(name, parameter.requires_grad))
        del self.model.__dict__[KEY]
        return self.model

    def save(self, directory: str | os.PathLike) -> None:
        """Write what was trained, and nothing else; ``fastpeft.load_selective`` reads it.

        Chosen tokens alone, and whole norms alone, are written as PEFT writes them (TRAINABLE_TOKENS, LN_TUNING), so
        ``PeftModel.from_pretrained`` reads those too. Everything else is ``adapter_config.json`` with peft_type
        FASTPEFT_SELECTIVE beside ``adapter_model.safetensors``.

        Args:
            directory: The folder, which is made if it is not there.

        Raises:
            ValueError: The selection has been reverted, or its tensors have no values (meta).
            ImportError: safetensors is missing.
        """
        self._check_alive("save")
        tensors = {key: whole(tensor) for key, tensor in self._change.parameters(self.model).items()}
        files.write("save", self.model, self.plan, tensors, directory)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Tensors and parameters by what selected them."""
        kinds = dict(self.plan.whole) | {f"{path}.bias": "added biases" for path in self.plan.biases}
        kinds |= {part.key: part.kind for part in self.plan.slices}
        sizes: dict[str, list[int]] = {}
        for name, parameter in self.named_parameters():
            sizes.setdefault(kinds[name], []).append(parameter.numel())
        return tuple(Group(kind, len(found), sum(found)) for kind, found in sizes.items())

    def __str__(self) -> str:
        slices = {id(layer.trained) for layer in self._change.layers.values()}
        total = sum(p.numel() for p in self.model.parameters() if id(p) not in slices)
        rows = [*self.groups]
        rows.append(Group("total", sum(g.tensors for g in rows), sum(g.parameters for g in rows)))
        lines = [f"{'group':14} {'tensors':>8} {'parameters':>14} {'%':>8}"]
        for g in rows:
            lines.append(f"{g.name:14} {g.tensors:8} {g.parameters:14,} {100 * g.parameters / max(total, 1):8.3f}")
        return "\n".join([*lines, *self.notes])

    def __repr__(self) -> str:
        trained = sum(g.parameters for g in self.groups) if KEY in self.model.__dict__ else 0
        return f"Selection({type(self.model).__name__}, {trained:,} trained parameters)"

    def _check_alive(self, what: str) -> None:
        if selection_of(self.model) is not self:
            raise ValueError(f"Selection: {what} after revert")


def selection_of(model: nn.Module) -> Selection | None:
    """The selection that ``select`` made of this very model and that has not been reverted."""
    return model.__dict__.get(KEY)


def select(
    model: nn.Module,
    *,
    layers: str | int | Sequence[int | str] | None = None,
    params: str | Sequence[str] = (),
    modules: str | Sequence[str] = (),
    tokens: Ids | Mapping[str, Ids] = (),
    rows: Mapping[str, float | Ids] | None = None,
    columns: Mapping[str, float | Ids] | None = None,
    add_missing_bias: bool | Sequence[str] = False,
    blocks: str | None = None,
    seed: int = 0,
) -> Selection:
    """Train parts of ``model`` itself, in place, and freeze the rest.

    >>> selection = fastpeft.select(model, layers="last:2", params=["bias", "norm"], modules=["classifier"])
    >>> print(selection)
    >>> optimizer = torch.optim.AdamW(selection.param_groups(lr=1e-4, norm_lr=1e-3))

    Nothing below the lowest part that is trained takes part in backward, under gradient checkpointing too. With
    reentrant checkpoints in a loop of your own, pass the first trained block an input that requires a gradient, as
    PyTorch demands; for transformers models that is done here.

    Args:
        model: Any module without adapters and without another selection.
        layers: Blocks of the model's stack: "last:2", "first:2", "3:6" (half open), numbers, names, or a list of these.
            Alone it trains them whole; beside params, rows, columns or add_missing_bias it says where those apply.
        params: "bias", "norm", names of parameters, their ends, or regular expressions for whole names.
        modules: Paths or ends of paths of modules that are trained whole.
        tokens: Ids whose rows of the input embedding are trained, or a dict of such lists by path.
        rows: For linear layers, by end of path or regular expression, numbers of output features, or their fraction.
        columns: The same for input features.
        add_missing_bias: Whether linear layers without a bias get a trained one, or the paths of those that do.
        blocks: The path of the ModuleList that layers counts; None is the longest one of modules of one type.
        seed: The seed of the random choice of rows and columns.

    Returns:
        What is trained, for an optimizer; its ``revert`` gives the model back.

    Raises:
        TypeError: ``model`` is no module, or an argument has a type that it may not have (see ``fastpeft.Selective``).
        ValueError: Nothing is selected, or something that the model does not have, with near misses. Nothing has been
            changed then.
    """
    config = Selective(
        layers=layers,
        params=params,
        modules=modules,
        tokens=tokens,
        rows=rows,
        columns=columns,
        add_missing_bias=add_missing_bias,
        blocks=blocks,
        seed=seed,
    )
    return _select("select", model, config)


def _select(op: str, model: nn.Module, config: Selective) -> Selection:
    model = model_inside(op, model)
    for path, module in model.named_modules():
        if attachment_of(module) is not None:
            raise ValueError(f"{op}: {path or 'the model'} has adapters; give fastpeft.Selective to attach instead")
        if KEY in module.__dict__:
            raise ValueError(f"{op}: {path or 'the model'} has a selection already; revert it first")
    return Selection(model, resolve(op, model, config))


def load_selective(model: nn.Module, directory: str | os.PathLike) -> Selection:
    """Select what a checkpoint trained and give it the values it had: of ``Selection.save``, or of PEFT.

    PEFT's TRAINABLE_TOKENS and LN_TUNING are read too. Training can go on from there; ``revert`` takes it off again.

    Args:
        model: The model that the checkpoint is for, without adapters and without a selection.
        directory: The folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        What is trained, with the values of the checkpoint in the model.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is pickled, truncated or foreign, or is for another model, with the keys and shapes that
            differ. Nothing has been changed then.
        ImportError: safetensors is missing.
    """
    config, tensors = files.read("load_selective", model, directory)
    selection = _select("load_selective", model, config)
    try:
        files.fill("load_selective", directory, dict(selection.named_parameters()), tensors)
    except ValueError:
        selection.revert()
        raise
    return selection
