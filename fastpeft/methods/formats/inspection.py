"""What a checkpoint is, without a model: its method, size, modules, what serves it, what is wrong with it."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..bottleneck.config import Bottleneck
from ..bottleneck.files import PEFT_TYPE, own_config
from ..selective.files import tokens_beside_lora
from .adapterhub_format import from_hub
from .peft_files import CONFIG, PICKLED, PREFIX, WEIGHTS
from .verdict import Verdict, examine


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
        problems: what is wrong, one line each. notes: what a user should know and nothing refuses.
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
    notes: list[str] = field(default_factory=list)

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
            *([("notes", "\n            ".join(self.notes))] if self.notes else []),
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
    verdict = examine("inspect", directory, unpickle=True)
    fields, tensors = verdict.fields, verdict.tensors
    found = Inspection(directory, verdict.format, "unknown", served="nothing here")
    found.problems, found.notes = verdict.problems, verdict.notes
    if verdict.pickled and not verdict.faults:
        found.problems.append(f"its weights are pickled ({PICKLED}); fastpeft convert writes {WEIGHTS}")
    if verdict.format == "unknown":
        return found
    hub = verdict.format == "AdapterHub"
    found.base = str((fields.get("model_name") if hub else fields.get("base_model_name_or_path")) or "")
    if fields.get("peft_type") == "LORA":
        _lora(found, fields, tensors)
    elif (hub or fields["peft_type"] == PEFT_TYPE) and not verdict.unserved:
        _bottleneck(found, fields, tensors)
    else:
        _other(found, verdict)
    if verdict.unserved:
        found.served = "nothing here; PEFT itself" if verdict.format == "PEFT" else "nothing here"
    found.parameters = sum(tensor.numel() for tensor in tensors.values())
    found.nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    found.dtypes = tuple(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()))
    return found


def _lora(found: Inspection, fields: Mapping, tensors: Mapping[str, Tensor]) -> None:
    ends = (".lora_A.weight", ".lora_embedding_A")
    kind = "LoRA with DoRA" if fields.get("use_dora") else "LoRA"
    found.method = (
        f"{kind}, r={fields.get('r')}, alpha={fields.get('lora_alpha')}, dropout={fields.get('lora_dropout')}"
    )
    found.modules = _count(key.removesuffix(end) for key in tensors for end in ends if key.endswith(end))
    if fields.get("target_parameters"):
        found.method += f", on parameters {', '.join(sorted(fields['target_parameters']))}"
    if tokens_beside_lora(fields) is not None:
        found.method += " and token rows"
    experts = ", and experts" if fields.get("target_parameters") else ""
    op = "dora_linear" if fields.get("use_dora") else "lora_linear"
    found.served = f"fastpeft.load and fastpeft serve: the fused ops {op} and multi_lora{experts}"


def _bottleneck(found: Inspection, fields: Mapping, tensors: Mapping[str, Tensor]) -> None:
    own = fields.get("peft_type") == PEFT_TYPE
    found.method = "bottleneck adapters"
    try:
        config = own_config("inspect", fields) if own else from_hub("inspect", fields)
    except (ValueError, TypeError):  # which is among the problems
        return
    downs = {}
    for key, tensor in tensors.items():
        if tensor.dim() == 2 and (key.endswith(".down_weight") or ".adapter_down." in key):
            downs[key.removesuffix(".down_weight") if own else key.partition(".adapters.")[0]] = tensor
    sizes = sorted({tensor.shape[0] for tensor in downs.values()})
    found.method = f"bottleneck adapters, {' and '.join(map(str, sizes)) or 'no'} wide, {_form(config)}"
    found.modules = _count(downs)
    extra = "" if not (config.gating or config.norm_after) else ", then its gate or norm in PyTorch"
    found.served = f"fastpeft.load: the fused op bottleneck{extra}"


def _other(found: Inspection, verdict: Verdict) -> None:
    length = verdict.fields.get("num_virtual_tokens")
    found.method = verdict.kind + (f", {length} virtual tokens" if length else "")
    found.modules = _count(key.removeprefix(PREFIX).rpartition(".")[0] for key in verdict.tensors if "." in key)
    if verdict.method is not None:
        found.served = f"fastpeft.load: {verdict.method.title}"


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
