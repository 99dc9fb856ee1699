"""pytest plugin: our layers in every LoRA model that PEFT's tests make, and every call compared with PEFT's layer.

FASTPEFT_SUITE is vanilla (nothing of ours), register (every LoraConfig) or accelerate (after every injection).
FASTPEFT_SUITE_OUT is the folder that is written to.
"""

import os

import torch
from comparison import WRONG, Comparisons
from hub_models import stand_in_models
from outcomes import pytest_runtest_logreport, stand_in, write_outcomes

_MODE = os.environ["FASTPEFT_SUITE"]
_COMPARED = Comparisons()

__all__ = ["pytest_runtest_logreport"]


def pytest_configure(config):
    stand_in("diffusers", "datasets")
    stand_in_models()
    if _MODE != "vanilla":
        _fuse_everywhere()


def pytest_sessionfinish(session):
    _COMPARED.write()
    write_outcomes(session)


def _fuse_everywhere():
    from peft import LoraConfig
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTuner

    import fastpeft
    from fastpeft.integrations import _fusable
    from fastpeft.integrations.peft import FastLoraLinear

    complete, inject = LoraConfig.__post_init__, BaseTuner.inject_adapter
    plan, forward = _fusable.plan, FastLoraLinear.forward

    def registered(self):
        complete(self)
        fastpeft.register(self)

    def injected(self, model, *args, **kwargs):
        done = inject(self, model, *args, **kwargs)
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            fastpeft.accelerate(model)
        return done

    def counted(layer, x=None):
        made = plan(layer, x)
        if x is not None and not _COMPARED.busy:
            _COMPARED.counts["fused" if isinstance(made, list) else made] += 1
        if WRONG != 1 and _COMPARED.busy and isinstance(made, list):
            made[:] = [branch._replace(lora_a=branch.lora_a * WRONG) for branch in made]
        return made

    def compared(self, x, *args, **kwargs):
        y = forward(self, x, *args, **kwargs)
        if not (args or kwargs or _COMPARED.busy or torch.compiler.is_compiling()) and isinstance(x, torch.Tensor):
            _COMPARED.busy = True
            try:
                made = plan(self, x)
                if isinstance(made, list) and x.numel() and not x.is_meta:
                    _compare(self, x, made, forward)
            finally:
                _COMPARED.busy = False
        return y

    if _MODE == "register":
        LoraConfig.__post_init__ = registered
    else:
        BaseTuner.inject_adapter = injected
    _fusable.plan, FastLoraLinear.forward = counted, compared
    _watch_experts()


def _watch_experts():
    """Every call of experts that is fused is counted, and computed by PEFT's wrapper before, which touches weights."""
    from fastpeft.integrations import _experts
    from fastpeft.integrations.peft import FastParamWrapper, ParamWrapper
    from fastpeft.nn.experts_call import ExpertsCall

    forward = FastParamWrapper.forward

    def compared(self, x, *args, **kwargs):
        found = None if kwargs or torch.compiler.is_compiling() else _experts.plan(self, x, *args)
        if not isinstance(found, ExpertsCall):
            return forward(self, x, *args, **kwargs)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            theirs = ParamWrapper.forward(self, x, *args)
        y = forward(self, x, *args)
        _COMPARED.counts["fused experts"] += 1
        _compare_experts(found, y, theirs)
        return y

    FastParamWrapper.forward = compared


def _compare_experts(found, y, theirs):
    """The bound is that of sums in any order, as many roundings as the two projections have terms."""
    low = [linear.lora_a.shape[1] for linear in (found.up, found.down) if linear.lora_a is not None]
    terms = sum(found.up.weight.shape[1:]) + sum(found.down.weight.shape[1:]) + sum(low)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else y.dtype  # theirs may be in it
    limit = 2 * terms * torch.finfo(dtype).eps * theirs.abs().max().clamp(min=1e-30)
    ratio = ((y.detach() - theirs).abs().max() / limit).item() if y.numel() else 0.0
    _COMPARED.counts["compared"] += 1
    _COMPARED.worst = max(_COMPARED.worst, ratio)
    if not ratio <= 1:
        what = os.environ.get("PYTEST_CURRENT_TEST", "")
        _COMPARED.problems.append(f"{what}: experts differ by {ratio:.2g} times the bound")


def _compare(layer, x, branches, forward):
    """With dropout off, since masks are drawn apart, and B where it is zero made random."""
    from peft.tuners.lora.layer import Linear

    from fastpeft.integrations._dora import Dora
    from fastpeft.nn.sharing import SharedInput
    from fastpeft.reference import dora_linear

    active = [name for name in layer.active_adapters if name in layer.lora_A]
    modules = [module for name in active for module in (layer.lora_A[name], layer.lora_B[name])]
    places = [(module, key) for module in modules for key in ("weight", "bias") if getattr(module, key) is not None]
    base = layer.base_layer
    dora = isinstance(branches, Dora)
    places += [(layer.lora_magnitude_vector[active[0]], "weight")] if dora else []
    places += [(base, "bias")] if base.bias is not None and base.bias.requires_grad else []
    kept = [getattr(module, key) for module, key in places]
    if not all(isinstance(value, torch.nn.Parameter) for value in kept):
        _COMPARED.counts["not compared: FSDP has put views in place of parameters"] += 1
        return
    drops = [(module, module.training) for module in layer.lora_dropout.modules()]
    group, rounds = layer.fastpeft_shared, None
    if group is not None:
        rounds = SharedInput(group.members)
        rounds._parts = list(group._parts)
    values = [_nonzero(value.detach()) for value in kept]
    frozen = layer.training

    def run(function):
        def computed(leaves):
            for (module, key), leaf in zip(places, leaves[1:], strict=True):
                module._parameters[key] = leaf
            return function(leaves[0])

        return computed

    def formula(leaves, sign):
        at = dict(zip([(id(module), key) for module, key in places], leaves[1:], strict=True))
        weight = sign(branches[0].weight.detach().double())
        bias = at.get(
            (id(base), "bias"), None if branches[0].bias is None else sign(branches[0].bias.detach().double())
        )
        y = torch.nn.functional.linear(leaves[0], weight, bias)
        for name, branch in zip(active, branches, strict=True):
            down, up = layer.lora_A[name], layer.lora_B[name]
            term = leaves[0] @ at[id(down), "weight"].T @ at[id(up), "weight"].T
            lora_bias = at.get((id(up), "bias"))
            y = y + sign(torch.tensor(float(branch.scale))) * (term if lora_bias is None else term + lora_bias)
        return y

    def truth(leaves):
        """Of DoRA, which is no sum of products."""
        (branch,), (x, a, b, *rest) = branches, leaves
        bias = rest[1] if len(rest) > 1 else None if branch.bias is None else branch.bias.detach().double()
        return dora_linear(x, branch.weight.detach().double(), a, b, rest[0], bias, float(branch.scale))

    n, k = branches[0].weight.shape
    length = k + n + x.numel() // max(k, 1) + sum(branch.lora_a.shape[0] for branch in branches) + 8
    try:
        for module, _ in drops:
            module.training = False
        layer.__dict__["fastpeft_shared"] = rounds
        with torch.inference_mode(False):
            own = run(lambda x: Linear.forward(layer, x))
            fused = run(lambda x: forward(layer, x))
            what = os.environ.get("PYTEST_CURRENT_TEST", "")
            given = (None, truth) if dora else (formula,)
            _COMPARED.compare(what, fused, own, [x, *values], length, *given)
            _COMPARED.counts["compared, DoRA"] += dora
            if rounds is not None and rounds.rounds:
                _COMPARED.counts["compared through siblings"] += 1
    finally:
        layer.__dict__.pop("fastpeft_shared", None)
        if group is not None:
            layer.__dict__["fastpeft_shared"] = group
        for (module, key), value in zip(places, kept, strict=True):
            module._parameters[key] = value
        for module, mode in drops:
            module.training = mode
        assert layer.training == frozen


def _nonzero(value):
    generator = torch.Generator().manual_seed(1)
    return value if value.any() else (torch.randn(value.shape, generator=generator) / 4).to(value)
