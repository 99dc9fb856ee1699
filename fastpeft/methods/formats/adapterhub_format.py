"""AdapterHub's checkpoints of bottleneck adapters to and from ours: ``adapter_config.json`` and its keys.

    <holder>.adapters.<name>.adapter_down.0.weight     the holder is a module of AdapterHub's library (``Site.hub``)

With a norm before, that norm is ``adapter_down.0`` as well as ``adapter_norm_before`` and the projection moves to
``adapter_down.1``, so it is found by its shape.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..bottleneck.config import PRESETS, Bottleneck
from ..bottleneck.sites import Site
from .peft_files import Unserved

VERSION = "adapters.1.3.0"  # the version whose format this is; older ones name activations otherwise
_PLACES = {"attention": "mh_adapter", "mlp": "output_adapter", "cross": "cross_adapter"}
# Fields that mean the same there, by our name.
_FIELDS = {
    "reduction_factor": "reduction_factor",
    "non_linearity": "activation",
    "original_ln_before": "original_norm_before",
    "original_ln_after": "original_norm_after",
    "residual_before_ln": "residual_before_norm",
    "ln_after": "norm_after",
    "adapter_residual_before_ln": "residual_first",
    "is_parallel": "parallel",
    "scaling": "scale",
    "use_gating": "gating",
    "dropout": "dropout",
    "stochastic_depth": "stochastic_depth",
    "init_weights": "init",
    "leave_out": "leave_out",
}
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
    "silu": "silu",
    "tanh": "tanh",
    "leakyrelu": "leaky_relu",
    "linear": "identity",
}
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
_INITS = {"bert": "bert", "mam_adapter": "mam", "houlsby": "houlsby"}
# Of Compacter's layers and of initialisation: without effect where there is no phm_layer.
_WITHOUT_EFFECT = re.compile(
    r"phm_\w+|\w+_phm\w*|hypercomplex_nonlinearity|init_weights_seed|inv_adapter\w*|architecture"
)
_PARTS = {
    "up_weight": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
    "norm_weight": "adapter_norm_before.weight",
    "norm_bias": "adapter_norm_before.bias",
    "norm_after_weight": "adapter_norm_after.weight",
    "norm_after_bias": "adapter_norm_after.bias",
    "gate_weight": "gate.weight",
    "gate_bias": "gate.bias",
    "scale": "scaling",
}
_KEY = re.compile(r"(?P<holder>.*)\.adapters\.(?P<name>[^.]+)\.(?P<part>.*)")


def why_not(config: Bottleneck, sites: Sequence[Site]) -> str | None:
    """Why this adapter cannot be written in AdapterHub's format, or None."""
    if config.targets is not None:
        return "its targets are a rule, AdapterHub has attention, mlp and cross only"
    if config.norm == "rms":
        return "norm='rms', AdapterHub has LayerNorm only"
    homeless = next((site.path for site in sites if site.hub is None), None)
    if homeless is not None:
        return f"AdapterHub has no adapters at {homeless}"
    widths = {site.features for site in sites}
    if config.size is not None and any(int(width // _factor(width, config.size)) != config.size for width in widths):
        return f"no reduction_factor gives size={config.size} at width {', '.join(map(str, widths))}"
    return None


def to_hub(config: Bottleneck, sites: Sequence[Site], model: nn.Module, name: str) -> dict:
    """The fields of ``adapter_config.json``."""
    inner = {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
    inner.update((theirs, place in (config.places or ())) for place, theirs in _PLACES.items())
    if config.size is not None:
        inner["reduction_factor"] = _factor(sites[0].features, config.size)
    elif isinstance(config.reduction_factor, Mapping):
        inner["reduction_factor"] = {str(key): value for key, value in config.reduction_factor.items()}
    inner.update(
        non_linearity=next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation),
        init_weights=next(theirs for theirs, ours in _INITS.items() if ours == config.init),
        scaling=config.scale if isinstance(config.scale, str) else float(config.scale or 0),
        leave_out=list(config.leave_out),
        ln_before=config.norm == "layer",
        phm_layer=False,
        inv_adapter=None,
        inv_adapter_reduction_factor=None,
    )
    outer = getattr(model, "config", None)
    return {
        "config": dict(sorted(inner.items())),
        "hidden_size": getattr(outer, "hidden_size", sites[0].features),
        "model_class": type(model).__name__,
        "model_name": getattr(model, "name_or_path", None) or "",
        "model_type": getattr(outer, "model_type", None),
        "name": name,
        "version": VERSION,
    }


def from_hub(op: str, fields: Mapping) -> Bottleneck:
    """The config that AdapterHub's fields describe.

    Raises:
        ValueError: no bottleneck adapter, or one with a part that is not served here, named.
    """
    inner = fields.get("config")
    if isinstance(inner, str) and inner in PRESETS:
        return Bottleneck(inner)
    if not isinstance(inner, Mapping):
        raise ValueError(f"{op}: adapter_config.json has config={inner!r}, expected the fields of a bottleneck adapter")
    kind = inner.get("architecture")
    if kind or "reduction_factor" not in inner:
        raise Unserved(
            f"{op}: adapter_config.json is AdapterHub's of a {kind or 'unknown'} adapter, expected a bottleneck adapter"
        )
    for field, what in (("phm_layer", "Compacter"), ("inv_adapter", "an invertible adapter")):
        if inner.get(field):
            raise Unserved(
                f"{op}: adapter_config.json has {field}={inner[field]!r}: {what} is not served by attach; load it with "
                "the adapters library and call fastpeft.accelerate"
            )
    known = {*_FIELDS, *_PLACES.values(), "ln_before", "phm_layer", "inv_adapter"}
    for field, value in inner.items():
        if value and field not in known and not _WITHOUT_EFFECT.fullmatch(field):
            raise Unserved(f"{op}: adapter_config.json has {field}={value!r}, which is not served")
    settings = {ours: inner[theirs] for theirs, ours in _FIELDS.items() if inner.get(theirs) is not None}
    activation = str(inner.get("non_linearity")).lower()
    activation = activation if "version" in fields else _OLD_ACTIVATIONS.get(activation, activation)
    for field, ours, value, table in (
        ("non_linearity", "activation", activation, _ACTIVATIONS),
        ("init_weights", "init", inner.get("init_weights", "bert"), _INITS),
    ):
        if value not in table:
            raise Unserved(f"{op}: adapter_config.json has {field}={value!r}, expected one of {', '.join(table)}")
        settings[ours] = table[value]
    places = tuple(place for place, field in _PLACES.items() if inner.get(field))
    return Bottleneck(**settings, places=places, norm="layer" if inner.get("ln_before") else None)


def keys_to_hub(tensors: Mapping[str, Tensor], sites: Sequence[Site], name: str) -> dict[str, Tensor]:
    """The tensors of ``BottleneckMethod.parameters`` by AdapterHub's keys; the norm before is there twice."""
    found = {}
    for site in sites:
        own = {key.removeprefix(f"{site.path}."): key for key in tensors if key.startswith(f"{site.path}.")}
        down = 1 if "norm_weight" in own else 0
        parts = {**_PARTS, "down_weight": f"adapter_down.{down}.weight", "down_bias": f"adapter_down.{down}.bias"}
        for part, key in own.items():
            found[f"{site.hub}.adapters.{name}.{parts[part]}"] = tensors[key]
        for kind in ("weight", "bias") if down else ():
            found[f"{site.hub}.adapters.{name}.adapter_down.0.{kind}"] = tensors[own[f"norm_{kind}"]].clone()
    return found


def keys_from_hub(
    tensors: Mapping[str, Tensor], sites: Sequence[Site], prefix: str, name: str | None
) -> dict[str, Tensor]:
    """The reverse. A key without a place among the sites stays as it is, for the comparison to name.

    Args:
        prefix: of the base model in models with a head: a file of one may be read into the other.
        name: of the adapter in the file; None is whichever is there.
    """
    homes = {}
    for site in sites:
        if site.hub is not None:
            other = site.hub.removeprefix(f"{prefix}.") if site.hub.startswith(f"{prefix}.") else f"{prefix}.{site.hub}"
            homes.update({site.hub: site, **({other: site} if prefix else {})})
    ours = {theirs: part for part, theirs in _PARTS.items()}
    found = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        home = homes.get(match["holder"]) if match and name in (None, match["name"]) else None
        part = ours.get(match["part"]) if match else None
        if match and re.fullmatch(r"adapter_down\.[01]\.(weight|bias)", match["part"]):
            kind = match["part"].rpartition(".")[2]
            weight = tensors.get(key.removesuffix(kind) + "weight")
            if weight is not None and weight.dim() != 2 and home is not None:
                continue  # the norm before, which has a name of its own too
            part = f"down_{kind}"
        found[key if home is None or part is None else f"{home.path}.{part}"] = tensor
    return found


def _factor(features: int, size: int) -> float:
    """A reduction factor r with ``int(features // r) == size``."""
    factor = features / size
    if int(features // factor) != size:
        factor = features / (size + 0.5)
    return int(factor) if factor == int(factor) else factor
