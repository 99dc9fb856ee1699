"""Attach adapters of one or several methods to a model in place, and take them off.

Whatever can be wrong is found before the model is touched: all configs are resolved, then all are applied, and if one
of them fails the others are taken back. What was changed is noted in an ``Attachment`` on the model, so that ``detach``
leaves the very modules, values and requires_grad flags that were there. What a method has to offer: ``method.Method``.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..nn.adapter import adapter_name
from .attachment import KEY, Attachment, attachment_of, holder_of, state_of
from .carried import put_carried
from .claims import Claims, refuse_shared
from .formats.peft_configs import is_peft_config, translated
from .method import Method
from .originals import disabled, lifted
from .placement import model_inside
from .pretrained import forget_quantisation, put_up, take_down
from .reentrant import close_checkpoints, open_checkpoints
from .registry import METHODS, mergeable_of, method_of, methods_of
from .resizing import unwatch_sizes, watch_sizes
from .switch import refuse_merged, set_adapter

Plans = list[tuple[Method, Any]]
Flags = list[tuple[nn.Parameter, bool]]


def attach(model: nn.Module, config: Any | Sequence[Any], name: str = "default") -> nn.Module:
    """Adapt ``model`` as the config says, in place, and freeze the rest.

    The first adapter is active; another name adds a second adapter, inactive until ``set_adapter``. Of a wrapper of
    ``torch.compile`` or DataParallel it is the model inside that is adapted.

    Args:
        model: Any module; a model that has adapters already gets another one.
        config: What to do: ``fastpeft.Lora`` or one of its siblings, or a config of PEFT that means one of these
            (``peft.LoraConfig``, ``PromptTuningConfig``, ``PrefixTuningConfig``, ``LNTuningConfig``,
            ``TrainableTokensConfig``). A list of several kinds that act together is one adapter:
            ``[fastpeft.Lora(r=8), fastpeft.Bottleneck("seq_bn")]``.
        name: The adapter's name, for ``set_adapter``, ``save`` and ``load``.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is no module, ``config`` no config, or a layer that was named cannot be adapted.
        ValueError: The config means nothing in this model, or does not go with what is attached already, or with a
            wrapper that takes no more parameters (DistributedDataParallel, FSDP), or weights have no values; the error
            names what is wrong. Nothing has been changed then.
    """
    inner = model_inside("attach", model)
    configs: list[Any] = []
    for part in config if isinstance(config, list | tuple) else (config,):
        configs += translated("attach", inner, part) if is_peft_config(part) else [part]
    apply_all(inner, configs, name, resolve_all("attach", inner, configs, name))
    return model


def resolve_all(op: str, model: nn.Module, configs: Sequence[Any], name: str, strict: bool = True) -> Plans:
    """A plan for each config, or an error; the model is not touched."""
    methods = [method_of(op, config) for config in configs]
    if not methods:
        raise ValueError(f"{op}: config is an empty list, expected at least one config")
    twice = next((method for method in methods if methods.count(method) > 1), None)
    if twice is not None:
        raise ValueError(f"{op}: config has {twice.title} twice, expected a name for each: call attach again")
    adapter_name(op, name)
    state = attachment_of(model)
    if state is not None:
        if name in state.configs:
            raise ValueError(f"{op}: adapter {name!r} is attached already")
        refuse_merged(op, model, state)
    with disabled(model):
        plans = [(m, m.resolve(op, model, config, name, strict)) for m, config in zip(methods, configs, strict=True)]
        refuse_shared(op, {method.title: method.claims(model, plan) for method, plan in plans})
    for path, module in model.named_modules():
        if module is not model and attachment_of(module) is not None:
            raise ValueError(f"{op}: {path} has adapters of its own, expected a model without")
    return plans


def apply_all(model: nn.Module, configs: Sequence[Any], name: str, plans: Plans) -> None:
    """Attach what has been resolved; if that fails, the model is as it was before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    state, first = attachment_of(model), attachment_of(model) is None
    if state is None:
        state = Attachment(flags={n: p.requires_grad for n, p in model.named_parameters()})
        setattr(model, KEY, state)
        put_up(model)
        open_checkpoints(model)
        watch_sizes(model)
        model.requires_grad_(False)
    state.configs[name] = configs[0] if len(configs) == 1 else tuple(configs)
    try:
        with lifted(model):
            try:
                state.claims[name] = Claims().union(*(method.claims(model, plan) for method, plan in plans))
                for method, plan in sorted(plans, key=lambda pair: METHODS.index(pair[0])):
                    if method.name not in state.records:
                        state.records[method.name] = method.record_type()
                    method.apply(model, plan, name)
            except BaseException:
                _discard(model, name)  # before anything settles on what is half there
                raise
        if first:
            set_adapter(model, name)
        else:
            _set_flags(flags)
    except BaseException:
        take_back(model, name, flags)
        raise


def take_back(model: nn.Module, name: str, flags: Flags) -> None:
    """Take one inactive adapter off, if it is there, and give parameters these flags."""
    state = attachment_of(model)
    if state is not None and name in state.configs:
        with lifted(model):
            _discard(model, name)
    _set_flags(flags)


def _discard(model: nn.Module, name: str) -> None:
    """Take one inactive adapter off, whole or half applied, while everything is lifted."""
    state = state_of(model)
    parts = [method_of("attach", config) for config in state.parts(name)]
    for method in reversed(methods_of(state)):
        if method in parts:
            method.discard(model, name)
            if len(method.configs(model)) == 1:
                del state.records[method.name]
    del state.configs[name]
    state.carried.pop(name, None)
    state.claims.pop(name, None)
    if not state.configs:
        take_down(model)
        close_checkpoints(model)
        unwatch_sizes(model)
        delattr(model, KEY)


def _set_flags(flags: Flags) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Take one adapter off for good; the others, and which of them act and train, stay as they are.

    Where it was the only active one, the model computes as before it was attached to until ``set_adapter`` says
    otherwise. Where it was the only one, this is ``detach``.

    Args:
        model: A model that adapters are attached to, or a wrapper around it.
        name: The adapter's name.

    Raises:
        ValueError: There is no such adapter, or the adapters are merged. Nothing has been changed then.
    """
    holder, state = holder_of("delete_adapter", model)
    state.check_known("delete_adapter", name)
    refuse_merged("delete_adapter", holder, state)
    if len(state.configs) == 1:
        detach(holder)
        return
    before = {parameter: parameter.requires_grad for parameter in holder.parameters()}
    set_adapter(holder, [other for other in state.active if other != name])
    # Of what acts without it, that trains which trained before.
    flags = [(parameter, parameter.requires_grad and before.get(parameter, False)) for parameter in holder.parameters()]
    take_back(holder, name, flags)


def detach(model: nn.Module, keep_merged: bool = False) -> nn.Module:
    """Take every adapter off again: the original modules, values and requires_grad flags, bit for bit.

    Args:
        model: A model that adapters are attached to, or a wrapper around it.
        keep_merged: Whether to leave the adapters' contribution in the weights of a merged model, and to let the
            originals go.

    Returns:
        The same model.

    Raises:
        ValueError: Nothing is attached to the model, or ``keep_merged`` is asked of a model that is not merged.
    """
    holder, state = holder_of("detach", model)
    methods = methods_of(state)
    if keep_merged and not any(method.merged(holder) for method in mergeable_of(state)):
        raise ValueError("detach: keep_merged on a model that is not merged; merge it first")
    if not keep_merged:  # what is merged was merged into what the active adapters brought
        for mergeable in mergeable_of(state):
            mergeable.unmerge(holder)
        put_carried(holder, state, ())
    for method in methods:
        method.lift(holder)
    if keep_merged:
        forget_quantisation(holder)
    for method in reversed(methods):
        method.remove(holder, keep_merged)
    take_down(holder)
    close_checkpoints(holder)
    unwatch_sizes(holder)
    delattr(holder, KEY)
    for name, parameter in holder.named_parameters():
        parameter.requires_grad_(state.flags.get(name, parameter.requires_grad))
    return model
