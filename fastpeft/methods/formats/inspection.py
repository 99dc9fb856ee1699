"""What a checkpoint is, without a model: its method, size, modules, what serves it, what is wrong with it."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..bottleneck.config import Bottleneck
from ..bottleneck.files import PEFT_TYPE, own_config
from ..registry import METHODS
from ..selective.files import tokens_beside_lora
from .adapterhub_files import read_hub_tensors
from .adapterhub_format import from_hub
from .files import read_safetensors
from .peft_files import CONFIG, PREFIX, WEIGHTS, read_config
from .peft_format import from_peft


@dataclass
class Inspection:
    """One checkpoint.

    Attributes:
        directory: where it lies. format: "PEFT", "AdapterHub" or "fastpeft".
        method: what it is, with its rank or width.
        base: the model that it is for, as far as it says.
        modules: (last part of a path, how many such modules it adapts).
        parameters: how many numbers; dtypes: of its tensors; nbytes: of their values.
        served: what reads and computes it here.
        problems: what is wrong, one line each.
    """

    directory: Path
    format: str
    method: str
    base: str = ""
    modules: list[tuple[str, int]] = field(default_factory=list)
    parameters: int = 0
    dtypes: tuple[str, ...] = ()
    nbytes: int = 0
    served: str = ""
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        size = f"{self.parameters:,} ({', '.join(self.dtypes) or 'none'}, {self.nbytes / 2**20:.1f} MiB)"
        modules = ", ".join(f"{name} ({count})" for name, count in self.modules)
        rows = [
            ("checkpoint", str(self.directory)),
            ("format", self.format),
            ("method", self.method),
            ("base model", self.base or "not named"),
            ("modules", f"{sum(count for _, count in self.modules)}: {modules}" if self.modules else "none"),
            ("parameters", size),
            ("served by", self.served),
            ("problems", "\n            ".join(self.problems) or "none"),
        ]
        return "\n".join(f"{name:10}  {value}" for name, value in rows)


def inspect_checkpoints(directory: str | os.PathLike) -> list[Inspection]:
    """Each checkpoint in the directory: itself, or its sub-folders'.

    Raises:
        FileNotFoundError: no checkpoint is there. ValueError: a config that is no JSON.
    """
    directory = Path(directory)
    folders = [directory] if (directory / CONFIG).is_file() else []
    if not folders and directory.is_dir():
        folders = sorted(folder.parent for folder in directory.glob(f"*/{CONFIG}"))
    if not folders:
        raise FileNotFoundError(f"inspect: {directory} has no {CONFIG}, nor has a folder in it")
    return [_inspect(folder) for folder in folders]


def _inspect(directory: Path) -> Inspection:
    fields = read_config("inspect", directory)
    if not isinstance(fields, dict) or not {"peft_type", "config"} & fields.keys():
        given = Inspection(directory, "unknown", "unknown", served="nothing")
        given.problems.append(f"{CONFIG} is neither PEFT's (peft_type) nor AdapterHub's (config)")
        return given
    hub = "peft_type" not in fields
    own = not hub and str(fields["peft_type"]).startswith("FASTPEFT")
    found = Inspection(directory, "AdapterHub" if hub else "fastpeft" if own else "PEFT", "")
    found.base = str((fields.get("model_name") if hub else fields.get("base_model_name_or_path")) or "")
    tensors = _tensors(directory, hub, found.problems)
    _describe(found, fields, tensors)
    found.parameters = sum(tensor.numel() for tensor in tensors.values())
    found.nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    found.dtypes = tuple(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()))
    bad = [key for key, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    found.problems += [f"{key} has values that are not finite" for key in bad[:8]]
    return found


def _tensors(directory: Path, hub: bool, problems: list[str]) -> dict[str, Tensor]:
    try:
        if hub:
            return read_hub_tensors("inspect", directory)
        if not (directory / WEIGHTS).is_file() and (directory / "adapter_model.bin").is_file():
            problems.append(f"its weights are pickled (adapter_model.bin); fastpeft convert writes {WEIGHTS}")
            return torch.load(directory / "adapter_model.bin", map_location="cpu", weights_only=True)
        return read_safetensors("inspect", directory / WEIGHTS)
    except Exception as error:  # whatever is wrong with a file is what was asked for
        problems.append(str(error).removeprefix("inspect: ").splitlines()[0])
        return {}


def _describe(found: Inspection, fields: Mapping, tensors: Mapping[str, Tensor]) -> None:
    try:
        if fields.get("peft_type") == "LORA":
            _lora(found, fields, tensors)
        elif "peft_type" not in fields or fields["peft_type"] == PEFT_TYPE:
            _bottleneck(found, fields, tensors)
        else:
            _other(found, fields, tensors)
    except (ValueError, TypeError) as error:
        found.method = found.method or _kind(fields)
        found.served = found.served or "nothing here"
        found.problems.append(str(error).removeprefix("inspect: "))


def _lora(found: Inspection, fields: Mapping, tensors: Mapping[str, Tensor]) -> None:
    downs = {key: t for key, t in tensors.items() if key.endswith(".lora_A.weight")}
    found.method = f"LoRA, r={fields.get('r')}, alpha={fields.get('lora_alpha')}, dropout={fields.get('lora_dropout')}"
    found.modules = _count(key.removesuffix(".lora_A.weight") for key in downs)
    for key, down in downs.items():
        up = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if up is None:
            found.problems.append(f"{key} has no lora_B beside it")
        elif up.shape[-1] != down.shape[0]:
            found.problems.append(f"{key} has {down.shape[0]} rows, its lora_B {up.shape[-1]} columns")
    foreign = [key for key in tensors if not key.startswith(PREFIX)]
    found.problems += [f"{key} does not start with {PREFIX}" for key in foreign[:8]]
    tokens = tokens_beside_lora(fields)
    if tokens is not None:
        found.method += " and token rows"
    config = from_peft("inspect", fields if tokens is None else {**fields, "trainable_token_indices": None})
    for key, down in downs.items():
        path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        if down.shape[0] != config.rank_of(path):
            found.problems.append(f"{key} has rank {down.shape[0]}, the config says {config.rank_of(path)}")
    if downs and not any(t.any() for key, t in tensors.items() if key.endswith(".lora_B.weight")):
        found.problems.append("every lora_B is zero: it has not been trained and does nothing")
    found.served = "fastpeft.load and fastpeft serve: the fused ops lora_linear and multi_lora"


def _bottleneck(found: Inspection, fields: Mapping, tensors: Mapping[str, Tensor]) -> None:
    own = fields.get("peft_type") == PEFT_TYPE
    config = own_config("inspect", fields) if own else from_hub("inspect", fields)
    downs = {}
    for key, tensor in tensors.items():
        if tensor.dim() == 2 and (key.endswith(".down_weight") or ".adapter_down." in key):
            downs[key.removesuffix(".down_weight") if own else key.partition(".adapters.")[0]] = tensor
    sizes = sorted({tensor.shape[0] for tensor in downs.values()})
    found.method = f"bottleneck adapters, {' and '.join(map(str, sizes)) or 'no'} wide, {_form(config)}"
    found.modules = _count(downs)
    if not downs:
        found.problems.append("it holds no adapter")
    extra = "" if not (config.gating or config.norm_after) else ", then its gate or norm in PyTorch"
    found.served = f"fastpeft.load: the fused op bottleneck{extra}"


def _other(found: Inspection, fields: Mapping, tensors: Mapping[str, Tensor]) -> None:
    method = next((m for m in METHODS if m.files.recognises(fields)), None)
    length = fields.get("num_virtual_tokens")
    found.method = _kind(fields) + (f", {length} virtual tokens" if length else "")
    found.modules = _count(key.removeprefix(PREFIX).rpartition(".")[0] for key in tensors if "." in key)
    found.served = "nothing here; PEFT itself" if method is None else f"fastpeft.load: {method.title}"
    if method is None:
        found.problems.append(f"peft_type={fields['peft_type']!r} is not served")


def _kind(fields: Mapping) -> str:
    if "peft_type" in fields:
        return str(fields["peft_type"])
    inner = fields.get("config")
    kind = inner.get("architecture") if isinstance(inner, Mapping) else None
    phm = isinstance(inner, Mapping) and inner.get("phm_layer")
    return f"AdapterHub's {kind or ('Compacter' if phm else 'bottleneck')}"


def _form(config: Bottleneck) -> str:
    words = (
        ["beside" if config.parallel else "after", *(config.places or ())] if config.targets is None else ["by rule"]
    )
    details = [str(config.activation), f"scale {config.scale}"]
    details += [f"norm {config.norm}"] * (config.norm is not None) + ["norm after"] * config.norm_after
    return f"{' '.join(words)}; {', '.join(details + ['gate'] * config.gating)}"


def _count(paths) -> list[tuple[str, int]]:
    """How many modules of each name, most first; a number stands for the name before it."""
    names = []
    for path in paths:
        parts = [part for part in path.split(".") if not part.isdecimal()]
        names.append(parts[-1] if parts else path)
    return Counter(names).most_common()
