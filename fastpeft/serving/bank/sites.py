"""The layers of a model that a bank can adapt, each with its slots' tables, and what they do while a batch runs.

A layer keeps its module, class, parameters and names: only ``forward`` is replaced, on the instance. It calls the
layer's own forward and adds the rows' adapters to the result. Tables are made when the first adapter needs them.
"""

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ... import _check, ops
from ...methods.lora.config import Lora
from ...methods.targets import ALL_LINEAR, names
from ...nn.base_layer import is_conv1d
from ...nn.lora import LoraLinear
from ...nn.siblings import families
from ...ops.routing import Routing
from .batch import Batch, Running
from .columns import Columns
from .shared_input import Siblings, writable

_BYPASS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class Site:
    """One adapted layer.

    Attributes:
        lora_a, lora_b: ``[slots, R, K]`` and ``[slots, N, R]``, or None before an adapter needs them; an embedding's A
            is ``[slots, V, R]``. ranks, scales: ``[slots]``, rows of the bank's tables.
        gains: how much more than once the base's product counts, of DoRA. biases: scale · bias of B.
        mask: bit s: slot s has something for this layer.
        siblings: the group of layers that may receive the same tensor, or None.
    """

    mask = 0
    siblings: Siblings | None = None

    def __init__(self, index: int, path: str, module: nn.Module, dtype: torch.dtype | None, head: bool):
        self.index, self.path, self.module = index, path, module
        self.embedding = isinstance(module, nn.Embedding)
        self.plain_linear = not self.embedding and not head
        self.in_features, self.out_features = _sizes(module)
        weight = weight_of(module)
        own = weight.dtype if weight.dtype.is_floating_point else torch.get_default_dtype()
        self.dtype: torch.dtype = dtype or own
        self.device: torch.device = weight.device
        self.factor = float(getattr(module, "embed_scale", 1.0)) if self.embedding else 1.0
        self.lora_a: Tensor | None = None
        self.lora_b: Tensor | None = None
        self.ranks: Tensor | None = None
        self.scales: Tensor | None = None
        self.gains, self.biases = Columns(), Columns()

    def __getstate__(self):
        return {"module": self.module, "_own": self._own}

    def __setstate__(self, state):
        # In a copy of the model, which has no bank: the layer's own forward, on the copied module.
        self.__dict__.update(state, _running=Running())
        self.base = self._own or MethodType(type(self.module).forward, self.module)

    def attach(self, running: Running) -> None:
        """Replace the module's forward."""
        self._running = running
        self._own = self.module.__dict__.get("forward")
        self.base = self.module.forward
        self.module.forward = self._embed if self.embedding else self._forward

    def detach(self) -> None:
        """Put the module's forward back; the tables go."""
        self.module.__dict__.pop("forward", None)
        if self._own is not None:
            self.module.forward = self._own
        if self.siblings is not None:
            self.siblings.detach()
        self.lora_a = self.lora_b = self.ranks = self.scales = self.siblings = None
        self.gains, self.biases = Columns(), Columns()

    def make_tables(self, slots: int, rank: int) -> None:
        """Allocate the slots; what no adapter has written is never read."""
        # An embedding's A is looked up by token, and its S then meets B as any layer's x would meet B A.
        shape = (slots, self.in_features, rank) if self.embedding else (slots, rank, self.in_features)
        lora_a = torch.empty(shape, dtype=self.dtype, device=self.device)
        # On a CPU with what one rank adds side by side, which is then read as it is.
        sizes = (slots, rank, self.out_features) if self.device.type == "cpu" else (slots, self.out_features, rank)
        lora_b = torch.empty(sizes, dtype=self.dtype, device=self.device)
        self.lora_b = lora_b.mT if self.device.type == "cpu" else lora_b
        if self.embedding:
            self._eye = torch.eye(rank, dtype=self.dtype, device=self.device).expand(slots, rank, rank)
        self.lora_a = lora_a

    def make_columns(self, columns: Columns, slots: int) -> None:
        """Allocate gains or biases of all slots, unless they are there."""
        columns.make(slots, self.out_features, self.dtype, self.device)

    def slot_bytes(self, rank: int) -> int:
        """What one slot of the tables takes."""
        return rank * (self.in_features + self.out_features) * self.dtype.itemsize

    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B, scales and ranks of all slots, once an adapter has needed them."""
        if self.lora_a is None or self.lora_b is None or self.scales is None or self.ranks is None:
            raise RuntimeError(f"AdapterBank: {self.path} has no slots, expected an adapter that needs them")
        return self.lora_a, self.lora_b, self.scales, self.ranks

    def shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B in a checkpoint of rank r."""
        return (r, self.in_features), (self.out_features, r)

    def write(self, slot: int, a: Tensor, b: Tensor) -> None:
        """Copy an adapter's tensors into a slot."""
        lora_a, lora_b, *_ = self.tables()
        r = b.shape[1]
        if self.embedding:
            lora_a[slot, :, r:].zero_()
            lora_a[slot, :, :r].copy_(a, non_blocking=True)
        else:
            lora_a[slot, :r].copy_(a, non_blocking=True)
        lora_b[slot, :, :r].copy_(b, non_blocking=True)

    def _forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        batch = self._running.batch
        if batch is None or self._idle(batch):
            return self.base(x, *args, **kwargs)
        if self.siblings is not None and not args and not kwargs and self.siblings.shares(x):
            return self.siblings.forward(self, x, batch)
        y = self.called(batch, x, *args, **kwargs)
        self._add(y, x, batch.routing(x.shape[:-1]))
        return y

    def called(self, batch: Batch, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer gives by itself, with what the rows' adapters do to each of its outputs."""
        y = writable(self.base(x, *args, **kwargs))
        gain, added = self.gains.of(batch, y), self.biases.of(batch, y)
        if gain is not None:
            bias = getattr(self.module, "bias", None)
            y = y.addcmul_(y if bias is None else y - bias, gain)
        return y if added is None else y.add_(added)

    def _add(self, y: Tensor, x: Tensor, routing: Routing) -> None:
        lora_a, lora_b, scales, ranks = self.tables()
        ops.multi_lora_(y, x, lora_a, lora_b, routing, scales, ranks)

    def _idle(self, batch: Batch) -> bool:
        """Whether the batch's adapters leave this layer alone. A compiled graph is one for all adapters."""
        if batch.every or torch.compiler.is_compiling():
            return self.lora_a is None
        return not self.mask & batch.mask

    def _embed(self, ids: Tensor, *args, **kwargs) -> Tensor:
        batch = self._running.batch
        y = self.base(ids, *args, **kwargs)
        if batch is None or self._idle(batch):
            return y
        slots = batch.token_slots(ids.shape).clamp(min=0).long().view(ids.shape)
        lora_a, lora_b, scales, ranks = self.tables()
        s = nn.functional.embedding(ids + slots * self.in_features, lora_a.flatten(0, 1)).to(y.dtype)
        y = writable(y)
        ops.multi_lora_(y, s, self._eye, lora_b, batch.routing(ids.shape), scales, ranks)
        return y


def find_sites(
    op: str, model: nn.Module, targets: str | Sequence[str], dtype: torch.dtype | None, experts: Sequence[Site] = ()
) -> list[Site]:
    """Every layer of the model that can be adapted and that ``targets`` means, in the model's order, after ``experts``.

    Raises:
        ValueError: there is none, or they do not lie on one device.
    """
    config = Lora(targets=targets)  # which checks them
    modules, head = dict(model.named_modules()), _head(model)
    sites: list[Site] = list(experts)
    for path, module in modules.items():
        if path and unserved_reason(path, modules) is None and (targets == ALL_LINEAR or names(path, config)):
            sites.append(Site(len(sites), path, module, dtype, module is head))
    if not sites:
        given = f"targets is {_check.shown(targets)}, which matches no layer of {type(model).__name__}"
        raise ValueError(f"{op}: {given} that can be adapted")
    devices = {site.device for site in sites}
    if len(devices) > 1 or devices == {torch.device("meta")}:
        given = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{op}: model's layers are on {given}, expected one device that holds values")
    by_module = {site.module: site for site in sites[len(experts) :]}
    for caller, group in families(model, lambda module: module in by_module):
        members = [by_module[module] for module in group]
        if caller is not None and len(members) <= 4 and len({(m.dtype, m.in_features) for m in members}) == 1:
            together = Siblings(caller, members)
            for member in members:
                member.siblings = member.siblings or together
    return sites


def refuse_adapted(op: str, model: nn.Module) -> None:
    """A bank goes around a plain model: raises ValueError for another."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear) or (hasattr(module, "lora_A") and hasattr(module, "base_layer")):
            raise ValueError(f"{op}: {path} of model has adapters of its own, expected a model without")
        site = getattr(module.__dict__.get("forward"), "__self__", None)
        if isinstance(site, Site) and hasattr(site, "lora_a"):
            raise ValueError(f"{op}: model has a bank already (at {path}), expected a model without")


def unserved_reason(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Why the layer at ``path`` cannot be adapted, or None."""
    module, parents = modules[path], path.split(".")[:-1]
    if "experts" in parents:
        return "an expert, which sees tokens without their rows"
    if any(isinstance(modules[".".join(parents[: i + 1])], _BYPASS) for i in range(len(parents))):
        return "inside a PyTorch layer that may read its weight without calling it"
    if isinstance(module, nn.Embedding):
        return None if module.max_norm is None else "an embedding with max_norm"
    if isinstance(getattr(module, "weight", None), Tensor) and (isinstance(module, nn.Linear) or is_conv1d(module)):
        return None
    return f"a {type(module).__name__}"


def _sizes(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if is_conv1d(module):
        k, n = weight_of(module).shape
        return k, n
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    raise TypeError(f"AdapterBank: a layer is {_check.shown(module)}, expected a linear layer, Conv1D or an embedding")


def weight_of(module: nn.Module) -> Tensor:
    """Of a layer that ``unserved_reason`` has nothing against."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"AdapterBank: {type(module).__name__}.weight is {_check.shown(weight)}, expected a tensor")
    return weight


def _head(model: Any) -> nn.Module | None:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # what models without one raise
        return None
