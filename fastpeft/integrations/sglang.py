"""A LoRA backend for SGLang that is served by ``ops.multi_lora_``: a plug-in, and nothing changes until it is chosen.

    sglang serve MODEL --enable-lora --lora-backend fastpeft ...

SGLang loads the entry point ``fastpeft`` of the group ``sglang.srt.plugins`` in each of its processes, which adds the
backend to its registry and to the choices of ``--lora-backend``. The backend is a subclass of SGLang's own ``csgmv``.
Replaced is what the linear layers call, each site in one call that reads x once (qkv, gate_up, and also o and down).
Embeddings, lm_head and MoE stay SGLang's own. Where SGLang reduces a row-parallel layer's output over the ranks, the
adapter's share has been added to it before, so that there is one reduction and not two.

SGLang packs A's stacked slices by an adapter's own rank; here they lie ``max_lora_rank`` rows apart, so that each slice
is a view for all slots. Adapters are moved apart when they are loaded into a slot.

If SGLang's interface differs from the one below, choosing the backend is an error that says what differs.
Interface read in SGLang 0.5.23; 0.5.21 and earlier differ (layers do not call ``forward_with_base``).
"""

import functools
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _interface
from ._step import StepRouting, add_lora_, define

NAME = "fastpeft"
TESTED = ("0.5.23",)  # versions whose source has INTERFACE
INTERFACE: dict[str, _interface.Wanted] = {
    "sglang.srt.lora.backend.lora_registry:register_lora_backend": ("name",),
    "sglang.srt.lora.lora_manager:LoRAManager.prepare_lora_batch": ("self", "forward_batch"),
    "sglang.srt.lora.mem_pool:LoRAMemoryPool.load_lora_weight_to_buffer": (
        "self", "uid", "buffer_id", "lora_adapter", "lora_modules", "lora_embed_tokens_module", "lora_lm_head_module",
    ),
    "sglang.srt.lora.layers:BaseLayerWithLoRA.lora_backend": "attribute",
    "sglang.srt.lora.layers:QKVParallelLinearWithLoRA.lora_a": "attribute",
    "sglang.srt.lora.layers:QKVParallelLinearWithLoRA.lora_b": "attribute",
    "sglang.srt.lora.layers:MergedColumnParallelLinearWithLoRA.lora_a": "attribute",
    "sglang.srt.lora.layers:ReplicatedLinearWithLoRA.lora_a": "attribute",
    "sglang.srt.lora.layers:RowParallelLinearWithLoRA.apply_lora": ("self", "base_output", "x"),
    "sglang.srt.lora.utils:generate_sequence_lengths": ("forward_batch", "device"),
    "sglang.srt.lora.utils:LoRABatchInfo.lora_ranks": "attribute",
    "sglang.srt.lora.utils:LoRABatchInfo.scalings": "attribute",
    "sglang.srt.lora.backend.base_backend:BaseLoRABackend.forward_with_base": (
        "self", "layer", "x", "base_fn", "lora_a", "lora_b", "output_offset", "offsets",
    ),
    "sglang.srt.lora.backend.chunked_backend:ChunkedSgmvLoRABackend.__init__": (
        "self", "max_loras_per_batch", "device", "server_args",
    ),
    "sglang.srt.lora.backend.chunked_backend:ChunkedSgmvLoRABackend.run_lora_a_sgemm": (
        "self", "x", "weights", "pruned_batch_info", "stack_num",
    ),
    "sglang.srt.lora.backend.chunked_backend:ChunkedSgmvLoRABackend.run_qkv_lora": (
        "self", "x", "qkv_lora_a", "qkv_lora_b", "output_offset", "max_qkv_out_dim", "base_output", "n_slices",
    ),
    "sglang.srt.lora.backend.chunked_backend:ChunkedSgmvLoRABackend.run_gate_up_lora": (
        "self", "x", "gate_up_lora_a", "gate_up_lora_b", "output_offset", "base_output",
    ),
    "sglang.srt.lora.backend.chunked_backend:ChunkedSgmvLoRABackend.init_decode_cuda_graph_batch_info": (
        "self", "max_bs_in_cuda_graph", "num_tokens_per_req",
    ),
    "sglang.srt.lora.backend.chunked_backend:ChunkedSgmvLoRABackend.init_prefill_cuda_graph_batch_info": (
        "self", "max_num_tokens", "max_num_requests",
    ),
    "sglang.srt.lora.backend.chunked_backend:ChunkedSgmvLoRABackend.prepare_lora_batch": (
        "self", "forward_batch", "weight_indices", "lora_ranks", "scalings", "use_cuda_graph", "use_prefill_cuda_graph",
    ),
}  # fmt: skip

_log = logging.getLogger("sglang.fastpeft")
# For checkers: what the backend's base has is SGLang's, and known by INTERFACE alone.
_Backend: Any = object
_LAYERS = "sglang.srt.lora.layers"


def plugin() -> None:
    """The entry point; calling it again does no harm.

    Raises:
        ImportError: SGLang does not import, or has neither the registry nor the arguments to add to.
    """
    try:
        from sglang.srt.lora.backend.lora_registry import register_lora_backend
        from sglang.srt.server_args import ServerArgs
    except ImportError as error:
        raise ImportError("fastpeft.integrations.sglang: sglang does not import, expected sglang>=0.5.23") from error
    register_lora_backend(NAME)(create_backend)
    if not _interface.is_marked(ServerArgs.add_cli_args):
        ServerArgs.add_cli_args = staticmethod(_with_choice(ServerArgs.add_cli_args))


def _with_choice(add_cli_args):
    @functools.wraps(add_cli_args)
    def add(parser, *args, **kwargs):
        result = add_cli_args(parser, *args, **kwargs)
        for action in parser._actions:
            if action.dest == "lora_backend" and NAME not in (action.choices or [NAME]):
                action.choices = [*action.choices, NAME]
        return result

    _interface.mark(add)
    return add


def create_backend() -> type:
    """What the registry calls for ``--lora-backend fastpeft``: the backend's class.

    Raises:
        RuntimeError: SGLang differs from ``INTERFACE``; says in what. Nothing has been changed then.
    """
    problems = _interface.problems(INTERFACE)
    if problems:
        text = "fastpeft.integrations.sglang: this SGLang cannot be served, choose another --lora-backend: "
        raise RuntimeError(text + "; ".join(problems))
    from sglang.srt.lora.backend.chunked_backend import ChunkedSgmvLoRABackend
    from sglang.srt.lora.mem_pool import LoRAMemoryPool

    spread_on_load(LoRAMemoryPool)
    _log.info(_interface.SERVED.format("SGLang"))
    return backend_class(ChunkedSgmvLoRABackend)


@functools.cache
def backend_class(base: type) -> type:
    """The backend on top of SGLang's chunked one."""
    return type("FastLoRABackend", (_Fast, base), {"__doc__": _Fast.__doc__, "__module__": __name__})


class _Fast(_Backend):
    """``FastLoRABackend`` without its base, ``ChunkedSgmvLoRABackend``, which only SGLang can provide."""

    name = NAME

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fastpeft_steps: dict[str, StepRouting] = {}
        self.fastpeft_tables: list[Tensor] | None = None

    def init_decode_cuda_graph_batch_info(self, max_bs_in_cuda_graph, num_tokens_per_req):
        super().init_decode_cuda_graph_batch_info(max_bs_in_cuda_graph, num_tokens_per_req)
        self.fastpeft_steps["decode graph"] = self._new_step(max_bs_in_cuda_graph * num_tokens_per_req)

    def init_prefill_cuda_graph_batch_info(self, max_num_tokens, max_num_requests=None):
        super().init_prefill_cuda_graph_batch_info(max_num_tokens, max_num_requests)
        self.fastpeft_steps["prefill graph"] = self._new_step(max_num_tokens)

    def _new_step(self, tokens: int) -> StepRouting:
        return StepRouting(tokens, self.max_loras_per_batch, self.device)

    def prepare_lora_batch(
        self, forward_batch, weight_indices, lora_ranks, scalings, use_cuda_graph, use_prefill_cuda_graph=False
    ):
        mode = use_cuda_graph, use_prefill_cuda_graph
        super().prepare_lora_batch(forward_batch, weight_indices, lora_ranks, scalings, *mode)
        lengths = _sequence_lengths(forward_batch)
        slots = [slot if lora_ranks[slot] > 0 else -1 for slot in weight_indices]
        token_slots = torch.repeat_interleave(torch.tensor(slots, dtype=torch.int32, device="cpu"), lengths)
        # In-place, as SGLang does it: a graph reads the buffers that it was captured with. Eager ones may grow.
        kind = "prefill graph" if use_prefill_cuda_graph else "decode graph" if use_cuda_graph else "eager"
        step = self.fastpeft_steps.get(kind)
        if step is None or (kind == "eager" and len(step.tables[0]) < len(token_slots)):
            step = self.fastpeft_steps[kind] = self._new_step(2 * len(token_slots))
        if torch.device(self.device).type == "cuda":
            token_slots = token_slots.pin_memory().to(self.device, non_blocking=True)
        # SGLang captures with batches of the base model alone: what a graph may replay has to be launched.
        step.update(token_slots, launch=kind != "eager" or max(slots, default=-1) >= 0)
        self.fastpeft_tables = step.tables

    def forward_with_base(
        self, layer, x, base_fn, lora_a, lora_b, output_offset, offsets, *, all_reduce=None, kind="linear",
        pruned_batch_info=None, **kwargs,
    ):  # fmt: skip
        """``base_fn() + LoRA``, then the reduction over the ranks, if any."""
        own = getattr(type(layer).apply_lora, "__module__", None) != _LAYERS
        if kind != "linear" or pruned_batch_info is not None or own or kwargs:
            operands = layer, x, base_fn, lora_a, lora_b, output_offset, offsets
            extra = {"all_reduce": all_reduce, "kind": kind, "pruned_batch_info": pruned_batch_info}
            return super().forward_with_base(*operands, **extra, **kwargs)
        y = self._add(base_fn(), x, lora_a, lora_b, offsets)
        return y if all_reduce is None else all_reduce(y)

    def run_qkv_lora(
        self, x, qkv_lora_a, qkv_lora_b, output_offset, max_qkv_out_dim, base_output=None, n_slices=3, *args, **kwargs
    ):
        return self._add(base_output, x, qkv_lora_a, qkv_lora_b, _offsets(output_offset, kwargs))

    def run_gate_up_lora(self, x, gate_up_lora_a, gate_up_lora_b, output_offset, base_output=None, *args, **kwargs):
        return self._add(base_output, x, gate_up_lora_a, gate_up_lora_b, _offsets(output_offset, kwargs))

    def run_lora_a_sgemm(self, x, weights, pruned_batch_info=None, stack_num=1, *args, **kwargs):
        """SGLang's own, for embeddings and lm_head; stacked slices only come with their B."""
        if stack_num != 1:
            raise NotImplementedError(f"run_lora_a_sgemm: stack_num={stack_num}, expected 1 (see run_qkv_lora)")
        return super().run_lora_a_sgemm(x, weights, pruned_batch_info, stack_num, *args, **kwargs)

    def _add(self, y: Tensor | None, x: Tensor, lora_a: Tensor, lora_b: Tensor, offsets: Sequence[int]) -> Tensor:
        if y is None:
            y = x.new_zeros(*x.shape[:-1], lora_b.shape[-2])
        if lora_b.shape[-1]:
            info = self.batch_info
            flat = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
            _sglang_lora_(*flat, lora_a, lora_b, list(offsets), self.fastpeft_tables, info.scalings, info.lora_ranks)
        return y


def _offsets(output_offset: Tensor, kwargs: dict) -> list[int]:
    on_cpu = kwargs.get("output_offset_cpu")
    return (output_offset if on_cpu is None else on_cpu).tolist()


def _sequence_lengths(forward_batch) -> Tensor:
    from sglang.srt.lora.utils import generate_sequence_lengths

    return generate_sequence_lengths(forward_batch, device="cpu")


def _run(y, x, lora_a, lora_b, offsets, tables, scales, ranks):
    rank = lora_b.shape[2]
    lora_as = lora_a[:, : (len(offsets) - 1) * rank].split(rank, 1)
    lora_bs = [lora_b[:, first:last] for first, last in itertools.pairwise(offsets)]
    add_lora_("sglang_lora_", y, x, lora_as, lora_bs, tables, scales, ranks)


_sglang_lora_ = define(
    "sglang_lora_",
    "(Tensor(a!) y, Tensor x, Tensor lora_a, Tensor lora_b, int[] offsets, Tensor[] tables, Tensor scales, "
    "Tensor ranks) -> ()",
    _run,
)


def spread_on_load(pool: Any) -> None:
    """Have a memory pool move the stacked slices of each adapter that it loads for this backend apart; once a class."""
    original = pool.load_lora_weight_to_buffer
    if _interface.is_marked(original):
        return

    @functools.wraps(original)
    def load_lora_weight_to_buffer(self, uid, buffer_id, lora_adapter, lora_modules, *args, **kwargs):
        result = original(self, uid, buffer_id, lora_adapter, lora_modules, *args, **kwargs)
        modules = [m for layer in lora_modules for m in layer.values()] if uid is not None else []
        for module in modules:
            if getattr(getattr(module, "lora_backend", None), "name", None) == NAME:
                spread(module, buffer_id, lora_adapter.config.r)
        return result

    _interface.mark(load_lora_weight_to_buffer)
    pool.load_lora_weight_to_buffer = load_lora_weight_to_buffer


def spread(module, slot: int, rank: int) -> None:
    """Rows ``p · rank ...`` of slice p of A become rows ``p · R ...``, with R as B has columns."""
    a, b = getattr(module, "lora_a", None), getattr(module, "lora_b", None)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dim() != 3 or b.shape[-1] in (0, rank):
        return
    width, columns = b.shape[-1], a.shape[2]
    count = a.shape[1] // width
    if count > 1:
        packed = a[slot, : count * rank].clone()
        a[slot].view(count, width, columns)[:, :rank] = packed.view(count, rank, columns)
