"""An adapter in host memory, read from a PEFT checkpoint. Everything is checked here, before a bank changes."""

import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ... import _check
from ...methods.carried import plain_key
from ...methods.formats.files import read_safetensors
from ...methods.formats.peft_files import warn_of_another_base, weights_of, without_prefix
from ...methods.formats.peft_format import from_peft
from ...methods.formats.verdict import examine
from ...methods.lora.config import Lora
from ...methods.lora.experts_apart import stacked
from ...methods.targets import ALL_LINEAR, names
from ...nn.slot_rank import slot_rank
from ..errors import BadCheckpoint
from .columns import taken
from .dora import folded
from .experts import ExpertSite, by_parameter
from .sites import Site, unserved_reason

_KEY = re.compile(r"(?P<path>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")
_SHOWN = 6

Source = str | os.PathLike[str] | Mapping[str, Tensor]
Fields = Lora | Mapping[str, object]


class Adapter:
    """One adapter's tensors on the host, and where it stands in the bank.

    Attributes:
        name: as it was loaded.
        sites: the layers that it adapts.
        tensors: for each of them ``A [r, K]`` and ``B [N, r]``, an embedding's A is ``[V, r]``; or None where they were
            let go and can be read again. bytes: that they take.
        reread: reads ``tensors`` again, or None where they came from no folder.
        ranks: int32, one for each layer of the bank; 0 where the adapter has nothing. On a CPU they are rounded up, and
            the tensors padded with zeros.
        scales: float32, likewise.
        slot: of the device, or None.
        leases: how many batches and requests hold it.
        used: when, for the order of eviction.
        pinned: whether it stays in its slot.
        retired: whether it was unloaded or replaced while it was held.
        ready: the event after which its slot can be read, or None.
        gains: of DoRA, for each layer float32 ``[N]``: by how much more the base's product counts. They stay.
        biases: for each layer float32 ``[N]``: scale · bias of B. They stay.
        version: a number of its own, larger than that of every adapter that was read before it.
    """

    _numbers = itertools.count(1)

    def __init__(self, name: str, tensors: dict[Site, tuple[Tensor, Tensor]], ranks: Tensor, scales: Tensor):
        self.name, self.ranks, self.scales = name, ranks, scales
        self.sites = tuple(tensors)
        self.tensors: Mapping[Site, tuple[Tensor, Tensor]] | None = tensors
        self.bytes = sum(t.nbytes for pair in tensors.values() for t in pair)
        self.reread: Callable[[], Mapping[Site, tuple[Tensor, Tensor]]] | None = None
        self.gains: Mapping[Site, Tensor] = {}
        self.biases: Mapping[Site, Tensor] = {}
        self.slot: int | None = None
        self.leases = self.used = 0
        self.pinned = self.retired = False
        self.ready: torch.cuda.Event | None = None
        self.version = next(self._numbers)

    def read(self) -> Mapping[Site, tuple[Tensor, Tensor]]:
        """Its tensors, which are read again if they were let go.

        Raises:
            BadCheckpoint: its files have changed since. OSError: they are gone.
        """
        if self.tensors is None:
            if self.reread is None:
                raise RuntimeError(f"AdapterBank: {self.name!r} has no tensors, expected those it was loaded with")
            self.tensors = self.reread()
        return self.tensors

    def in_slot(self) -> int:
        """Its slot, where it must have one."""
        if self.slot is None:
            raise RuntimeError(f"AdapterBank: {self.name!r} is in no slot, expected one that was brought into a slot")
        return self.slot


def read_adapter(
    op: str, name: str, source: Source, config: object, model: nn.Module, sites: Sequence[Site], max_rank: int
) -> Adapter:
    """Read and check a folder, or a state dict with its config.

    Raises:
        BadCheckpoint: why it cannot be served. FileNotFoundError: a file is missing. TypeError: source or config is of
            another kind.
    """
    fields = None if config is None else _fields(op, config)
    if not isinstance(source, str | os.PathLike | Mapping):
        raise TypeError(f"{op}: source is {_check.shown(source)}, expected a folder or a state dict")
    if fields is None and isinstance(source, Mapping):
        raise TypeError(f"{op}: config is None, expected adapter_config.json's fields beside a state dict")
    try:
        lora, tensors = stacked(op, model, *_read(op, name, source, fields, model))
    except (ValueError, TypeError) as error:
        raise BadCheckpoint(str(error)) from None
    if lora.bias != "none":
        raise BadCheckpoint(f"{op}: {name!r} has bias={lora.bias!r}, expected no trained biases of the model's layers")
    if lora.modules_to_save:
        raise BadCheckpoint(f"{op}: {name!r} has modules_to_save={list(lora.modules_to_save)}, which are not served")
    magnitudes = taken(tensors, ".lora_magnitude_vector")
    b_biases = taken(tensors, ".lora_B.bias") if lora.lora_bias else {}
    tensors, parameters = by_parameter(model, lora, tensors)
    pairs = _pairs(op, name, model, {site.path: site for site in sites}, tensors)
    _check_pairs(op, name, lora, sites, pairs, max_rank, parameters)
    pin = sites[0].device.type == "cuda"
    on_cpu = sites[0].device.type == "cpu"
    ranks, scales = torch.zeros(len(sites), dtype=torch.int32), torch.zeros(len(sites))
    host: dict[Site, tuple[Tensor, Tensor]] = {}
    gains: dict[Site, Tensor] = {}
    biases: dict[Site, Tensor] = {}
    for site, (a, b) in pairs.items():
        r = lora.rank_of(site.path)
        scale = lora.alpha_of(site.path) / (math.sqrt(r) if lora.rslora else r) * site.factor
        if lora.dora:
            b, gains[site] = folded(op, name, site, a, b, magnitudes.get(site.path), scale)
        if lora.lora_bias:
            biases[site] = _bias(op, name, site, b_biases.pop(site.path, None), scale)
        if isinstance(site, ExpertSite):
            (a, b), served = site.stacked(a, b), r
        else:
            served = slot_rank(r, max_rank, on_cpu)
        a, b = pad(a, (0, 0, 0, served - r)), pad(b, (0, served - r))
        host[site] = _host(op, name, site, a.T if site.embedding else a, pin), _host(op, name, site, b, pin)
        ranks[site.index] = served
        if not abs(scale) <= torch.finfo(torch.float32).max:
            raise BadCheckpoint(f"{op}: {name!r} has scale {scale} at {site.path}, expected a number of float32")
        scales[site.index] = scale
    if b_biases:
        raise BadCheckpoint(f"{op}: {name!r} has a lora_bias without A and B of {_some(b_biases)}")
    made = Adapter(name, host, ranks.pin_memory() if pin else ranks, scales.pin_memory() if pin else scales)
    made.gains, made.biases = (
        {site: row.pin_memory() if pin else row for site, row in rows.items()} for rows in (gains, biases)
    )
    return made


def _read(
    op: str, name: str, source: Source, fields: Fields | None, model: nn.Module
) -> tuple[Lora, dict[str, Tensor]]:
    """Config and tensors by the names of the model's modules, of what is whole and is LoRA."""
    given = None
    if isinstance(source, Mapping):
        directory, given = Path("source"), _tensors(op, source)
    else:
        directory = Path(source)
        if not directory.is_dir():
            raise FileNotFoundError(f"{op}: source {str(source)!r} is no folder")
    if isinstance(fields, Lora):
        tensors = given if given is not None else read_safetensors(op, weights_of(op, directory))
        return fields, without_prefix(op, directory, tensors)
    verdict = examine(op, directory, fields, given)
    verdict.refuse()
    if verdict.fields.get("peft_type") != "LORA":
        raise ValueError(f"{op}: {name!r} is {verdict.kind}, which a bank does not serve, expected LoRA")
    warn_of_another_base(op, model, [verdict.fields])
    lora = from_peft(op, verdict.fields)  # which refuses token rows beside it
    return lora, without_prefix(op, directory, verdict.tensors)


def _tensors(op: str, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wrong = next((key for key, value in source.items() if not isinstance(value, Tensor)), None)
    if wrong is not None:
        raise ValueError(f"{op}: source has {_check.shown(source[wrong])} under {wrong!r}, expected tensors")
    return dict(source)


def _fields(op: str, config: Any) -> Fields:
    if isinstance(config, Lora):
        return config
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(fields, Mapping):
        raise TypeError(f"{op}: config is {_check.shown(config)}, expected a dict or peft.LoraConfig")
    return {key: list(value) if isinstance(value, set) else value for key, value in fields.items()}


def _pairs(
    op: str, name: str, model: nn.Module, sites: Mapping[str, Site], tensors: Mapping[str, Tensor]
) -> dict[Site, tuple[Tensor, Tensor]]:
    """A and B of each layer; anything else is refused, but for the model's own embeddings, which PEFT saves."""
    modules = dict(model.named_modules())
    found: dict[Site, dict[str, Tensor]] = {}
    foreign, unserved = [], []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            if not _same_as_model(modules, key, tensor):
                unserved.append(f"{key}, which {_meaning(key)}")
        elif match["path"] not in modules and not _is_parameter(modules, match["path"]):
            foreign.append(match["path"])
        elif match["path"] not in sites:
            reason = unserved_reason(match["path"], modules) if match["path"] in modules else None
            reason = reason or "not among the bank's targets"
            unserved.append(f"{match['path']}, which is {reason}")
        elif sites[match["path"]].embedding != (match["embedding"] is not None):
            unserved.append(f"{key}, but the layer is a {type(sites[match['path']].module).__name__}")
        else:
            found.setdefault(sites[match["path"]], {})[match["embedding"] or match["linear"]] = tensor
    if foreign:
        raise BadCheckpoint(
            f"{op}: {name!r} is for another model: {type(model).__name__} has no {_some(dict.fromkeys(foreign))}"
        )
    if unserved:
        raise BadCheckpoint(f"{op}: {name!r} has {_some(dict.fromkeys(unserved))}")
    halves = [site.path for site, pair in found.items() if len(pair) < 2]
    if halves:
        raise BadCheckpoint(f"{op}: {name!r} has A without B, or B without A, of {_some(halves)}")
    return {site: (pair["A"], pair["B"]) for site, pair in found.items()}


def _is_parameter(modules: Mapping[str, nn.Module], path: str) -> bool:
    module, _, name = path.rpartition(".")
    return module in modules and name in modules[module]._parameters


def _same_as_model(modules: Mapping[str, nn.Module], key: str, tensor: Tensor) -> bool:
    # PEFT saves the frozen weight of an embedding or a head beside its LoRA.
    weight = getattr(modules.get(plain_key(key).removesuffix(".weight")), "weight", None)
    if not key.endswith(".weight") or not isinstance(weight, Tensor) or weight.shape != tensor.shape:
        return False
    return torch.equal(tensor.to(weight.device, weight.dtype), weight.detach())


def _meaning(key: str) -> str:
    if key.endswith(".bias"):
        return "is a trained bias, which is not served"
    return "is no LoRA weight (modules_to_save, a changed embedding or another variant), which is not served"


def _check_pairs(
    op: str,
    name: str,
    lora: Lora,
    sites: Sequence[Site],
    pairs: Mapping[Site, tuple[Tensor, Tensor]],
    max_rank: int,
    parameters: set[str],
) -> None:
    missing, problems = [], []
    for site in sites:
        meant = site.plain_linear if lora.targets == ALL_LINEAR else True
        if site not in pairs:
            wanted = site.path in parameters if isinstance(site, ExpertSite) else meant and names(site.path, lora)
            missing += [site.path] if wanted else []
            continue
        (a, b), r = pairs[site], lora.rank_of(site.path)
        if r > max_rank:
            problems.append(f"rank {r} at {site.path}, expected at most the bank's max_rank={max_rank}")
        for part, tensor, shape in zip("AB", (a, b), site.shapes(r), strict=True):
            if tuple(tensor.shape) != shape:
                problems.append(f"{part} {list(tensor.shape)} at {site.path}, expected {list(shape)}")
            elif not tensor.is_floating_point():
                problems.append(f"{part} of {tensor.dtype} at {site.path}, expected floating point")
    if missing:
        raise BadCheckpoint(f"{op}: {name!r} has no weights for {_some(missing)}, which its config names")
    if problems:
        raise BadCheckpoint(f"{op}: {name!r} has {_some(problems)}")


def _bias(op: str, name: str, site: Site, bias: Tensor | None, scale: float) -> Tensor:
    """What the bias of B adds to each of a layer's outputs, in float32 or wider."""
    if bias is None or bias.shape != (site.out_features,):
        found = "none" if bias is None else list(bias.shape)
        raise BadCheckpoint(f"{op}: {name!r} has the lora_bias {found} at {site.path}, expected [{site.out_features}]")
    added = scale * bias.detach().to("cpu", torch.promote_types(site.dtype, torch.float32))
    if not torch.isfinite(added).all():
        raise BadCheckpoint(f"{op}: {name!r} has a lora_bias at {site.path} that is not finite")
    return added


def _host(op: str, name: str, site: Site, tensor: Tensor, pin: bool) -> Tensor:
    """A copy of its own, in the bank's dtype; finite, which a large value in float16 is not."""
    copy = torch.empty(tensor.shape, dtype=site.dtype, pin_memory=pin).copy_(tensor.detach())
    if not torch.isfinite(copy).all():
        raise BadCheckpoint(f"{op}: {name!r} has values at {site.path} that are not finite in {site.dtype}")
    return copy


def _some(names: Iterable[str]) -> str:
    items = list(names)
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
