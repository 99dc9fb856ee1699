"""PEFT's ``adapter_config.json`` to and from ``Lora``. Fields that mean something we do not do are refused by name."""

import re
from collections.abc import Sequence

from ..lora.config import BIASES, Lora
from ..targets import ALL_LINEAR
from .peft_files import Unserved

# Fields of PEFT's config that are ours, by our name.
_FIELDS = {
    "r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "layers_pattern": "layers_pattern",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "bias": "bias",
    "lora_bias": "lora_bias",
    "modules_to_save": "modules_to_save",
}
_PARAMETERS = "target_parameters"  # of experts, for PEFT since 0.17
_REQUIRED = ("peft_type", "r", "target_modules")
# Fields that do not change what a trained adapter computes, or that the model itself tells (fan_in_fan_out).
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
_INITS = {"kaiming": True, "gaussian": "gaussian", "random": False}
FRESH_INITS = tuple(_INITS.values())
# These start A and B differently but leave the frozen weights alone, so a trained adapter is an ordinary one.
_PLAIN_INITS = (*FRESH_INITS, None, "orthogonal", "eva")
_CONVERTED = ("pissa", "olora", "corda", "lora_ga")  # of which PEFT can write the difference from the start


def to_peft(
    config: Lora,
    linears: Sequence[str],
    paths: Sequence[str],
    fan_in_fan_out: bool,
    base_model: str | None,
    parameters: Sequence[str] = (),
) -> dict:
    """The fields of PEFT's LoraConfig for ``config``.

    ``parameters`` are those of experts, by PEFT's names. PEFT refuses dropout beside them, so none is written.

    "all-linear" and ``layers`` become the paths of the adapted layers, ``linears``: which layers the former means, and
    which paths the latter finds, has changed between versions of PEFT. ``paths`` are those of all modules.
    """
    fields = {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    if config.targets == ALL_LINEAR or config.layers is not None:
        fields.update(target_modules=_exactly(linears, paths), layers_to_transform=None, layers_pattern=None)
    fields.update(
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        modules_to_save=fields["modules_to_save"] or None,
        # PEFT refuses lora_bias beside "gaussian"; how a trained adapter once started does not matter.
        init_lora_weights=True if config.lora_bias else _INITS[config.init],
        fan_in_fan_out=fan_in_fan_out,
        peft_type="LORA",
        base_model_name_or_path=base_model,
        inference_mode=True,
        task_type=None,
    )
    if parameters:  # targets may mean these too, which PEFT would not find among modules
        fields.update({_PARAMETERS: list(parameters), "lora_dropout": 0.0, "target_modules": _exactly(linears, paths)})
    return dict(sorted(fields.items()))


def _exactly(linears: Sequence[str], paths: Sequence[str]) -> list[str] | str:
    """The paths, or a regular expression for them where PEFT would take one for the end of another module's."""
    ends, adapted = tuple(f".{path}" for path in linears), set(linears)
    if any(path.endswith(ends) and path not in adapted for path in paths):
        return f"({'|'.join(map(re.escape, sorted(linears)))})"
    return sorted(linears)


def from_peft(op: str, fields: object, source: str = "adapter_config.json") -> Lora:
    """The config that PEFT's fields describe.

    Args:
        op: The function to name in errors.
        fields: As ``adapter_config.json`` holds them.
        source: What errors say that has them.

    Raises:
        ValueError: not a LoRA config of PEFT, or a field asks for what is not served here (variants but DoRA, ...).
    """
    if isinstance(fields, dict) and fields.get(_PARAMETERS) and fields.get("target_modules") is None:
        fields = {**fields, "target_modules": []}
    if not isinstance(fields, dict) or any(fields.get(name) is None for name in _REQUIRED):
        raise ValueError(f"{op}: {source} is no LoRA config, expected the fields {', '.join(_REQUIRED)}")
    if fields["peft_type"] != "LORA":
        raise ValueError(f"{op}: {source} has peft_type={fields['peft_type']!r}, expected 'LORA'")
    for name, value in fields.items():
        if value and name not in _FIELDS and name not in _WITHOUT_EFFECT and name != _PARAMETERS:
            raise Unserved(f"{op}: {source} has {name}={value!r}, which is not served")
    init = fields.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        advice = ""
        if str(init).startswith(_CONVERTED):
            advice = "; PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) writes it as plain LoRA"
        raise Unserved(f"{op}: {source} has init_lora_weights={init!r}, which changes the frozen weights{advice}")
    settings = {ours: fields[theirs] for theirs, ours in _FIELDS.items() if fields.get(theirs) is not None}
    if settings.get("bias", "none") not in BIASES:
        raise ValueError(f"{op}: {source} has bias={settings['bias']!r}, expected one of {', '.join(BIASES)}")
    targets = settings.get("targets")
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        settings["targets"] = ALL_LINEAR
    for name in ("exclude", "layers_pattern", "layers"):
        if name in settings and settings[name] in ("", []):
            del settings[name]
    known = {value: name for name, value in _INITS.items()}
    return Lora(**settings, init=known.get(init, "kaiming"), experts=fields.get(_PARAMETERS) or False)
