"""Experts that a bank can adapt: a slot of theirs is an adapter and an expert together.

Each adapted parameter of an experts module is a layer of the bank with ``slots · E`` matrices, those of one adapter
side by side. While a batch runs, a row (a token and one of its experts) uses the matrix of its token's adapter and its
own expert, so adapters of different ranks stand in one batch, and each row is computed as it would be alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...methods.lora.config import Lora
from ...methods.lora.experts import adapted_experts, keys_of
from ...nn.experts_call import ExpertsCall, by_expert, choices, fused_call, layout_of, own
from ...nn.experts_weights import sizes, swapped
from ...ops.experts_slots import experts_with_slots
from ...ops.routing import Routing
from .batch import Batch, Running
from .columns import Columns
from .sites import Site


class ExpertSite(Site):
    """One weight of an experts module.

    Attributes:
        experts: how many there are. turned: A and B change places, since PEFT has them the other way round.
        lora_a, lora_b: ``[slots, E, R, K]`` and ``[slots, E, N, R]``, or None before an adapter needs them.
    """

    embedding, plain_linear, factor = False, False, 1.0

    def __init__(self, index: int, path: str, module: Any, parameter: str, dtype: torch.dtype | None):
        self.index, self.path, self.module = index, f"{path}.{parameter}", module
        weight = own(module, parameter)
        self.experts, self.stored_in, self.stored_out = sizes(module, parameter)
        layout: Any = layout_of(module)
        self.turned = swapped(module, parameter) == layout.transposed
        sides = self.stored_in, self.stored_out
        self.in_features, self.out_features = sides[::-1] if self.turned else sides
        self.dtype: torch.dtype = dtype or weight.dtype
        self.device: torch.device = weight.device
        self.lora_a = self.lora_b = self.ranks = self.scales = None
        self.gains, self.biases = Columns(), Columns()  # which stay empty

    def attach(self, running: Running) -> None:
        """Nothing: ``ExpertsForward`` stands for the module's forward."""

    def detach(self) -> None:
        """Let the tables go."""
        self.lora_a = self.lora_b = self.ranks = self.scales = None

    def shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B in a checkpoint of rank r."""
        return (self.experts * r, self.stored_in), (self.stored_out, r * self.experts)

    def stacked(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A checkpoint's tensors as ``[E, r, K]`` and ``[E, N, r]``."""
        a, b = by_expert(a.contiguous(), b.contiguous(), self.experts)
        return (b.mT, a.mT) if self.turned else (a, b)

    def make_tables(self, slots: int, rank: int) -> None:
        """Allocate the slots; what no adapter has written is never read."""
        of = {"dtype": self.dtype, "device": self.device}
        lora_a = torch.empty(slots, self.experts, rank, self.in_features, **of)  # type: ignore[call-overload]
        self.lora_b = torch.empty(slots, self.experts, self.out_features, rank, **of)  # type: ignore[call-overload]
        self.lora_a = lora_a

    def slot_bytes(self, rank: int) -> int:
        """What one slot of the tables takes."""
        return self.experts * super().slot_bytes(rank)

    def write(self, slot: int, a: Tensor, b: Tensor) -> None:
        """Copy an adapter's tensors into a slot."""
        lora_a, lora_b, *_ = super().tables()
        r = b.shape[2]
        lora_a[slot, :, :r].copy_(a, non_blocking=True)
        lora_b[slot, :, :, :r].copy_(b, non_blocking=True)

    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B, scales and ranks of all adapters' experts."""
        lora_a, lora_b, *numbers = super().tables()
        scales, ranks = (table.repeat_interleave(self.experts) for table in numbers)
        return lora_a.flatten(0, 1), lora_b.flatten(0, 1), scales, ranks

    def add(self, y: Tensor, x: Tensor, routing: Routing, batch: Batch) -> None:
        """``y += S Bᵀ`` for each row of the batch whose adapter has something here, in place."""
        if not self._idle(batch):
            lora_a, lora_b, scales, ranks = self.tables()
            ops.multi_lora_(y, x, lora_a, lora_b, routing, scales, ranks)


class ExpertsForward:
    """Stands for the forward of an experts module while a bank is attached.

    Args:
        module: The experts module.
        sites: Of its first and its second projection; None for one that the bank leaves alone.
        running: What the current thread runs.
    """

    def __init__(self, module: Any, sites: Mapping[str, ExpertSite], running: Running):
        self.module, self.sites, self.running = module, sites, running
        self.before = module.__dict__.get("forward")
        module.forward = self

    def __deepcopy__(self, memo: dict) -> Any:
        # A copy of the model has no bank: its module's own forward, which is looked up on the copy.
        return _Own(memo.get(id(self.module)), self.before)

    def detach(self) -> None:
        """Put the module's forward back."""
        self.module.__dict__.pop("forward", None)
        if self.before is not None:
            self.module.forward = self.before

    def base(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own forward."""
        return self.before(*args, **kwargs) if self.before else type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, x: Tensor, *args: Tensor) -> Tensor:
        batch = self.running.batch
        if batch is None or all(site._idle(batch) for site in self.sites.values()):
            return self.base(x, *args)
        found = fused_call(self.module, {})
        if not isinstance(found, ExpertsCall):
            raise RuntimeError(f"AdapterBank: {found}, expected experts that fastpeft.ops.experts serves")
        tokens, index, weights = choices(found, x, *args)
        copies = len(found.up.weight) if found.llama4 else 1
        slots = batch.token_slots(torch.Size([len(tokens) // copies])).repeat(copies)

        def add(side: str, y: Tensor, h: Tensor, routing: Routing) -> None:
            if side in self.sites:
                self.sites[side].add(y, h, routing, batch)

        return experts_with_slots(tokens, index, weights, *found[:3], slots, batch.slot_count, add)


class _Own:
    """The forward of a copied module."""

    def __init__(self, module: Any, before: Any):
        self.module, self.before = module, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.before(*args, **kwargs) if self.before else type(self.module).forward(self.module, *args, **kwargs)


def expert_sites(
    op: str, model: nn.Module, targets: str | Sequence[str], dtype: torch.dtype | None
) -> list[ExpertSite]:
    """Every weight of experts that a bank can adapt and that ``targets`` means, in the model's order."""
    sites: list[ExpertSite] = []
    for path, parameters in adapted_experts(op, model, Lora(targets=targets), strict=False).items():
        module, layout = model.get_submodule(path), layout_of(model.get_submodule(path))
        for parameter in parameters:
            if not isinstance(layout, str) and parameter in (layout.up, layout.down):
                sites.append(ExpertSite(len(sites), path, module, parameter, dtype))
    return sites


def attach_experts(sites: Sequence[Site], running: Running) -> list[ExpertsForward]:
    """Replace the forward of the modules that these are the weights of."""
    by_module: dict[Any, dict[str, ExpertSite]] = {}
    for site in sites:
        if isinstance(site, ExpertSite):
            layout: Any = layout_of(site.module)
            side = "up" if site.path.endswith(f".{layout.up}") else "down"
            by_module.setdefault(site.module, {})[side] = site
    return [ExpertsForward(module, of, running) for module, of in by_module.items()]


def by_parameter(model: nn.Module, lora: Lora, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """A checkpoint's tensors with the paths of parameters for the nest that PEFT keeps them in; and those paths."""
    adapted = adapted_experts("load", model, lora, strict=False)
    nested = dict(_nested(adapted))
    found = {}
    for key, tensor in tensors.items():
        path, _, end = key.rpartition(".lora_")
        found[f"{nested[path]}.lora_{end}" if path in nested else key] = tensor
    return found, set(nested.values())


def _nested(adapted: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    for path, parameters in adapted.items():
        for parameter, key in keys_of(path, parameters).items():
            yield key, f"{path}.{parameter}"
