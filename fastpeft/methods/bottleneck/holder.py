"""The adapters at one site and the hooks that call them; the modules of the model stay where they are.

What reaches an adapter, by the form that its config has at this site; h: what the sub-block adds, X: the stream that it
is added to, LN: the model's norm after that sum, z = LN(h + X) the layer's output without the adapter:

    output      h + u(h)                                        double_seq_bn; adapter_plus after a norm; any rule
    stream      h + u(h + X)                                    seq_bn and adapter_plus in models with norms before
    twice       h + X + u(h + X)                                seq_bn without residual_before_norm
    alone       the same less X, for a norm after the adapter and none of the model's
    parallel    h + u(X)                                        par_bn
    norm        LN(h + X + u(z))                                seq_bn in models with norms after (BERT)
    norm_twice  LN(z + X + u(z)),  norm_post_add  LN(h + 2 X + u(z)),  norm_parallel  LN(h + X + u(X))
"""

import threading
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...nn.bottleneck import BottleneckAdapter
from .config import Bottleneck
from .sites import Site

_CHILD, _TAP = "fastpeft_bottleneck", "fastpeft_tap"


class Tap(nn.Module):
    """A tensor that one module of a layer was given, for the hook of another; each thread has its own."""

    fastpeft_added = True

    def __init__(self):
        super().__init__()
        self.value: Tensor | None = None
        self.values: dict[int, Tensor] = {}

    def put(self, value: Tensor) -> None:
        if torch.compiler.is_compiling():
            self.value = value
        else:
            self.values[threading.get_ident()] = value

    def take(self) -> Tensor:
        if torch.compiler.is_compiling():
            value, self.value = self.value, None
        else:
            value = self.values.pop(threading.get_ident(), None)
        if value is None:
            raise RuntimeError(
                "bottleneck: the layer's norm was not called before its sub-block; detach and use targets"
            )
        return value


class Bottlenecks(nn.Module):
    """The named adapters at one site, of which some are active; they follow one another.

    Args:
        site: where. kind: "output", or "norm" for the parent of the model's norm (see ``form_at``).
    """

    fastpeft_added = True
    fastpeft_kind = BottleneckAdapter.fastpeft_kind

    def __init__(self, site: Site, kind: str):
        super().__init__()
        self.site, self.kind = site, kind
        self.adapters = nn.ModuleDict()
        self.forms: dict[str, str] = {}
        self.active: tuple[str, ...] = ()
        self.disabled = False
        self.tap = Tap() if self.tapped else None

    @property
    def path(self) -> str:
        """Of the module that is hooked."""
        return self.site.path if self.kind == "output" else str(self.site.norm).rpartition(".")[0]

    @property
    def tapped(self) -> str | None:
        """Path of the module whose first input is wanted: X where norms come before, h + X where they come after."""
        return self.site.stream if self.kind == "output" else self.site.norm

    def forward(self, x: Tensor) -> Tensor:
        """What an nn.Sequential that is hooked calls, since its children are its steps: nothing is done here."""
        return x

    def serve(self, module: nn.Module, args: tuple, kwargs: dict, output):
        """What the hooked module returns, after the active adapters."""
        if self.disabled or not self.active:
            return output
        tapped = None if self.tap is None else self.tap.take()
        h = output[0] if isinstance(output, tuple) else output
        if not isinstance(h, Tensor):
            raise TypeError(
                f"bottleneck: {self.path} returns {type(h).__name__}, expected a tensor or a tuple with one"
            )
        for name in self.active:
            adapter, form = self.adapters[name], self.forms[name]
            if self.kind == "norm":
                x = args[1] if len(args) > 1 else kwargs["input_tensor"]
                norm = getattr(module, str(self.site.norm).rpartition(".")[2])
                h, tapped = _around_norm(form, adapter, h, x, tapped, norm)
            else:
                x = tapped
                if x is None and form == "parallel":
                    x = args[0] if args else next(iter(kwargs.values()))
                h = _after_output(form, adapter, h, x)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def put_up(self, model: nn.Module) -> None:
        """Hook the modules that stand at the paths now."""
        module = model.get_submodule(self.path)
        module.add_module(_CHILD, self)
        module.register_forward_hook(_after, with_kwargs=True)
        if self.tap is not None and self.tapped is not None:
            norm = model.get_submodule(self.tapped)
            norm.add_module(_TAP, self.tap)
            norm.register_forward_pre_hook(_before, with_kwargs=True)

    def take_down(self, model: nn.Module) -> None:
        """Undo ``put_up``."""
        _release(model.get_submodule(self.path), _CHILD)
        if self.tap is not None and self.tapped is not None:
            _release(model.get_submodule(self.tapped), _TAP)

    def fastpeft_report(self) -> str:
        """``"fused"``, or why not."""
        if self.disabled or not self.active:
            return "disabled" if self.disabled else "no active adapter"
        reasons = [adapter.fastpeft_report() for adapter in self._acting()]
        return next((reason for reason in reasons if reason != "fused"), "fused")

    def fastpeft_backend(self) -> str:
        """The backend for an x of one row and the first active adapter."""
        return self._acting()[0].fastpeft_backend()

    def _acting(self) -> list[BottleneckAdapter]:
        return [cast(BottleneckAdapter, self.adapters[name]) for name in self.active]


def form_at(site: Site, config: Bottleneck) -> tuple[str, str]:
    """(kind of holder, form) of this config's adapters at a site."""
    first = config.norm_after and config.residual_first
    if site.place == "rule":
        return "output", "parallel" if config.parallel else "output"
    if site.norm is None:
        if config.parallel:
            return "output", "parallel"
        if not config.original_norm_before:
            return "output", "output"
        if config.original_norm_after:
            return "output", "twice" if config.residual_before_norm is False else "stream"
        return "output", "alone" if first else "stream"
    if config.parallel:
        return "norm", "norm_parallel"
    if not config.original_norm_before:
        return "output", "output"
    if not config.original_norm_after:
        return "norm", "output"
    if config.residual_before_norm is False:
        return "norm", "norm_twice"
    if config.residual_before_norm == "post_add":
        return "norm", "norm_post_add"
    return "norm", "norm_first" if first else "norm"


def _after_output(form: str, adapter: nn.Module, h: Tensor, x: Any) -> Tensor:
    if form == "output":
        return adapter(h, h)
    if form == "parallel":
        return adapter(x, _like(h, x))
    z = h + x
    if form == "stream":
        return adapter(z, _like(h, z))
    y = adapter(z, z)
    return y if form == "twice" else y - x


def _around_norm(form: str, adapter: nn.Module, z: Tensor, x: Tensor, s: Any, norm: nn.Module):
    """The layer's output with the adapter, and what was normalised to get it; s = h + x and z = norm(s) are without."""
    if form == "output":
        return adapter(z, z), s
    if form == "norm_parallel":
        s = adapter(x, _like(s, x))
    elif form == "norm_twice":
        s = adapter(z, z) + x
    elif form == "norm_post_add":
        s = adapter(z, _like(s, z)) + x
    elif form == "norm_first":
        s = adapter(z, _like(s - x, z)) + x
    else:
        s = adapter(z, _like(s, z))
    return norm.forward(s), s  # not called, so that hooks see the model's own call only


def _like(residual: Tensor, x: Tensor) -> Tensor:
    """The residual in x's dtype; they differ under autocast."""
    return residual if residual.dtype == x.dtype else residual.to(x.dtype)


def _after(module: nn.Module, args: tuple, kwargs: dict, output):
    return cast(Bottlenecks, module._modules[_CHILD]).serve(module, args, kwargs, output)


def _before(module: nn.Module, args: tuple, kwargs: dict) -> None:
    cast(Tap, module._modules[_TAP]).put(args[0] if args else next(iter(kwargs.values())))


def _release(module: nn.Module, child: str) -> None:
    module._modules.pop(child, None)
    for hooks, flags in (
        (module._forward_hooks, module._forward_hooks_with_kwargs),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if hook is (_after if child == _CHILD else _before)]:
            del hooks[key]
            flags.pop(key, None)
